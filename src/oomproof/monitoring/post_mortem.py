"""A failed allocation explained: what was asked for, by whom, and what held the memory.

`post_mortem` is pure: an error, the plan and what was sampled go in, a Summary comes out. The error
itself is not kept, for its traceback pins tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from oomproof.faults.figures import read_device, read_figures
from oomproof.hardware.usage import GpuProcess, printable
from oomproof.memory.terms import DeviceTerms
from oomproof.monitoring.blocks import BlockFacts
from oomproof.monitoring.samples import AllocatorFacts, Sample
from oomproof.monitoring.spikes import excesses
from oomproof.planning.plan import Plan
from oomproof.units import MIB, format_bytes

KEPT_SAMPLES = 16
"""The last ones, in a summary."""
_MAX_MESSAGE = 2000
_MAX_READ = 16_384
_MAX_FRAMES = 512
_GREW_BYTES = MIB

_PHASES: tuple[tuple[str, str, str, str], ...] = (
    # Module, function ("" for any), phase, term; the first that is in the traceback counts.
    ("oomproof.engine.native.pipeline", "capture", "recording graphs", "graphs"),
    ("oomproof.engine.native.device", "allocate_pools", "taking pools", "kv_cache"),
    ("oomproof.engine.native.kv_pool", "", "taking pools", "kv_cache"),
    ("oomproof.compat.engine", "allocate_caches", "taking pools", "kv_cache"),
    ("oomproof.engine.native.device", "__init__", "loading", "weights"),
    ("oomproof.engine.native.engine", "_prefill", "a prompt", "workspace"),
    ("oomproof.engine.native.engine", "_launch", "decoding", "workspace"),
    ("oomproof.engine.native.engine", "_land", "decoding", "workspace"),
    ("oomproof.compat.engine", "_forward", "running", "workspace"),
    ("oomproof.compat.model", "", "loading", "weights"),
    ("oomproof.loading", "", "loading", "staging"),
    ("oomproof.engine.native.load", "", "loading", "weights"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSummary:
    """A device's plan beside what was measured last."""

    index: int
    name: str
    planned: DeviceTerms
    measured: DeviceTerms | None
    """None where it failed before the first sample."""
    allocator: AllocatorFacts | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What is known of a failed allocation."""

    at: float
    """Seconds since 1970."""
    pid: int
    error: str
    """The error's type."""
    message: str
    """Its words, shortened."""
    phase: str | None
    """What was being done; None where it cannot be told."""
    term: str | None
    """The plan's term that such memory belongs to."""
    device: int | None
    asked_bytes: int | None
    free_bytes: int | None
    """On the device, by the error's words."""
    model: str
    format: str
    engine: str
    context: int
    concurrency: int
    devices: tuple[DeviceSummary, ...]
    blocks: BlockFacts | None
    """Of the device that failed."""
    processes: tuple[GpuProcess, ...]
    """On that device, ours among them."""
    samples: tuple[Sample, ...]
    findings: tuple[str, ...]
    """What follows from all that, in words, the plainest first."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema": 1, **asdict(self)}


def post_mortem(
    error: BaseException,
    plan: Plan,
    samples: Sequence[Sample],
    *,
    at: float = 0.0,
    phase: tuple[str, str] | None = None,
    blocks: BlockFacts | None = None,
    processes: Sequence[GpuProcess] = (),
    pid: int | None = None,
) -> Summary:
    """Says what can be known of a failed allocation.

    Args:
        error: What was raised; read, and not kept.
        plan: What was being executed.
        samples: Oldest first; `Sampler.samples`.
        at: Seconds since 1970.
        phase: (Phase, term) where the caller knows; else they are read from the traceback.
        blocks: Of the device that failed.
        processes: On that device.
        pid: Of the process that failed; None for this one.
    """
    text = str(error)[:_MAX_READ]
    figures = read_figures(text)
    device = device_of(error, plan)
    found_phase, term = phase or phase_of(error.__traceback__) or (None, None)
    last = {one.index: one for one in samples[-1].devices} if samples else {}
    devices = tuple(
        DeviceSummary(
            index=planned.index,
            name=planned.name,
            planned=planned.terms,
            measured=last[planned.index].measured if planned.index in last else None,
            allocator=last[planned.index].allocator if planned.index in last else None,
        )
        for planned in plan.devices_in_use
    )
    pid = os.getpid() if pid is None else pid
    summary = Summary(
        at=at,
        pid=pid,
        error=type(error).__name__,
        message=printable(text[:_MAX_MESSAGE].replace("\n", " ")),
        phase=found_phase,
        term=term,
        device=device,
        asked_bytes=figures.tried_bytes,
        free_bytes=figures.free_bytes,
        model=plan.model,
        format=plan.format,
        engine=plan.engine,
        context=plan.context,
        concurrency=plan.concurrency,
        devices=devices,
        blocks=blocks,
        processes=tuple(processes),
        samples=tuple(samples)[-KEPT_SAMPLES:],
        findings=(),
    )
    return _with_findings(summary, plan)


def device_of(error: BaseException, plan: Plan) -> int | None:
    """The device that an allocation failed on; the only one where the error does not say."""
    found = read_device(str(error)[:_MAX_READ])
    if found is not None:
        return found
    used = plan.devices_in_use
    return used[0].index if len(used) == 1 else None


def phase_of(traceback: TracebackType | None) -> tuple[str, str] | None:
    """(Phase, term) by the functions of a traceback; None where none of them is ours."""
    frames = set(_functions(traceback))
    for module, function, phase, term in _PHASES:
        for found_module, found_function in frames:
            inside = found_module == module or found_module.startswith(f"{module}.")
            if inside and function in ("", found_function):
                return phase, term
    return None


def _functions(traceback: TracebackType | None) -> Iterator[tuple[str, str]]:
    for _ in range(_MAX_FRAMES):
        if traceback is None:
            return
        frame = traceback.tb_frame
        yield str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
        traceback = traceback.tb_next


def _with_findings(summary: Summary, plan: Plan) -> Summary:
    return replace(summary, findings=tuple(_findings(summary, plan)))


def _findings(summary: Summary, plan: Plan) -> Iterator[str]:
    where = "" if summary.device is None else f" on device {summary.device}"
    if summary.asked_bytes is not None:
        free = "" if summary.free_bytes is None else f", {format_bytes(summary.free_bytes)} free"
        yield f"{format_bytes(summary.asked_bytes)} were asked for{free}{where}"
    if summary.phase is not None:
        yield f"it failed in {summary.phase}, which is planned as {summary.term}"
    measured = {one.index: one.measured for one in summary.devices if one.measured is not None}
    over = [excess.message for excess in excesses(plan, measured)]
    yield from over
    if measured and not over:
        yield "no term that was sampled is above its plan"
    if plan.engine == "native" and summary.phase in ("a prompt", "decoding"):
        yield "after loading nothing should be asked for: report this with the JSON beside it"
    others = [one for one in summary.processes if one.pid != summary.pid and one.used_bytes]
    if others:
        held = sum(one.used_bytes or 0 for one in others)
        names = ", ".join(f"{one.pid} {one.name}" for one in others[:4])
        yield f"other processes hold {format_bytes(held)}{where}: {names}"
    yield from _of_allocator(summary)


def _of_allocator(summary: Summary) -> Iterator[str]:
    facts = next((one.allocator for one in summary.devices if one.index == summary.device), None)
    asked = summary.asked_bytes or 0
    if facts is not None and asked and facts.fragmentation_bytes >= asked:
        largest = summary.blocks.largest_free_bytes if summary.blocks else None
        piece = "" if largest is None else f", the largest piece {format_bytes(largest)}"
        yield (
            f"{format_bytes(facts.fragmentation_bytes)} are reserved and in no tensor{piece}: "
            "fragmentation; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        )
    for index in sorted({one.index for sample in summary.samples for one in sample.devices}):
        sizes = [
            one.allocator.allocated_bytes
            for sample in summary.samples
            for one in sample.devices
            if one.index == index and one.allocator is not None
        ]
        if sizes and sizes[-1] - sizes[0] > _GREW_BYTES:
            yield (
                f"tensors' memory on device {index} grew by {format_bytes(sizes[-1] - sizes[0])} "
                f"over the last {len(summary.samples)} samples"
            )
