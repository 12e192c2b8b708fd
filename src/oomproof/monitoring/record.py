"""Summaries of failed allocations, gathered where they happen and kept in oomproof's home.

post-mortems/DATE-PID-NUMBER.txt, .json, and .snapshot.json where memory history was on
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from oomproof.errors import HardwareError
from oomproof.hardware.usage import GpuProcess, watch_gpus
from oomproof.home import home_folder
from oomproof.memory.terms import DeviceTerms
from oomproof.monitoring.blocks import block_facts, has_history, read_snapshot, snapshot_as_json
from oomproof.monitoring.files import write_whole
from oomproof.monitoring.post_mortem import DeviceSummary, Summary, device_of, post_mortem
from oomproof.monitoring.samples import Sample
from oomproof.planning.plan import Plan
from oomproof.units import format_bytes

log = logging.getLogger(__name__)

KEPT = 20
"""Summaries; older ones are removed."""
KEPT_SNAPSHOTS = 3
"""Snapshots, of at most MAX_SNAPSHOT_BYTES each."""
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A summary, and where it was kept."""

    summary: Summary
    file: Path | None
    """The text; its JSON lies beside it. None where nothing could be written."""


def record_out_of_memory(
    error: BaseException,
    plan: Plan,
    samples: Sequence[Sample],
    *,
    phase: tuple[str, str] | None = None,
    folder: Path | None = None,
) -> Record:
    """Gathers what is known of a failed allocation, and keeps it; fails for nothing of its own.

    To be called while the memory is still held, in the handler or just after it; what it returns
    holds neither the error nor a tensor.

    Args:
        error: What was raised.
        plan: What was being executed.
        samples: `Sampler.samples`.
        phase: (Phase, term) where the caller knows.
        folder: Where it is kept; None for oomproof's home.
    """
    device = device_of(error, plan)
    snapshot = read_snapshot()
    summary = post_mortem(
        error,
        plan,
        samples,
        at=time.time(),
        phase=phase,
        blocks=None if snapshot is None or device is None else block_facts(snapshot, device),
        processes=_processes(plan, device),
    )
    traced = snapshot_as_json(snapshot) if snapshot is not None and has_history(snapshot) else None
    try:
        folder = home_folder() / "post-mortems" if folder is None else folder
        file = keep(summary, folder, snapshot=traced)
    except (OSError, RuntimeError) as problem:
        log.warning("the summary of a failed allocation cannot be kept: %s", problem)
        file = None
    return Record(summary=summary, file=file)


def keep(summary: Summary, folder: Path, *, snapshot: bytes | None = None) -> Path:
    """Writes a summary as text and as JSON, and removes the oldest ones.

    Returns:
        The text file.

    Raises:
        OSError: It cannot be written.
    """
    date = datetime.fromtimestamp(summary.at, UTC).strftime("%Y%m%dT%H%M%S%f")
    stem = f"{date}-{os.getpid()}-{next(_numbers)}"
    draft = f".{stem}.tmp"
    data = json.dumps(summary.as_dict(), indent=1).encode()
    text = folder / f"{stem}.txt"
    write_whole(folder / f"{stem}.json", data, temporary=draft)
    write_whole(text, as_text(summary).encode(), temporary=draft)
    if snapshot is not None:
        write_whole(folder / f"{stem}.snapshot.json", snapshot, temporary=draft)
    _make_room(folder)
    return text


def as_text(summary: Summary) -> str:
    """The summary as people read it."""
    return "\n".join(_lines(summary)) + "\n"


def _lines(summary: Summary) -> Iterator[str]:
    when = datetime.fromtimestamp(summary.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield f"out of memory: {summary.model} {summary.format}, {summary.engine} engine, {when}"
    yield f"{summary.context:,} tokens of context, {summary.concurrency} at once"
    yield ""
    yield from (f"- {finding}" for finding in summary.findings)
    for device in summary.devices:
        yield ""
        yield from _of_device(device)
    if summary.blocks is not None:
        yield ""
        yield f"live blocks on device {summary.device}, by size"
        for one in summary.blocks.classes:
            size = f"from {format_bytes(one.at_least_bytes)}"
            yield f"  {size:<18}{one.blocks:>8,} blocks  {format_bytes(one.total_bytes):>12}"
        yield (
            f"  free pieces: {format_bytes(summary.blocks.free_bytes)}, the largest "
            f"{format_bytes(summary.blocks.largest_free_bytes)}"
        )
    if summary.processes:
        yield ""
        yield f"processes on device {summary.device}"
        for process in summary.processes:
            held = "?" if process.used_bytes is None else format_bytes(process.used_bytes)
            ours = "  (this one)" if process.pid == summary.pid else ""
            yield f"  {process.pid:>8}  {process.name:<24}{held:>12}{ours}"
    if summary.samples:
        yield ""
        yield "last samples: requests, steps, resident, then each device's tensors and reserved"
        for sample in summary.samples:
            devices = "".join(
                f"  {one.index}: {format_bytes(one.allocator.allocated_bytes)} / "
                f"{format_bytes(one.allocator.reserved_bytes)}"
                for one in sample.devices
                if one.allocator is not None
            )
            yield (
                f"  {sample.requests:>8,}{sample.steps:>10,}"
                f"{format_bytes(sample.rss_bytes):>12}{devices}"
            )
    yield ""
    yield f"{summary.error}: {summary.message}"


def _of_device(device: DeviceSummary) -> Iterator[str]:
    yield f"device {device.index} {device.name}: planned, measured"
    for name in (field.name for field in fields(DeviceTerms)):
        planned = getattr(device.planned, name)
        found = None if device.measured is None else getattr(device.measured, name)
        if planned or found:
            shown = "–" if found is None or name == "margin" else format_bytes(found)
            yield f"  {name:<14}{format_bytes(planned):>12}{shown:>12}"
    if (facts := device.allocator) is not None:
        yield (
            f"  torch: {format_bytes(facts.allocated_bytes)} in tensors, "
            f"{format_bytes(facts.reserved_bytes)} reserved, "
            f"{format_bytes(facts.fragmentation_bytes)} in none, "
            f"{format_bytes(facts.inactive_split_bytes)} in split blocks, "
            f"{facts.num_alloc_retries} retries"
        )


def _processes(plan: Plan, device: int | None) -> tuple[GpuProcess, ...]:
    """On a device of the plan; none where the driver does not tell."""
    uuid = next((one.uuid for one in plan.devices_in_use if one.index == device), None)
    if uuid is None:
        return ()
    try:
        with watch_gpus() as read:
            return next((gpu.processes for gpu in read() if gpu.uuid == uuid), ())
    except HardwareError as problem:
        log.warning("who else uses the GPU cannot be told: %s", problem)
        return ()


def _make_room(folder: Path) -> None:
    """Names begin with the time, so that the oldest is the first."""
    texts = sorted(folder.glob("*-*-*.txt"))
    for text in texts[:-KEPT]:
        for suffix in (".txt", ".json", ".snapshot.json"):
            with suppress(OSError):
                text.with_suffix(suffix).unlink(missing_ok=True)
    for snapshot in sorted(folder.glob("*.snapshot.json"))[:-KEPT_SNAPSHOTS]:
        with suppress(OSError):
            snapshot.unlink(missing_ok=True)
