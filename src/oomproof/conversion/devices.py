"""Which device quantizes: a GPU that has room, else the processor."""

from __future__ import annotations

import torch

from oomproof.conversion.encode import host_bytes
from oomproof.conversion.layout import Output
from oomproof.errors import InputError
from oomproof.units import MIB

_DEVICE_BYTES = 512 * MIB
"""Of a GPU, beside the codes of the largest weight: staging, kernels, allocator."""
_CAPABILITY = (8, 0)


def choose_device(asked: str, output: Output) -> torch.device:
    """Where weights are quantized.

    Raises:
        InputError: There is no such device.
    """
    if asked == "cpu":
        return torch.device("cpu")
    if asked == "auto":
        return _free_gpu(output) or torch.device("cpu")
    name, _, index = asked.partition(":")
    if name != "cuda" or (index and not (index.isdecimal() and len(index) < 4)):
        raise InputError(
            f"device {asked[:40]!r} is unknown", remedy="use auto, cpu, cuda or cuda:1"
        )
    count = torch.cuda.device_count()
    number = int(index or 0)
    if number >= count:
        raise InputError(
            f"device {asked[:40]!r} is not here: this process sees {count} GPUs",
            remedy="use --device cpu, or see `oomproof doctor`",
        )
    _refuse_old(number)
    return torch.device("cuda", number)


def named_device(asked: str) -> torch.device:
    """A device by its name; "auto" is a GPU where there is one.

    Raises:
        InputError: There is no such device.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, _, index = asked.partition(":")
    if name not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise InputError(
            f"device {asked[:40]!r} is unknown", remedy="use auto, cpu, cuda or cuda:1"
        )
    if name == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {asked[:40]!r} is not here: this process sees "
            f"{torch.cuda.device_count()} GPUs",
            remedy="use --device cpu",
        )
    return torch.device(asked)


def _refuse_old(number: int) -> None:
    if torch.cuda.get_device_capability(number) < _CAPABILITY:
        raise InputError(
            f"GPU {number} has compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(number)))}, kernels need "
            f"{'.'.join(map(str, _CAPABILITY))}",
            remedy="use --device cpu",
        )


def _free_gpu(output: Output) -> torch.device | None:
    """The GPU with the most free memory, where one has enough and our kernels run on it."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    needed = _DEVICE_BYTES + host_bytes(output)
    found = [
        (torch.cuda.mem_get_info(number)[0], -number)
        for number in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(number) >= _CAPABILITY
    ]
    best = max(found, default=(0, 0))
    return torch.device("cuda", -best[1]) if best[0] >= needed else None
