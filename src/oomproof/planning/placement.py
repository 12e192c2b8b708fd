"""Which contiguous range of a model's units each device holds.

Feasibility is exact for every order of the devices: a range's peak never falls when the range
grows, so whatever a set of devices can hold, it can hold with each device filled to its limit, and
the furthest unit a set reaches is the best start for the next device. Among placements that fit,
the fewest devices win (one request uses one device at a time, so a further device adds a hop and
no speed), then the least predicted time, then the most room left on the fullest device.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import add

from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.model import MemoryModel

MAX_ORDERS = 24
"""Device orders that are compared where nothing fits, or for speed; feasibility tries all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A device as placement sees it."""

    device: DeviceSpec
    usable_bytes: int
    model: MemoryModel
    """The memory model under this device's engine profile."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Devices of equal kind are interchangeable."""
        return (
            self.usable_bytes,
            self.device.bandwidth_bytes_per_s,
            self.device.flops_per_s,
            self.device.compute_capability,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A range of units for each device."""

    ranges: Mapping[int, tuple[int, int]]
    """Device index → (first unit, end unit), in order along the model; absent where unused."""
    shortfall_bytes: int
    """Sum over devices of what is missing, 0 where the placement fits."""

    @property
    def fits(self) -> bool:
        """Whether every device holds its range."""
        return self.shortfall_bytes == 0


def place(slots: Sequence[Slot]) -> Placement:
    """The best placement over these devices, or the one that misses by the fewest bytes."""
    orders = _feasible_orders(slots)
    if not orders:
        return _least_shortfall(slots)
    placements = [_balance(order) for order in orders]
    return min(placements, key=lambda found: _preference(found, slots))


def can_place(slots: Sequence[Slot]) -> bool:
    """Whether any placement over these devices fits."""
    return bool(_feasible_orders(slots))


def reach(slot: Slot, first: int, room: int = 0) -> int:
    """The unit after the last one the device holds, filled from `first` with `room` bytes left."""
    budget = slot.usable_bytes - room
    num_units = slot.model.num_units
    peaks = slot.model.peaks_from(first)
    # Alone, a device needs no buffers for neighbours: the one case where a longer range is less.
    if first == 0 and peaks[-1] <= budget:
        return num_units
    return first + bisect_right(peaks, budget, hi=len(peaks) - (first == 0))


def _feasible_orders(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Orders of the smallest sets of devices that hold the whole model."""
    num_units = slots[0].model.num_units
    groups = _groups(slots)
    # How many devices of each kind are used → the best order of them found, and its reach.
    frontier: dict[tuple[int, ...], tuple[int, list[Slot]]] = {(0,) * len(groups): (0, [])}
    for _ in range(len(slots)):
        extended: dict[tuple[int, ...], tuple[int, list[Slot]]] = {}
        complete: list[list[Slot]] = []
        for used, (first, order) in frontier.items():
            for group_index, group in enumerate(groups):
                if used[group_index] == len(group):
                    continue
                slot = group[used[group_index]]
                end = reach(slot, first)
                key = tuple(n + (i == group_index) for i, n in enumerate(used))
                if end == num_units:
                    complete.append([*order, slot])
                elif end > extended.get(key, (-1, []))[0]:
                    extended[key] = (end, [*order, slot])
        if complete:
            return complete[:MAX_ORDERS]
        frontier = extended
    return []


def _balance(order: Sequence[Slot]) -> Placement:
    """The split along this order that leaves the most room on the fullest device."""
    low, high = 0, max(slot.usable_bytes for slot in order)
    best = _fill(order, 0)
    assert best is not None
    while high - low > 2**20:
        room = (low + high) // 2
        found = _fill(order, room)
        if found is None:
            high = room
        else:
            low, best = room, found
    return Placement(ranges=best, shortfall_bytes=0)


def _fill(order: Sequence[Slot], room: int) -> dict[int, tuple[int, int]] | None:
    """Fills each device in turn, leaving `room` bytes on it; None where units are left over."""
    ranges: dict[int, tuple[int, int]] = {}
    first = 0
    for slot in order:
        end = reach(slot, first, room)
        if end == first:
            return None
        ranges[slot.device.index] = (first, end)
        first = end
    return ranges if first == order[0].model.num_units else None


def _preference(placement: Placement, slots: Sequence[Slot]) -> tuple[float, float, int]:
    by_index = {slot.device.index: slot for slot in slots}
    seconds = 0.0
    room = []
    for index, (first, end) in placement.ranges.items():
        slot = by_index[index]
        bandwidth = slot.device.bandwidth_bytes_per_s or 1e12
        seconds += slot.model.traffic_bytes(first, end) / bandwidth
        room.append(slot.usable_bytes - slot.model.terms(first, end).peak_bytes)
    return (round(seconds, 6), -min(room), min(placement.ranges))


def _least_shortfall(slots: Sequence[Slot]) -> Placement:
    """The placement that misses by the fewest bytes, over up to MAX_ORDERS distinct orders."""
    orders = islice(_distinct_orders(_groups(slots)), MAX_ORDERS)
    return min(map(_least_shortfall_in_order, orders), key=lambda found: found.shortfall_bytes)


def _groups(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Interchangeable devices together."""
    kinds: dict[tuple[object, ...], list[Slot]] = {}
    for slot in slots:
        kinds.setdefault(slot.kind, []).append(slot)
    return list(kinds.values())


def _distinct_orders(groups: Sequence[Sequence[Slot]]) -> Iterator[list[Slot]]:
    """Every order of the devices that differs in kind from the ones before it."""
    if not any(groups):
        yield []
    for position, group in enumerate(groups):
        if group:
            rest = [*groups[:position], group[1:], *groups[position + 1 :]]
            for order in _distinct_orders(rest):
                yield [group[0], *order]


def _least_shortfall_in_order(order: Sequence[Slot]) -> Placement:
    """Dynamic programming over (device, first unit): the fewest bytes missing from there on.

    Among equal sums the one whose worst device misses least is taken, so that what is missing
    shows spread over the devices.
    """
    num_units = order[0].model.num_units
    infinite = 2**62
    # missing[u], worst[u]: sum and largest of what is missing when the devices from here on hold
    # units u … end.
    missing = [infinite] * num_units + [0]
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
            totals = list(map(add, excess, missing[first + 1 :]))
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
    return [max(0, peak - slot.usable_bytes) for peak in slot.model.peaks_from(first)]
