"""Plans, statuses and facts for tests, without a GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from oomproof.memory.terms import DeviceTerms
from oomproof.monitoring.events import MonitorEvent
from oomproof.monitoring.sampler import Sampler, Sources
from oomproof.monitoring.samples import AllocatorFacts, DeviceSample, Sample
from oomproof.monitoring.status import Status, status_of
from oomproof.planning.plan import Plan
from oomproof.session import plan
from oomproof.units import GIB, MIB


def gpu_plan(**options: Any) -> Plan:
    """Of an 8B on one card; its GPU is called GPU-0."""
    made = plan("llama-3.1-8b", gpus="1x RTX 4090", format="nf4-dq", **options)
    return replace(made, devices=tuple(replace(one, uuid="GPU-0") for one in made.devices))


def cpu_plan() -> Plan:
    return plan("tiny", engine="native", format="nf4-dq", gpus=None)


def facts(allocated: int = 5 * GIB, reserved: int = 6 * GIB) -> AllocatorFacts:
    return AllocatorFacts(
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        inactive_split_bytes=16 * MIB,
    )


def sample_of(
    made: Plan,
    measured: DeviceTerms | None = None,
    allocator: AllocatorFacts | None = None,
    *,
    requests: int = 0,
    rss_bytes: int = GIB,
    at: float = 1_000.0,
) -> Sample:
    [device] = made.devices_in_use
    return Sample(
        at=at,
        steps=10 * requests,
        requests=requests,
        rss_bytes=rss_bytes,
        devices=(
            DeviceSample(
                index=device.index,
                measured=measured or replace(device.terms, margin=0),
                allocator=allocator,
            ),
        ),
    )


def status(
    made: Plan | None = None,
    *,
    pid: int | None = None,
    events: tuple[MonitorEvent, ...] = (),
    measured: DeviceTerms | None = None,
    rungs: dict[str, int] | None = None,
) -> Status:
    """Of this process, unless told otherwise."""
    made = made or gpu_plan()
    on_gpu = made.devices_in_use[0].kind == "cuda"
    return status_of(
        made,
        sample_of(made, measured, facts() if on_gpu else None, requests=12, at=time.time()),
        pid=os.getpid() if pid is None else pid,
        started_at=psutil.Process().create_time(),
        peak_rss_bytes=2 * GIB,
        events=events,
        rungs=rungs,
    )


@dataclass
class Machine:
    """What a sampler asks, made up."""

    seconds: float = 0.0
    rss: float = GIB
    terms: dict[int, DeviceTerms] = field(default_factory=dict)
    allocated: float = 5 * GIB
    looks: int = 0
    look_s: float = 0.0
    """How long a look takes."""

    def measured(self) -> Mapping[int, DeviceTerms]:
        self.looks += 1
        self.seconds += self.look_s
        return self.terms

    def sampler(
        self, made: Plan, on_event: Callable[[MonitorEvent], None] | None = None, **options: Any
    ) -> Sampler:
        for device in made.devices_in_use:
            self.terms.setdefault(device.index, replace(device.terms, margin=0))
        return Sampler(
            made,
            self.measured,
            on_event=on_event,
            sources=Sources(
                monotonic=lambda: self.seconds,
                now=lambda: 1_700_000_000 + self.seconds,
                allocator=lambda index: facts(int(self.allocated)),
                rss_bytes=lambda: int(self.rss),
            ),
            **options,
        )
