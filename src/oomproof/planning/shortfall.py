"""The placement that misses by the fewest bytes, where nothing fits.

Exact over every set and every order of the devices. A device may be overfull by what its range
needs beyond its usable bytes; dynamic programming over (devices used, unit reached) finds the
least sum. What cannot beat a placement already found is cut off by a bound: from a unit on, at
least what all remaining devices lack together will be missing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import islice
from operator import add

from oomproof.memory.model import MemoryModel
from oomproof.planning.placement import Counts, Placement, Slot, group, in_order, one_more

_INFINITE = 2**62


def least_shortfall(slots: Sequence[Slot]) -> Placement:
    """The placement with the least sum of missing bytes.

    Along its order of devices, among equal sums, the one whose worst device misses least is taken,
    so that what is missing shows spread over the devices.
    """
    groups = group(slots)
    if len(groups) == 1:
        return _split(slots)
    largest_first = sorted(slots, key=lambda slot: -slot.usable_bytes)
    found = _split(largest_first)
    order = _better_order(groups, found.shortfall_bytes)
    return found if order is None else _split(order)


def _better_order(groups: Sequence[Sequence[Slot]], bound_bytes: int) -> list[Slot] | None:
    """The order that misses by the fewest bytes, None where none misses by less than the bound."""
    num_units = groups[0][0].model.num_units
    needed = _needed(groups)
    kinds = [_Kind(slots[0], needed) for slots in groups]
    sizes = [len(slots) for slots in groups]
    best_bytes, best_end = bound_bytes, None
    frontier: dict[Counts, list[int]] = {(0,) * len(groups): [0, *([_INFINITE] * num_units)]}
    came_from: dict[tuple[Counts, int], tuple[int, int]] = {}
    for _ in range(sum(sizes)):
        extended: dict[Counts, list[int]] = {}
        for used, missing in frontier.items():
            for position, counts in one_more(used, groups):
                kind = kinds[position]
                left = [size - count for size, count in zip(sizes, counts, strict=True)]
                capacity = sum(map(_times, (each.capacity_bytes for each in kinds), left))
                found = extended.setdefault(counts, [_INFINITE] * (num_units + 1))
                for first, so_far in enumerate(missing[:-1]):
                    if so_far >= best_bytes:
                        continue
                    for end, total in kind.ends(first, so_far, best_bytes, capacity):
                        if total < found[end]:
                            found[end] = total
                            came_from[counts, end] = (position, first)
        for counts, missing in extended.items():
            if missing[-1] < best_bytes:
                best_bytes, best_end = missing[-1], counts
        frontier = {c: missing for c, missing in extended.items() if min(missing) < best_bytes}
    return None if best_end is None else _trace(came_from, best_end, num_units, groups)


def _needed(groups: Sequence[Sequence[Slot]]) -> list[int]:
    """For each position, what the devices that hold the units from there on need at least.

    That is the units' weights and cache, which no device can save, and what the head's device needs
    for the logits. A device without a layer needs less scratch than `_capacity_bytes` takes off;
    behind the first device that can only be the last one, with norm and head alone: then the rest
    of its memory serves nobody, so little is spared but on a device smaller than the head.
    """
    least_capacity = min(_capacity_bytes(slots[0]) for slots in groups)
    bounds = []
    for model in (slots[0].model for slots in groups):
        least, most = _layer_linears(model)
        logits = 0
        if not model.spec.tie_word_embeddings:
            logits = min(
                model.overhead_bytes(linear, has_head=True) - model.overhead_bytes(linear)
                for linear in (0, least, most)
            )
        spared = model.overhead_bytes(least) - model.overhead_bytes(0)
        head_bytes = model.weights_bytes(model.num_units - 1) + logits
        spared_behind = min(spared, max(0, head_bytes - least_capacity))
        bounds.append(
            [
                model.weights_bytes(first)
                + model.kv_bytes(first)
                + logits
                - (spared_behind if first else 2 * spared)
                for first in range(model.num_units)
            ]
        )
    return [*map(min, *bounds), 0] if len(bounds) > 1 else [*bounds[0], 0]


def _capacity_bytes(slot: Slot) -> int:
    """The most weights and cache that a device with a layer holds without missing anything."""
    overhead = slot.model.overhead_bytes(_layer_linears(slot.model)[0])
    return max(0, slot.usable_bytes - overhead)


def _layer_linears(model: MemoryModel) -> tuple[int, int]:
    """Elements of the smallest and the largest of the layers' largest weights."""
    linears = model.costs.largest_linear[1:-1]
    return min(linears), max(linears)


def _times(value: int, count: int) -> int:
    return value * count


def _trace(
    came_from: Mapping[tuple[Counts, int], tuple[int, int]],
    counts: Counts,
    end: int,
    groups: Sequence[Sequence[Slot]],
) -> list[Slot]:
    kinds: list[int] = []
    while end > 0:
        position, end = came_from[counts, end]
        kinds.append(position)
        counts = tuple(count - (i == position) for i, count in enumerate(counts))
    return in_order(kinds[::-1], groups)


class _Kind:
    """What ranges need beyond the memory of devices of one kind."""

    def __init__(self, slot: Slot, needed: Sequence[int]) -> None:
        self._num_units = slot.model.num_units
        self._excess = [_excess(slot, first) for first in range(self._num_units)]
        self._needed = needed
        self.capacity_bytes = _capacity_bytes(slot)

    def ends(
        self, first: int, so_far: int, bound_bytes: int, capacity_bytes: int
    ) -> list[tuple[int, int]]:
        """(end, missing bytes up to there) of the ranges from `first` that may beat the bound.

        Args:
            first: First unit of the range.
            so_far: Bytes missing before it.
            bound_bytes: Totals from here on are of no use.
            capacity_bytes: What the devices that are left can hold together.
        """
        excess = self._excess[first]
        last = first + bisect_left(excess, bound_bytes - so_far)
        # From its end on, at least the needed bytes less the capacity will be missing.
        too_much = -(bound_bytes - so_far + capacity_bytes)
        earliest = bisect_right(self._needed, too_much, hi=self._num_units, key=_negated)
        start = max(first, earliest - 1)
        stop = min(last, self._num_units) + 1
        room = bound_bytes - so_far + capacity_bytes
        return [
            (end, so_far + over)
            for end, over, needed in zip(
                range(start + 1, stop),
                islice(excess, start - first, None),
                islice(self._needed, start + 1, None),
                strict=False,
            )
            if over + needed < room
        ]


def _negated(value: int) -> int:
    return -value


def _split(order: Sequence[Slot]) -> Placement:
    """The fewest bytes missing along one order of the devices, any of which may stay empty."""
    num_units = order[0].model.num_units
    # missing[u], worst[u]: sum and largest of what is missing when the devices from here on hold
    # units u … end.
    missing = [_INFINITE] * num_units + [0]
    worst = [0] * (num_units + 1)
    choices: list[list[int]] = []
    excesses: dict[tuple[object, ...], list[list[int]]] = {}
    for slot in reversed(order):
        if slot.kind not in excesses:
            excesses[slot.kind] = [_excess(slot, first) for first in range(num_units)]
        # A device may stay empty: then the next one goes on from the same unit.
        chosen = list(range(num_units + 1))
        best, best_worst = list(missing), list(worst)
        for first, excess in enumerate(excesses[slot.kind]):
            totals = list(map(add, excess, islice(missing, first + 1, None)))
            least = min(totals)
            if least > best[first]:
                continue
            for end, total in enumerate(totals, first + 1):
                if total != least:
                    continue
                largest = max(excess[end - first - 1], worst[end])
                if least < best[first] or largest < best_worst[first]:
                    best[first], best_worst[first], chosen[first] = least, largest, end
        missing, worst = best, best_worst
        choices.append(chosen)
    ranges: dict[int, tuple[int, int]] = {}
    first = 0
    for slot, chosen in zip(order, reversed(choices), strict=True):
        if chosen[first] > first:
            ranges[slot.device.index] = (first, chosen[first])
        first = chosen[first]
    return Placement(ranges=ranges, shortfall_bytes=missing[0])


def _excess(slot: Slot, first: int) -> list[int]:
    """Bytes that the ranges from `first`, growing, need beyond what the device has."""
    usable_bytes = slot.usable_bytes
    return [max(0, peak - usable_bytes) for peak in slot.model.peaks_from(first)]
