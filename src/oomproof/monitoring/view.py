"""What `oomproof top` shows: the machine's devices, and the oomproof engines that run on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from oomproof.hardware.usage import GpuUsage, HostUsage, read_host, watch_gpus
from oomproof.monitoring.status import Status
from oomproof.monitoring.status_files import Running, read_running, status_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineView:
    """A running engine now."""

    status: Status
    """As it last told."""
    rss_bytes: int
    """Of its process now."""
    age_s: float
    """Since it last told; it tells at most once a second, and not while it is idle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One look at the machine."""

    at: float
    """Seconds since 1970."""
    host: HostUsage
    gpus: tuple[GpuUsage, ...]
    """Empty where there is none, and engines run on the processor."""
    engines: tuple[EngineView, ...]
    unreadable: tuple[str, ...]
    """Status files that could not be read, with the reason."""

    @property
    def pids(self) -> frozenset[int]:
        """Processes that are oomproof's."""
        return frozenset(engine.status.pid for engine in self.engines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `top --json`."""
        host = {**asdict(self.host), "used_bytes": self.host.used_bytes}
        return {
            "schema": 1,
            "at": self.at,
            "host": host,
            "devices": [self._gpu(gpu) for gpu in self.gpus] or [self._cpu()],
            "running": [
                {
                    **engine.status.as_dict(),
                    "rss_bytes": engine.rss_bytes,
                    "age_s": round(engine.age_s, 3),
                }
                for engine in self.engines
            ],
            "unreadable": list(self.unreadable),
        }

    def _gpu(self, gpu: GpuUsage) -> dict[str, Any]:
        plain = {"kind": "cuda", **asdict(gpu), "free_bytes": gpu.free_bytes}
        for process in plain["processes"]:
            process["is_oomproof"] = process["pid"] in self.pids
        return plain

    def _cpu(self) -> dict[str, Any]:
        return {
            "kind": "cpu",
            "index": 0,
            "name": "cpu",
            "uuid": None,
            "total_bytes": self.host.total_bytes,
            "used_bytes": self.host.used_bytes,
            "free_bytes": self.host.available_bytes,
            "processes": [
                {
                    "pid": engine.status.pid,
                    "name": "oomproof",
                    "used_bytes": engine.rss_bytes,
                    "is_oomproof": True,
                }
                for engine in self.engines
            ],
        }


Look = Callable[[], View]


@contextmanager
def watch_machine(
    *, nvml: ModuleType | Any | None = None, folder: Path | None = None
) -> Iterator[Look]:
    """Yields what looks at the machine, as often as it is called.

    Args:
        nvml: The module `pynvml` or its like; imported where it is None.
        folder: Where engines are published; None for oomproof's home.

    Raises:
        HardwareError: NVML reports a fault.
    """
    if folder is None:
        try:
            folder = status_folder()
        except RuntimeError:  # a user without a home has no engines published either
            folder = None
    with watch_gpus(nvml) as read_gpus:

        def look() -> View:
            running = read_running(folder) if folder else Running(statuses=(), unreadable=())
            now = time.time()
            return View(
                at=now,
                host=read_host(),
                gpus=read_gpus(),
                engines=tuple(
                    EngineView(
                        status=status,
                        rss_bytes=_rss_bytes(status),
                        age_s=max(0.0, now - status.written_at),
                    )
                    for status in running.statuses
                ),
                unreadable=running.unreadable,
            )

        yield look


def _rss_bytes(status: Status) -> int:
    try:
        return int(psutil.Process(status.pid).memory_info().rss)
    except (psutil.Error, OSError):  # it ended just now, or is another user's
        return status.rss_bytes
