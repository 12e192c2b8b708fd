"""torch's memory snapshot: its live blocks by size, and the whole of it as JSON of our own.

torch keeps snapshots as pickles; these are plain numbers and names, bounded in size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oomproof.units import MIB

MAX_SNAPSHOT_BYTES = 16 * MIB
"""Of the JSON; what is left out of it is counted in it."""
_MAX_CLASSES = 12
_MAX_BLOCKS = 20_000
_MAX_EVENTS = 20_000
_MAX_FRAMES = 16
_MAX_NAME = 300
_LIVE = "active_allocated"
_FREE = "inactive"

Raw = Mapping[str, Any]
"""What `torch.cuda.memory._snapshot()` returns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeClass:
    """Live blocks of at least this size and less than twice of it."""

    at_least_bytes: int
    """A power of two."""
    blocks: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFacts:
    """The allocator's blocks on one GPU."""

    classes: tuple[SizeClass, ...]
    """Those that hold most, first."""
    largest_free_bytes: int
    """The largest piece that is reserved and free."""
    free_bytes: int
    """All of them."""


def read_snapshot() -> Raw | None:
    """The allocator's snapshot now; None where this process has no CUDA in use, or lost it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        snapshot: Raw = torch.cuda.memory._snapshot()  # noqa: SLF001 - documented under this name
    except RuntimeError:  # after a fatal error every call fails, and the summary goes without
        return None
    return snapshot


def has_history(snapshot: Raw) -> bool:
    """Whether memory history was on (`torch.cuda.memory._record_memory_history`)."""
    return any(snapshot.get("device_traces") or ())


def block_facts(snapshot: Raw, device: int) -> BlockFacts:
    """Live blocks by size class, and the free ones."""
    classes: dict[int, tuple[int, int]] = {}
    free: list[int] = [0]
    for segment in snapshot.get("segments") or ():
        if segment.get("device", device) != device:
            continue
        for block in segment.get("blocks") or ():
            size = int(block.get("size", 0))
            if block.get("state") == _FREE:
                free.append(size)
            elif size > 0:
                power = 1 << (size.bit_length() - 1)
                count, total = classes.get(power, (0, 0))
                classes[power] = count + 1, total + size
    largest = sorted(classes.items(), key=lambda item: -item[1][1])[:_MAX_CLASSES]
    return BlockFacts(
        classes=tuple(
            SizeClass(at_least_bytes=power, blocks=count, total_bytes=total)
            for power, (count, total) in largest
        ),
        largest_free_bytes=max(free),
        free_bytes=sum(free),
    )


def snapshot_as_json(snapshot: Raw, most_bytes: int = MAX_SNAPSHOT_BYTES) -> bytes:
    """The snapshot as JSON: segments with their blocks, the last events, stacks stored once.

    The largest segments and the newest events come first in what is kept; `left_out` counts the
    rest. A block is [size, requested size, state, stack], an event [action, size, address, device,
    stack], a stack a list of frames, a frame [file, line, function]; stacks and frames are numbers
    of entries in `stacks` and `frames`, -1 for none.
    """
    blocks, events = _MAX_BLOCKS, _MAX_EVENTS
    while True:
        data = json.dumps(_plain(snapshot, blocks, events), separators=(",", ":")).encode()
        if len(data) <= most_bytes or not blocks + events:
            return data
        blocks, events = blocks // 2, events // 2


def _plain(snapshot: Raw, most_blocks: int, most_events: int) -> dict[str, Any]:
    stacks = _Stacks()
    segments = []
    kept = all_blocks = 0
    found = snapshot.get("segments") or ()
    for segment in sorted(found, key=lambda one: -int(one.get("total_size", 0))):
        blocks = segment.get("blocks") or ()
        all_blocks += len(blocks)
        if kept + len(blocks) > most_blocks:
            continue
        kept += len(blocks)
        segments.append(
            {
                "device": int(segment.get("device", 0)),
                "address": int(segment.get("address", 0)),
                "total_size": int(segment.get("total_size", 0)),
                "allocated_size": int(segment.get("allocated_size", 0)),
                "type": _name(segment.get("segment_type")),
                "stream": int(segment.get("stream", 0)),
                "pool": [int(part) for part in segment.get("segment_pool_id") or ()],
                "blocks": [
                    [
                        int(block.get("size", 0)),
                        int(block.get("requested_size", 0)),
                        _name(block.get("state")),
                        stacks.number(block.get("frames") or ()),
                    ]
                    for block in blocks
                ],
            }
        )
    traces = snapshot.get("device_traces") or ()
    events = []
    for device, trace in enumerate(traces):
        share = most_events // len(traces)
        events += [
            [
                _name(entry.get("action")),
                int(entry.get("size", 0)),
                int(entry.get("addr", 0)),
                device,
                stacks.number(entry.get("frames") or ()),
            ]
            for entry in (trace[-share:] if share else ())
        ]
    return {
        "schema": 1,
        "segments": segments,
        "events": events,
        "stacks": stacks.stacks,
        "frames": stacks.frames,
        "left_out": {
            "blocks": all_blocks - kept,
            "events": sum(len(trace) for trace in traces) - len(events),
        },
    }


class _Stacks:
    """Stacks and frames, each stored once."""

    def __init__(self) -> None:
        self.frames: list[tuple[str, int, str]] = []
        self.stacks: list[tuple[int, ...]] = []
        self._frame_numbers: dict[tuple[str, int, str], int] = {}
        self._stack_numbers: dict[tuple[int, ...], int] = {}

    def number(self, frames: Sequence[Mapping[str, Any]]) -> int:
        stack = tuple(self._numbers(frames[:_MAX_FRAMES]))
        if not stack:
            return -1
        if stack not in self._stack_numbers:
            self._stack_numbers[stack] = len(self.stacks)
            self.stacks.append(stack)
        return self._stack_numbers[stack]

    def _numbers(self, frames: Iterable[Mapping[str, Any]]) -> Iterable[int]:
        for found in frames:
            frame = (
                _name(found.get("filename")),
                int(found.get("line", 0)),
                _name(found.get("name")),
            )
            if frame not in self._frame_numbers:
                self._frame_numbers[frame] = len(self.frames)
                self.frames.append(frame)
            yield self._frame_numbers[frame]


def _name(value: object) -> str:
    return "" if value is None else str(value)[:_MAX_NAME]
