"""Layers that stay in pinned host memory and are streamed to their device in every step.

A device that cannot hold its range keeps the last of its layers in host memory and two buffers,
each as large as the largest of them: one layer computes while the next one travels. The step is
then as slow as the link: that is the price. The KV cache stays on the device. Along an order of the
devices the split is exact; of the orders, the first MAX_ORDERS distinct ones are tried, those with
the fastest link and the most memory first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from math import inf
from operator import add

from oomproof.memory.model import RangeMaximum
from oomproof.planning.placement import Slot, group
from oomproof.planning.speed import host_link_bytes_per_s

MAX_ORDERS = 12
"""Device orders that are tried where the devices differ."""
_BUFFERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedPlacement:
    """A range of units for each device, and the units of it that stay in host memory."""

    ranges: Mapping[int, tuple[int, int]]
    """Device index → (first unit, end unit), in order along the model."""
    streamed: Mapping[int, tuple[int, int]]
    """Device index → (first, end) of its units in host memory; absent where it has none."""
    resident_bytes: Mapping[int, int]
    """Device index → weight bytes on the device: resident units and streaming buffers."""
    streamed_bytes: int
    """Weight bytes in host memory."""
    rounding_bytes: int
    """What page-locked memory for them takes beyond that: torch's allocator hands out powers of
    two (ATen/core/CachingHostAllocator.h)."""
    streaming_s: float
    """What waiting for them adds to a decode step."""


def place_streaming(slots: Sequence[Slot]) -> StreamedPlacement | None:
    """The fastest placement that fits with layers in host memory; None where none does."""
    preferred = sorted(
        slots, key=lambda slot: (-host_link_bytes_per_s(slot.device), -slot.usable_bytes)
    )
    kinds = {slots_of_kind[0].kind: _Kind(slots_of_kind[0]) for slots_of_kind in group(slots)}
    best: tuple[float, list[tuple[Slot, int, int]]] | None = None
    for order in islice(_distinct_orders(group(preferred)), MAX_ORDERS):
        found = _split(order, kinds)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return None if best is None else _placement(best[1], kinds)


def _distinct_orders(groups: Sequence[Sequence[Slot]]) -> Iterator[list[Slot]]:
    """Every order of the devices that differs in kind from the ones before it."""
    if not any(groups):
        yield []
    for position, members in enumerate(groups):
        if members:
            rest = [*groups[:position], members[1:], *groups[position + 1 :]]
            for order in _distinct_orders(rest):
                yield [members[0], *order]


class _Kind:
    """How devices of one kind hold each range, streaming what they must."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self.model = model = slot.model
        self._link = host_link_bytes_per_s(slot.device)
        unit_s = slot.unit_seconds or (0.0,) * model.num_units
        unit_bytes = [model.streamable_bytes(unit, unit + 1) for unit in range(model.num_units)]
        self._streamable = [0, *accumulate(unit_bytes)]
        self._largest = RangeMaximum(unit_bytes)
        self._seconds = [0.0, *accumulate(unit_s)]
        waits = (
            max(0.0, size / self._link - seconds)
            for size, seconds in zip(unit_bytes, unit_s, strict=True)
        )
        self._waits = [0.0, *accumulate(waits)]
        ways = [self._hold_from(first) for first in range(model.num_units)]
        self.counts = [[count for count, _ in row] for row in ways]
        """[first][end - first - 1] → how many layers of the range are streamed."""
        self.seconds = [[seconds for _, seconds in row] for row in ways]
        """[first][end - first - 1] → time of a decode step there; inf where it cannot be held."""

    def streamed_units(self, end: int, count: int) -> tuple[int, int]:
        """The last `count` decoder layers before `end`, as units."""
        last = min(end, self.model.num_units - 1)
        return last - count, last

    def buffers_bytes(self, first: int, end: int) -> int:
        """Two buffers for the largest layer of a range."""
        return _BUFFERS * self._largest(max(first, 1), min(end, self.model.num_units - 1))

    def _hold_from(self, first: int) -> list[tuple[int, float]]:
        """(layers streamed, seconds) of each range from `first`, growing."""
        model, usable_bytes = self.model, self._slot.usable_bytes
        weights, last_unit = self._streamable, model.num_units - 1
        first_layer = max(first, 1)
        ways = []
        for end, peak in enumerate(model.peaks_from(first), first + 1):
            seconds = self._seconds[end] - self._seconds[first]
            if peak <= usable_bytes:
                ways.append((0, seconds))
                continue
            end_layer = min(end, last_unit)
            if end_layer <= first_layer:
                ways.append((0, inf))
                continue
            excess = peak - usable_bytes + self.buffers_bytes(first, end)
            # The last layer from which on enough is away.
            start = bisect_right(weights, weights[end_layer] - excess, hi=end_layer + 1) - 1
            if start < first_layer:
                ways.append((0, inf))
                continue
            count = end_layer - start
            ways.append((count, seconds + self.waiting_s(end, count)))
        return ways

    def waiting_s(self, end: int, count: int) -> float:
        """What a step waits for streamed layers beyond the time that they compute."""
        start, stop = self.streamed_units(end, count)
        return self._waits[stop] - self._waits[start]


def _split(
    order: Sequence[Slot], kinds: Mapping[tuple[object, ...], _Kind]
) -> tuple[float, list[tuple[Slot, int, int]]] | None:
    """The fastest split along an order, any device of which may stay empty."""
    num_units = order[0].model.num_units
    times = [inf] * num_units + [0.0]
    choices: list[list[int]] = []
    for slot in reversed(order):
        best, chosen = list(times), list(range(num_units + 1))
        for first, seconds in enumerate(kinds[slot.kind].seconds):
            totals = list(map(add, seconds, islice(times, first + 1, None)))
            least = min(totals)
            if least < best[first]:
                best[first], chosen[first] = least, first + 1 + totals.index(least)
        times = best
        choices.append(chosen)
    if times[0] == inf:
        return None
    parts = []
    first = 0
    for slot, chosen in zip(order, reversed(choices), strict=True):
        if chosen[first] > first:
            parts.append((slot, first, chosen[first]))
        first = chosen[first]
    return times[0], parts


def _placement(
    parts: Sequence[tuple[Slot, int, int]], kinds: Mapping[tuple[object, ...], _Kind]
) -> StreamedPlacement:
    ranges, streamed, resident = {}, {}, {}
    streamed_bytes, rounding_bytes, streaming_s = 0, 0, 0.0
    for slot, first, end in parts:
        index, kind = slot.device.index, kinds[slot.kind]
        count = kind.counts[first][end - first - 1]
        ranges[index] = (first, end)
        resident[index] = kind.model.weights_bytes(first, end)
        if count:
            streamed[index] = kind.streamed_units(end, count)
            away = kind.model.streamable_bytes(*streamed[index])
            resident[index] += kind.buffers_bytes(first, end) - away
            streamed_bytes += away
            rounding_bytes += sum(
                _power_of_two(size) - size
                for size in (
                    kind.model.streamable_bytes(unit, unit + 1) for unit in range(*streamed[index])
                )
            )
            streaming_s += kind.waiting_s(end, count)
    return StreamedPlacement(
        ranges=ranges,
        streamed=streamed,
        resident_bytes=resident,
        streamed_bytes=streamed_bytes,
        rounding_bytes=rounding_bytes,
        streaming_s=streaming_s,
    )


def _power_of_two(size_bytes: int) -> int:
    """The smallest one that is not below a size."""
    return 1 << max(0, size_bytes - 1).bit_length()
