"""NVML, the library behind nvidia-smi: opened and closed in pairs, its errors in words.

`nvml` is everywhere the module `pynvml`, or in tests an object with its functions and constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

from oomproof.errors import HardwareError

T = TypeVar("T")

_LOST = "restart the machine or its driver (nvidia-smi shows more)"
_REMEDIES = {
    "NVML_ERROR_NO_PERMISSION": "run as a user who may open /dev/nvidia*",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": (
        "the driver was updated while it was running: restart the machine"
    ),
    "NVML_ERROR_GPU_IS_LOST": _LOST,
    "NVML_ERROR_RESET_REQUIRED": _LOST,
    "NVML_ERROR_UNKNOWN": (
        "in a container, start it again with the GPUs (docker run --gpus all); otherwise restart "
        "the driver (nvidia-smi shows more)"
    ),
}
_DEFAULT_REMEDY = 'check nvidia-smi, or describe the machine with --gpus "1x RTX 4090"'


@contextmanager
def nvml_session(nvml: ModuleType | Any) -> Iterator[bool]:
    """Pairs nvmlInit with nvmlShutdown; yields False where there is no driver or no GPU."""
    absent = (
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED,
        nvml.NVML_ERROR_NOT_FOUND,
        nvml.NVML_ERROR_GPU_NOT_FOUND,
    )
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value not in absent:
            raise _fault(nvml, error) from error
        yield False
        return
    try:
        yield True
    except nvml.NVMLError as error:
        raise _fault(nvml, error) from error
    finally:
        nvml.nvmlShutdown()


def where_supported(
    nvml: ModuleType | Any, call: Callable[[], T], *, also: tuple[int, ...] = ()
) -> T | None:
    """The answer, None where this GPU or this driver does not know the question.

    Args:
        nvml: The module `pynvml` or its like.
        call: The question.
        also: Further error numbers that mean "no answer" to this question.
    """
    unsupported = (
        *also,
        nvml.NVML_ERROR_NOT_SUPPORTED,
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    )
    try:
        return call()
    except nvml.NVMLError as error:
        if error.value in unsupported:
            return None
        raise


def as_text(value: str | bytes) -> str:
    """Old bindings answer in bytes."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


def _fault(nvml: ModuleType | Any, error: Exception) -> HardwareError:
    value = getattr(error, "value", None)
    remedies = (text for name, text in _REMEDIES.items() if getattr(nvml, name) == value)
    return HardwareError(
        f"NVML cannot read the GPUs: {error} (error {value})",
        remedy=next(remedies, _DEFAULT_REMEDY),
    )
