"""One classifier of failures: an exception, a text, or a process's exit → Fault.

Types and error codes decide first, words last. torch is never imported: types are known by their
names along the method resolution order, so a process without torch, or one that got an exception
from another process, classifies as well.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from oomproof.faults.codes import code_of_name, cuda_code
from oomproof.faults.fault import Cause, Evidence, Fault, FaultClass, MemoryFigures
from oomproof.faults.figures import read_device, read_figures
from oomproof.faults.line import Line, take_apart
from oomproof.faults.rule import Rule, Verdict, match_rules, verdict_of
from oomproof.faults.texts_gpu import gpu_rules
from oomproof.faults.texts_host import host_rules
from oomproof.faults.texts_setup import setup_rules

MAX_DEPTH = 64
"""Exceptions of a chain that are looked at."""
_MAX_MESSAGE = 16_384
_MAX_SHOWN = 300
_SEVERITY = {FaultClass.GPU: 2, FaultClass.PROCESS: 1}
_WRAPPED = ("inner_exception", "original_exception", "cause")
"""Where torch.compile, joblib and Ray keep what they wrap, beside __cause__."""

RULES: tuple[Rule, ...] = (*gpu_rules(), *host_rules(), *setup_rules())

_BY_TYPE: dict[tuple[str, str], Verdict] = {
    (root, name): Verdict(fault_class=fault_class, cause=cause)
    for root, name, fault_class, cause in (
        ("torch", "OutOfMemoryError", FaultClass.SHRINK, Cause.GPU_MEMORY),
        ("cupy", "OutOfMemoryError", FaultClass.SHRINK, Cause.GPU_MEMORY),
        ("triton", "OutOfResources", FaultClass.USER, Cause.ON_CHIP_MEMORY),
        ("pynvml", "NVMLError_GpuIsLost", FaultClass.GPU, Cause.GPU_LOST),
        ("builtins", "MemoryError", FaultClass.SHRINK, Cause.HOST_MEMORY),
        ("oomproof", "PlanDoesNotFitError", FaultClass.USER, Cause.DOES_NOT_FIT),
        ("oomproof", "MissingDependencyError", FaultClass.USER, Cause.MISSING_PACKAGE),
        ("oomproof", "InputError", FaultClass.USER, Cause.BAD_REQUEST),
    )
}
_BY_ERRNO = {
    errno.ENOMEM: Verdict(fault_class=FaultClass.SHRINK, cause=Cause.HOST_MEMORY),
    errno.ENOSPC: Verdict(fault_class=FaultClass.USER, cause=Cause.DISK_FULL),
    errno.EDQUOT: Verdict(fault_class=FaultClass.USER, cause=Cause.DISK_FULL),
}
TYPES_IN_TEXT = {
    "OutOfMemoryError": _BY_TYPE["torch", "OutOfMemoryError"],
    "OutOfResources": _BY_TYPE["triton", "OutOfResources"],
    "NVMLError_GpuIsLost": _BY_TYPE["pynvml", "NVMLError_GpuIsLost"],
    "MemoryError": _BY_TYPE["builtins", "MemoryError"],
    "_ArrayMemoryError": _BY_TYPE["builtins", "MemoryError"],
    **dict.fromkeys(
        ("ncclUnhandledCudaError", "ncclSystemError", "ncclInternalError", "ncclRemoteError"),
        Verdict(fault_class=FaultClass.PROCESS, cause=Cause.NCCL),
    ),
}
"""Types whose name says it all, whatever the message."""
_ROOTS_IN_TEXT = frozenset(("", "torch", "cupy", "triton", "pynvml", "numpy", "builtins"))
_SIGKILL = 9
_DEADLY = frozenset((4, 6, 7, 8, 11))
"""SIGILL, SIGABRT, SIGBUS, SIGFPE and SIGSEGV of Linux; Windows has no names for them."""


def classify(error: BaseException) -> Fault | None:
    """What an exception, or one that it was raised from, is.

    Causes, contexts that were not suppressed, groups and what wrappers keep are followed. Where
    several are known, a fatal one counts before any other, and then the outermost.

    Returns:
        None where nothing of it is a failure of memory, of a device, or of an installation.
    """
    found: Fault | None = None
    for depth, one in _chain(error):
        fault = _classify_one(one)
        if fault is None:
            continue
        if found is None or _severity(fault) > _severity(found):
            found = fault.at_depth(depth)
    return found


def classify_text(text: str) -> Fault | None:
    """What an error's text is: "torch.OutOfMemoryError: CUDA out of memory. Tried to …".

    Only its first line is held against the rules, as a logger may have written it; the lines behind
    it complete it.
    """
    text = text[:_MAX_MESSAGE].lstrip("\r\n")
    return classify_line(take_apart(text.partition("\n")[0]), text)


def classify_line(line: Line, whole: str) -> Fault | None:
    """As `classify_text`, for a line that was taken apart already."""
    if (found := match_rules(RULES, line, whole)) is not None:
        rule, verdict = found
        return _fault(verdict, rule.name, line.message, whole)
    by_type = TYPES_IN_TEXT.get(line.short_type)
    if by_type is not None and line.root in _ROOTS_IN_TEXT:
        return _fault(by_type, "type", f"{line.type}: {line.message}", whole)
    return None


def classify_exit(returncode: int) -> Fault | None:
    """What the exit of a child process is.

    Args:
        returncode: As subprocess gives it (-9 for SIGKILL) or as a shell does (137).

    Returns:
        None where it exited by itself, or was asked to.
    """
    number = -returncode if returncode < 0 else returncode - 128
    if number == _SIGKILL:
        verdict = Verdict(fault_class=FaultClass.PROCESS, cause=Cause.KILLED, code=returncode)
    elif number in _DEADLY:
        verdict = Verdict(fault_class=FaultClass.PROCESS, cause=Cause.CRASHED, code=returncode)
    else:
        return None
    return _fault(verdict, "exit", f"exit code {returncode}", "")


def _classify_one(error: BaseException) -> Fault | None:
    message = _message(error)
    verdict, rule = _by_code(error), "code"
    if verdict is None:
        verdict, rule = _by_type(error), "type"
    if verdict is not None:
        return _fault(verdict, rule, f"{type(error).__name__}: {message}", message)
    first = message.partition("\n")[0]
    name = f"{type(error).__module__}.{type(error).__name__}"
    fault = classify_line(Line(type=name, message=first.strip()), message)
    if fault is None and first.startswith("Caught ") and "Original Traceback" in message:
        # DataLoader and DataParallel raise the worker's traceback as a message.
        tails = (line for line in message.splitlines() if line[:1].isalpha())
        fault = next((one for line in tails if (one := _of_tail(line, message))), None)
    return fault


def _of_tail(line: str, message: str) -> Fault | None:
    taken = take_apart(line)
    return None if taken.type is None else classify_line(taken, message[message.find(line) :])


def _by_code(error: BaseException) -> Verdict | None:
    names = _names(error)
    if ("torch", "AcceleratorError") in names:
        number = getattr(error, "error_code", None)
        if isinstance(number, int):
            return verdict_of(cuda_code(number))
    if ("oomproof", "CudaError") in names:
        code = code_of_name(str(getattr(error, "name", "")))
        unknown = Verdict(fault_class=FaultClass.PROCESS, cause=Cause.UNKNOWN_CUDA)
        return verdict_of(code) if code else unknown
    if isinstance(error, OSError) and (by_errno := _BY_ERRNO.get(error.errno or 0)):
        return Verdict(fault_class=by_errno.fault_class, cause=by_errno.cause, code=error.errno)
    for name in ("returncode", "exit_code", "exitcode"):
        code_of_exit = getattr(error, name, None)
        if type(code_of_exit) is int and (fault := classify_exit(code_of_exit)):
            return Verdict(fault_class=fault.fault_class, cause=fault.cause, code=code_of_exit)
    return None


def _by_type(error: BaseException) -> Verdict | None:
    names = _names(error)
    known = next((_BY_TYPE[name] for name in names if name in _BY_TYPE), None)
    if known is None and ("torch", "AcceleratorError") in names:
        # Without a number the words decide, and unknown ones are fatal for the process.
        if match_rules(RULES, Line(type="RuntimeError", message=_message(error)), _message(error)):
            return None
        return Verdict(fault_class=FaultClass.PROCESS, cause=Cause.UNKNOWN_CUDA)
    return known


def _names(error: BaseException) -> tuple[tuple[str, str], ...]:
    """(package, name) of each class of an exception, its own first."""
    return tuple(
        (str(one.__module__).partition(".")[0], one.__name__) for one in type(error).__mro__
    )


def _chain(error: BaseException) -> Iterator[tuple[int, BaseException]]:
    """An exception and all it was raised from, the outermost first, each once."""
    seen: set[int] = set()
    level = [error]
    depth = 0
    while level and depth < MAX_DEPTH:
        inner: list[BaseException] = []
        for one in level:
            if id(one) in seen or len(seen) >= MAX_DEPTH:
                continue
            seen.add(id(one))
            yield depth, one
            inner += _raised_from(one)
        level, depth = inner, depth + 1


def _raised_from(error: BaseException) -> list[BaseException]:
    if error.__cause__ is not None:
        inner = [error.__cause__]
    elif error.__context__ is not None and not error.__suppress_context__:
        inner = [error.__context__]
    else:
        inner = []
    if isinstance(error, BaseExceptionGroup):
        inner += error.exceptions
    kept = (getattr(error, name, None) for name in _WRAPPED)
    return inner + [one for one in kept if isinstance(one, BaseException)]


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_MESSAGE]
    except Exception:  # noqa: BLE001 - a foreign __str__ must not hide the failure it belongs to
        return ""


def _severity(fault: Fault) -> int:
    return _SEVERITY.get(fault.fault_class, 0)


def _fault(verdict: Verdict, rule: str, text: str, whole: str) -> Fault:
    figures = read_figures(whole) if whole else MemoryFigures()
    shown = " ".join(text.split())
    return Fault(
        fault_class=verdict.fault_class,
        cause=verdict.cause,
        evidence=Evidence(
            rule=rule,
            text=shown[: _MAX_SHOWN - 1] + "…" if len(shown) > _MAX_SHOWN else shown,
            code=verdict.code,
            code_name=verdict.code_name,
        ),
        figures=figures,
        device=read_device(whole),
    )
