"""Every error that oomproof raises on purpose.

OomproofError                   exit code 1
├── InputError                  a value the user gave is wrong
│   ├── ConfigError             a config.json (file and field are named)
│   ├── CheckpointError         a safetensors file or folder (file is named)
│   ├── ModelNotFoundError      no folder, hub repository or catalog entry of that name
│   ├── HardwareError           a made-up or real machine that cannot be understood
│   └── RequestError            a prompt or sampling option that cannot be served
├── MissingDependencyError      a package of the [run] extra is absent (carries the install line)
├── NotRunnableError            the plan fits, but no engine here can run it
├── PlanDoesNotFitError         exit code 3: the plan needs more memory than there is
│   ├── LadderExhaustedError    memory ran out, and no allowed rung of the ladder helps
│   └── TrainingMemoryError     memory ran out in a training step (carries batch and length)
├── EngineFaultError            a device failed for this process; every running request ended
├── KernelCompileError          NVRTC refuses one of our CUDA sources (carries its log)
├── CudaError                   the CUDA driver refuses a call (carries its name of the error)
├── WorkerError                 the model's process died, hung or met a fault (carries the cause)
│   └── WorkerDownError         it is not started again
├── RankError                   another process of a run on several GPUs failed or fell silent
└── LoadError                   loading did not produce what the plan promised
    └── PlanMismatchError       a parameter's device, dtype or bytes differ from the plan

An error names the value, the bound and the remedy; `str(error)` is the one line a user reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class OomproofError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: What is wrong, with the value and the bound.
        remedy: What the user can do about it; appended to the message.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(f"{message}: {remedy}" if remedy else message)

    def __reduce__(self) -> tuple[Callable[..., OomproofError], tuple[Any, ...]]:
        return _restore, (type(self), self.args, self.__dict__)


def _restore(
    kind: type[OomproofError], args: tuple[Any, ...], state: dict[str, Any]
) -> OomproofError:
    """The error as it was pickled; its constructor takes other arguments than `args`."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InputError(OomproofError):
    """A value that the user gave is wrong."""


class ConfigError(InputError):
    """A config.json that cannot be trusted.

    Args:
        file: Path or URL of the file.
        problem: What is wrong, with the value and the bound.
        field: The offending field, where one field is to blame.
    """

    def __init__(
        self, file: str, problem: str, *, field: str | None = None, remedy: str | None = None
    ) -> None:
        self.file = file
        self.field = field
        where = f"{file}, field {field!r}" if field else file
        super().__init__(f"{where}: {problem}", remedy=remedy)


class CheckpointError(InputError):
    """A checkpoint file or folder that is missing, damaged or unsafe.

    Args:
        file: Path of the file to blame.
        problem: What is wrong, with the value and the bound.
    """

    def __init__(self, file: str, problem: str, *, remedy: str | None = None) -> None:
        self.file = file
        super().__init__(f"{file}: {problem}", remedy=remedy)


class ModelNotFoundError(InputError):
    """No folder, hub repository or catalog entry answers to the name."""


class HardwareError(InputError):
    """A machine, described or real, that cannot be understood."""


class RequestError(InputError):
    """A prompt or a sampling option that cannot be served as asked."""


class MissingDependencyError(OomproofError):
    """A package that this command needs is not installed.

    Args:
        package: The missing package.
        install: The command that installs it.
    """

    def __init__(self, package: str, *, install: str) -> None:
        self.package = package
        self.install = install
        super().__init__(f"{package} is not installed", remedy=f"run: {install}")


class NotRunnableError(OomproofError):
    """The plan may fit, but no engine on this machine can run it."""


class PlanDoesNotFitError(OomproofError):
    """The plan needs more memory than there is.

    Args:
        message: What is missing, on which device.
        shortfall_bytes: The least sum of what is missing over the devices.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, shortfall_bytes: int, remedy: str | None = None) -> None:
        self.shortfall_bytes = shortfall_bytes
        super().__init__(message, remedy=remedy)


class LadderExhaustedError(PlanDoesNotFitError):
    """Memory ran out, and no rung of the ladder that is allowed helps.

    Args:
        message: What failed.
        fault: The failure, an `oomproof.faults.fault.Fault`.
        tried: One line a rung: its name, and what came of it.
        shortfall_bytes: What was missing, 0 where nothing says.
    """

    def __init__(
        self,
        message: str,
        *,
        fault: Any,
        tried: tuple[str, ...],
        shortfall_bytes: int = 0,
        remedy: str | None = None,
    ) -> None:
        self.fault = fault
        self.tried = tried
        super().__init__(
            f"{message}; tried: {'; '.join(tried) or 'nothing'}",
            shortfall_bytes=shortfall_bytes,
            remedy=remedy,
        )


class TrainingMemoryError(PlanDoesNotFitError):
    """Memory ran out in a training step; checkpoints so far are whole.

    Args:
        message: What failed.
        fault: The failure, an `oomproof.faults.fault.Fault`.
        micro_batch: Sequences that were computed at once.
        length: Tokens of each.
        shortfall_bytes: What was missing, 0 where nothing says.
    """

    def __init__(
        self,
        message: str,
        *,
        fault: Any,
        micro_batch: int,
        length: int,
        shortfall_bytes: int = 0,
        remedy: str | None = None,
    ) -> None:
        self.fault, self.micro_batch, self.length = fault, micro_batch, length
        super().__init__(message, shortfall_bytes=shortfall_bytes, remedy=remedy)


class EngineFaultError(OomproofError):
    """A device failed for good, for this process or for all; every running request has ended.

    Args:
        message: What failed.
        fault: The failure, an `oomproof.faults.fault.Fault`.
        request_ids: The requests that ended without their answer.
    """

    def __init__(
        self,
        message: str,
        *,
        fault: Any,
        request_ids: tuple[str, ...] = (),
        remedy: str | None = None,
    ) -> None:
        self.fault = fault
        self.request_ids = request_ids
        super().__init__(message, remedy=remedy)


class KernelCompileError(OomproofError):
    """NVRTC refuses one of our CUDA sources.

    Args:
        source: Name of the source, and what it was compiled for.
        log: Everything that NVRTC says; the message has its first errors.
    """

    def __init__(self, source: str, log: str) -> None:
        self.source = source
        self.log = log
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line] or lines or ["NVRTC gives no reason"]
        super().__init__(
            f"{source}: {'; '.join(errors[:3])}",
            remedy="this is a bug in oomproof or an untested NVRTC; report it, "
            "and use --engine transformers until then",
        )


class CudaError(OomproofError):
    """The CUDA driver refuses a call.

    Args:
        call: The function of the driver, and what it was called for.
        name: CUDA's name of the error: "CUDA_ERROR_INVALID_IMAGE".
    """

    def __init__(self, call: str, name: str, *, remedy: str | None = None) -> None:
        self.call = call
        self.name = name
        super().__init__(f"{call}: {name}", remedy=remedy)


class WorkerError(OomproofError):
    """The process that holds the model died, hung, or met a fault; what it was answering is lost.

    Args:
        message: What happened.
        code: CUDA's number of the error, or the process's exit code; None where there is neither.
        signal: Name of the signal that ended the process: "SIGKILL".
        stderr: The last lines that the process wrote.
        fault: What it met, an `oomproof.faults.fault.Fault`; None where it ended by itself.
    """

    def __init__(
        self,
        message: str,
        *,
        code: int | None = None,
        signal: str | None = None,
        stderr: str = "",
        fault: Any = None,
        remedy: str | None = None,
    ) -> None:
        self.code = code
        self.signal = signal
        self.stderr = stderr
        self.fault = fault
        super().__init__(message, remedy=remedy)


class WorkerDownError(WorkerError):
    """The model's process failed for good: it is not started again."""


class RankError(OomproofError):
    """Another process of a run on several GPUs failed, or does not answer; this one cannot go on.

    What failed first is told by that process, on its own standard error.
    """


class LoadError(OomproofError):
    """Loading did not produce what the plan promised."""


class PlanMismatchError(LoadError):
    """A loaded parameter differs from the plan in device, dtype or bytes.

    Args:
        differences: One line per differing parameter: name, planned, found.
    """

    def __init__(self, differences: tuple[str, ...]) -> None:
        self.differences = differences
        shown = "; ".join(differences[:3])
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        super().__init__(
            f"{len(differences)} loaded parameters differ from the plan: {shown}{more}",
            remedy="this is a bug in oomproof or an untested engine version; report it",
        )
