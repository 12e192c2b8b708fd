"""What the end of a process was, in words: a signal, an exit code, the kernel's OOM killer."""

from __future__ import annotations

import signal

from oomproof.errors import WorkerError


def signal_name(returncode: int) -> str | None:
    """Name of the signal that ended a process, as subprocess tells it; None where none did."""
    if returncode >= 0:
        return None
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def describe_end(
    returncode: int, *, doing: str, oom_kills: tuple[int | None, int | None], stderr: str
) -> WorkerError:
    """The error of a worker that ended by itself or was ended by somebody else.

    Args:
        returncode: As subprocess gives it: negative for a signal.
        doing: What it was doing: "loading", "answering".
        oom_kills: The control group's count of processes killed for memory, before and after.
        stderr: Its last lines.
    """
    name = signal_name(returncode)
    if name is None:
        return WorkerError(
            f"the model's process exited with code {returncode} while {doing}",
            code=returncode,
            stderr=stderr,
            remedy=_last_line(stderr),
        )
    remedy = _last_line(stderr)
    if returncode == -signal.SIGKILL:
        remedy = _who_kills(oom_kills)
    return WorkerError(
        f"the model's process was ended by {name} while {doing}",
        signal=name,
        stderr=stderr,
        remedy=remedy,
    )


def _who_kills(oom_kills: tuple[int | None, int | None]) -> str:
    before, after = oom_kills
    advice = "use a smaller format, or give it more host memory"
    if before is not None and after is not None:
        if after > before:
            return (
                "the kernel ended it for want of host memory (oom_kill in the control group's "
                f"memory.events went from {before} to {after}); {advice}"
            )
        return "not for want of memory, says its control group: somebody sent the signal"
    return f"often that is the kernel's, for want of host memory (`dmesg` says); {advice}"


def _last_line(stderr: str) -> str | None:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"its last words: {lines[-1][:200]}" if lines else None
