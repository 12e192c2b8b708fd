"""Why a worker does not serve: from what it told, or how it ended, to the error of its requests."""

from __future__ import annotations

from dataclasses import dataclass

from oomproof.errors import LadderExhaustedError, OomproofError, WorkerDownError, WorkerError
from oomproof.faults.fault import Cause, FaultClass
from oomproof.worker.endings import describe_end
from oomproof.worker.messages import Failed, Report
from oomproof.worker.process import Ended


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a worker does not serve."""

    error: OomproofError
    final: bool = False
    """Whether no other could."""
    alive: bool = False
    """Whether the same process may be proved again."""


class FailedError(Exception):
    """Carries a failure to where it is dealt with."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure.error))
        self.failure = failure


def failure_of(
    report: Report | Ended, *, doing: str, oom_kills: tuple[int | None, int | None], stderr: str
) -> Failure | None:
    """The failure that a report is; None where it is none.

    Args:
        report: What came.
        doing: What the worker was doing: "loading", "answering".
        oom_kills: The control group's count of processes killed for memory, before and after.
        stderr: The worker's last lines.
    """
    match report:
        case Ended(garbled=str(why)):
            return nonsense(why)
        case Ended(returncode=returncode):
            return Failure(
                error=describe_end(returncode, doing=doing, oom_kills=oom_kills, stderr=stderr)
            )
        case Failed(fault=fault):
            return Failure(
                error=report.error or _of_failed(report, doing),
                final=fault is not None and fault.fault_class is FaultClass.GPU,
                alive=report.alive,
            )
    return None


def _of_failed(failed: Failed, doing: str) -> WorkerError:
    first = (failed.text.strip().splitlines() or ["no message"])[0][:300]
    fault, code = failed.fault, None
    if fault is not None and fault.cause is not Cause.HOST_MEMORY:
        code = fault.evidence.code
    number = "" if code is None else f" (CUDA error {code})"
    return WorkerError(
        f"the model's process met {failed.type}{number} while {doing}: {first}",
        code=code,
        fault=fault,
    )


def hung(doing: str, timeout_s: float) -> Failure:
    """It gave no sign of life."""
    return Failure(
        error=WorkerError(
            f"the model's process gave no sign of life for {timeout_s:g} s while {doing}, "
            "and was ended",
            signal="SIGKILL",
        )
    )


def nonsense(why: str) -> Failure:
    """It sent what it cannot mean."""
    return Failure(
        error=WorkerError(
            f"the model's process sent what it should not: {why}",
            remedy="this is a bug in oomproof; report it",
        )
    )


def as_told(error: OomproofError) -> OomproofError:
    """What those are told whose requests are lost."""
    known = isinstance(error, WorkerError | LadderExhaustedError)
    return error if known else WorkerError(str(error), fault=getattr(error, "fault", None))


def as_down(error: OomproofError, why: str) -> WorkerDownError:
    """The error of a worker that is not started again."""
    known = error if isinstance(error, WorkerError) else WorkerError(str(error))
    return WorkerDownError(
        f"{known.message}; it is not started again: {why}",
        code=known.code,
        signal=known.signal,
        stderr=known.stderr,
        fault=known.fault or getattr(error, "fault", None),
        remedy=known.remedy,
    )
