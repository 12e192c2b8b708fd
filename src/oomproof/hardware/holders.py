"""Who holds the memory of the GPUs that CUDA shows to this process, as NVML tells it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from oomproof.hardware.usage import watch_gpus
from oomproof.hardware.visible import visible_ordinals
from oomproof.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A process with memory on a GPU."""

    device: int
    """CUDA's ordinal."""
    pid: int | None
    """As NVML numbers it: inside a container it may be the host's. None for processes that the
    driver does not name."""
    name: str
    """Of the program, "?" where it cannot be told."""
    used_bytes: int | None
    """None where the driver does not say."""

    def __str__(self) -> str:
        if self.pid is None:
            unnamed = format_bytes(self.used_bytes or 0)
            return f"processes that the driver does not name hold {unnamed} of GPU {self.device}"
        size = "memory" if self.used_bytes is None else format_bytes(self.used_bytes)
        name = "process" if self.name == "?" else self.name
        return f"{name} (pid {self.pid}) holds {size} of GPU {self.device}"


def read_holders(
    *, nvml: ModuleType | Any | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[Holder, ...]:
    """Every process that has memory on a visible GPU, the largest of each first; this one too.

    Args:
        nvml: The module `pynvml` or its like; imported where it is None.
        environ: Environment variables; CUDA_VISIBLE_DEVICES is obeyed.

    Raises:
        HardwareError: NVML reports a fault.
    """
    with watch_gpus(nvml) as read:
        gpus = read()
    shown = visible_ordinals(environ.get("CUDA_VISIBLE_DEVICES"), [gpu.uuid for gpu in gpus])
    return tuple(
        Holder(device=index, pid=one.pid, name=one.name, used_bytes=one.used_bytes)
        for index, ordinal in enumerate(shown)
        for one in gpus[ordinal].processes
    )
