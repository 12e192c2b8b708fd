"""Who uses the machine's memory now: every GPU with its processes, and the host's RAM.

Unlike the probe, this reads all GPUs that NVML shows, whatever CUDA_VISIBLE_DEVICES says, and again
and again over one open session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from oomproof.hardware.cgroup import memory_limit
from oomproof.hardware.nvidia import read_memory
from oomproof.hardware.nvml import as_text, nvml_session, where_supported

MAX_PROCESSES = 64
"""Of one GPU, the largest first."""
_MAX_NAME = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    """"?" where this user, or this container, may not know it."""
    used_bytes: int | None
    """None where the driver does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuUsage:
    """One GPU's memory now."""

    index: int
    """NVML's, over all GPUs of the machine."""
    name: str
    uuid: str
    total_bytes: int
    used_bytes: int
    """By all processes, and by the driver itself."""
    processes: tuple[GpuProcess, ...]

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return max(0, self.total_bytes - self.used_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostUsage:
    """RAM now, as this process may use it."""

    total_bytes: int
    """Of the machine, or what its cgroup allows."""
    available_bytes: int
    """That can still be taken without swapping, cgroup-aware."""
    limit: str
    """Where total_bytes comes from: "physical", "cgroup v1" or "cgroup v2"."""

    @property
    def used_bytes(self) -> int:
        """What cannot be taken any more."""
        return max(0, self.total_bytes - self.available_bytes)


ReadGpus = Callable[[], tuple[GpuUsage, ...]]


@contextmanager
def watch_gpus(nvml: ModuleType | Any | None = None) -> Iterator[ReadGpus]:
    """Yields what reads all GPUs, as often as it is called; none where there is no driver.

    Args:
        nvml: The module `pynvml` or its like; imported here where it is None.

    Raises:
        HardwareError: NVML reports a fault, also while reading.
    """
    if nvml is None:
        import pynvml

        nvml = pynvml
    with nvml_session(nvml) as is_open:
        count = nvml.nvmlDeviceGetCount() if is_open else 0
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        facts = [
            (as_text(nvml.nvmlDeviceGetName(handle)), as_text(nvml.nvmlDeviceGetUUID(handle)))
            for handle in handles
        ]

        def read() -> tuple[GpuUsage, ...]:
            return tuple(
                _usage(nvml, handle, index, name=name, uuid=uuid)
                for index, (handle, (name, uuid)) in enumerate(zip(handles, facts, strict=True))
            )

        yield read


def read_host(*, root: Path = Path("/")) -> HostUsage:
    """RAM now.

    Args:
        root: Where the file system starts; tests pass a folder.
    """
    import psutil

    memory = psutil.virtual_memory()
    limit = memory_limit(memory.total, root=root)
    if limit is None:
        return HostUsage(
            total_bytes=memory.total, available_bytes=memory.available, limit="physical"
        )
    return HostUsage(
        total_bytes=limit.limit_bytes,
        available_bytes=min(memory.available, limit.headroom_bytes),
        limit=limit.source,
    )


def process_name(pid: int) -> str:
    """A process's name, "?" where it cannot be told; without control characters."""
    import psutil

    try:
        name: str = psutil.Process(pid).name()
    except (psutil.Error, OSError, ValueError, OverflowError):
        return "?"
    return printable(name)[:_MAX_NAME] or "?"


def printable(text: str) -> str:
    """A text that others chose, without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _usage(nvml: ModuleType | Any, handle: object, index: int, *, name: str, uuid: str) -> GpuUsage:
    memory = read_memory(nvml, handle)
    if memory is None:  # it works in the host's RAM
        host = read_host()
        memory = host.total_bytes, host.available_bytes
    total, free = memory
    return GpuUsage(
        index=index,
        name=printable(name),
        uuid=uuid,
        total_bytes=total,
        used_bytes=max(0, total - free),
        processes=_processes(nvml, handle),
    )


def _processes(nvml: ModuleType | Any, handle: object) -> tuple[GpuProcess, ...]:
    """Those that compute and those that draw; a process may do both."""
    used: dict[int, int | None] = {}
    # A fault here must not hide how much memory is used: other users' processes may be secret.
    secret = (nvml.NVML_ERROR_NO_PERMISSION, nvml.NVML_ERROR_UNKNOWN)
    for question in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        for found in where_supported(nvml, partial(question, handle), also=secret) or ():
            size = found.usedGpuMemory
            known = used.get(found.pid)
            used[found.pid] = known if size is None else max(int(size), known or 0)
    largest = sorted(used.items(), key=lambda item: (-(item[1] or 0), item[0]))[:MAX_PROCESSES]
    return tuple(
        GpuProcess(pid=pid, name=process_name(pid), used_bytes=size) for pid, size in largest
    )
