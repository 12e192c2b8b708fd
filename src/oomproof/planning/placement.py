"""Which contiguous range of a model's units each device holds.

Among placements that fit, the one with the least predicted time of a decode step is taken (a
further device only where it saves 2 % of it), and along its order of devices the split that leaves
the most room on the fullest one. Both questions,
whether anything fits and what is fastest, are answered exactly for every set and every order of the
devices: a range's peak never falls when the range grows, so each device's feasible ranges are a
window that only moves forward, and a device's time is a sum over its units. What misses by the
fewest bytes, where nothing fits, is planning/shortfall.py's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.model import MemoryModel

_ROOM_STEP_BYTES = 2**24
"""How finely room is shared out between the devices."""
WORTH_A_DEVICE = 0.02
"""A further device is taken for speed where it saves at least this share of a decode step."""
_TIME_TOLERANCE = 1e-9
"""Times that differ by less than this share are equal."""

Counts = tuple[int, ...]
"""How many devices of each kind a part of the model is spread over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A device as placement sees it."""

    device: DeviceSpec
    usable_bytes: int
    model: MemoryModel
    """The memory model under this device's engine profile."""
    unit_seconds: tuple[float, ...] = ()
    """Predicted time of each unit in a decode step, where the device does not hold all of them;
    empty where time does not matter."""
    alone_seconds: float = 0.0
    """Predicted time of a decode step where it holds all of them."""
    hop_seconds: float = 0.0
    """What handing the hidden states to it costs."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Devices of equal kind are interchangeable."""
        return (
            self.usable_bytes,
            self.alone_seconds,
            self.unit_seconds,
            self.hop_seconds,
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


def can_place(slots: Sequence[Slot]) -> bool:
    """Whether any placement over these devices fits.

    The furthest unit that a set of devices reaches, in any order, is the best start for the next
    device: what a longer range leaves over is never harder to hold.
    """
    num_units = slots[0].model.num_units
    if _fills(sorted(slots, key=lambda slot: -slot.usable_bytes)):
        return True
    groups = group(slots)
    if len(groups) == 1 or _lacks_capacity(slots):
        return any(reach(slots_of_kind[0], 0) == num_units for slots_of_kind in groups)
    frontier: dict[Counts, int] = {(0,) * len(groups): 0}
    for _ in range(len(slots)):
        extended: dict[Counts, int] = {}
        for used, first in frontier.items():
            for position, counts in one_more(used, groups):
                end = reach(groups[position][0], first)
                if end == num_units:
                    return True
                if end > extended.get(counts, -1):
                    extended[counts] = end
        frontier = extended
    return False


def _fills(order: Sequence[Slot]) -> bool:
    """Whether the devices hold the model, each filled to its limit in this order."""
    first = 0
    for slot in order:
        first = reach(slot, first)
        if first == slot.model.num_units:
            return True
    return False


def _lacks_capacity(slots: Sequence[Slot]) -> bool:
    """Whether weights and cache alone are more than several devices hold together."""
    capacity = sum(max(0, slot.usable_bytes - slot.model.overhead_bytes(0)) for slot in slots)
    return capacity < min(slot.model.weights_bytes() + slot.model.kv_bytes() for slot in slots)


def place_fastest(slots: Sequence[Slot]) -> Placement | None:
    """The fastest placement that fits, None where none does."""
    order, seconds = _fastest_order(slots)
    if not order:
        return None
    if len(order) == 1:
        whole = (0, order[0].model.num_units)
        return Placement(ranges={order[0].device.index: whole}, shortfall_bytes=0)
    return Placement(ranges=_balance(order, seconds), shortfall_bytes=0)


def reach(slot: Slot, first: int, room: int = 0) -> int:
    """The unit after the last one the device holds, filled from `first` with `room` bytes left."""
    budget = slot.usable_bytes - room
    model = slot.model
    # Alone, a device needs no buffers for neighbours: the one case where a longer range is less.
    if first == 0 and model.peak_bytes(0, model.num_units) <= budget:
        return model.num_units
    ends = range(first + 1, model.num_units + (first > 0))
    return first + bisect_right(ends, budget, key=lambda end: model.peak_bytes(first, end))


def group(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Interchangeable devices together."""
    kinds: dict[tuple[object, ...], list[Slot]] = {}
    for slot in slots:
        kinds.setdefault(slot.kind, []).append(slot)
    return list(kinds.values())


def one_more(used: Counts, groups: Sequence[Sequence[Slot]]) -> list[tuple[int, Counts]]:
    """(position of a kind, counts with one more device of it), for every kind that has one left."""
    return [
        (position, (*used[:position], count + 1, *used[position + 1 :]))
        for position, count in enumerate(used)
        if count < len(groups[position])
    ]


def in_order(kinds: Sequence[int], groups: Sequence[Sequence[Slot]]) -> list[Slot]:
    """The devices of an order that was found as positions of kinds."""
    taken = [0] * len(groups)
    order = []
    for position in kinds:
        order.append(groups[position][taken[position]])
        taken[position] += 1
    return order


def _fastest_order(slots: Sequence[Slot]) -> tuple[list[Slot], float]:
    """The devices of the fastest placement, in order, and its time; no devices where none fits.

    Dynamic programming over (devices used, unit reached): the least time up to there.
    """
    groups = group(slots)
    num_units = slots[0].model.num_units
    best_order: list[Slot] = []
    best_s = inf
    for slots_of_kind in groups:
        slot = slots_of_kind[0]
        if slot.alone_seconds < best_s and reach(slot, 0) == num_units:
            best_order, best_s = [slot], slot.alone_seconds
    kinds = [_Kind(slots_of_kind[0]) for slots_of_kind in groups]
    least_rest = _least_seconds_from(kinds)
    nothing = (0,) * len(groups)
    frontier: dict[Counts, list[float]] = {nothing: [0.0, *([inf] * num_units)]}
    came_from: dict[tuple[Counts, int], tuple[int, int]] = {}
    for _ in range(len(slots)):
        extended: dict[Counts, list[float]] = {}
        bound_s = best_s * (1 - WORTH_A_DEVICE)
        for used, times in frontier.items():
            for position, counts in one_more(used, groups):
                found = extended.setdefault(counts, [inf] * (num_units + 1))
                for first, end, seconds in kinds[position].extend(times, hops=used != nothing):
                    if seconds < found[end] and seconds + least_rest[end] < bound_s:
                        found[end] = seconds
                        came_from[counts, end] = (position, first)
        fastest = min(extended, key=lambda counts: extended[counts][-1], default=None)
        if fastest is not None and extended[fastest][-1] < bound_s:
            best_s = extended[fastest][-1]
            best_order = in_order(_trace(came_from, fastest, num_units), groups)
        frontier = {c: times for c, times in extended.items() if min(times) < inf}
        if not frontier:
            break
    return best_order, best_s


def _trace(
    came_from: Mapping[tuple[Counts, int], tuple[int, int]], counts: Counts, end: int
) -> list[int]:
    """Positions of the kinds along the model, from where the search came to its end."""
    kinds: list[int] = []
    while end > 0:
        position, end = came_from[counts, end]
        kinds.append(position)
        counts = tuple(count - (i == position) for i, count in enumerate(counts))
    return kinds[::-1]


class _Kind:
    """The feasible ranges of devices of one kind, and their times."""

    def __init__(self, slot: Slot, room: int = 0) -> None:
        self.num_units = slot.model.num_units
        self.hop_s = slot.hop_seconds
        self.unit_s = slot.unit_seconds or (0.0,) * self.num_units
        self.seconds = [0.0, *accumulate(self.unit_s)]
        self.starts = _starts(slot, room)

    def extend(self, times: Sequence[float], *, hops: bool) -> list[tuple[int, int, float]]:
        """The best (first, end, time) for each end that a device of this kind can add.

        Args:
            times: Least time of the units before each position, inf where it is not reached.
            hops: Whether another device comes before this one.
        """
        found = []
        seconds = self.seconds
        hop_s = self.hop_s if hops else 0.0
        # Starts of the window, the least time first: each is better than the ones behind it.
        window: deque[tuple[float, int]] = deque()
        for end, start in enumerate(self.starts[1:], 1):
            reached = times[end - 1]
            if reached < inf:
                value = reached - seconds[end - 1]
                while window and window[-1][0] > value:
                    window.pop()
                window.append((value, end - 1))
            while window and window[0][1] < start:
                window.popleft()
            if window:
                value, first = window[0]
                found.append((first, end, value + seconds[end] + hop_s))
        return found


def _starts(slot: Slot, room: int) -> list[int]:
    """For each end, the first start from which the device holds the range; the end where none.

    A device that holds the whole model is not among them: it has no neighbours.
    """
    model, budget = slot.model, slot.usable_bytes - room
    starts = [0]
    start = 0
    for end in range(1, model.num_units + 1):
        if end == model.num_units:
            start = max(start, 1)
        while start < end and model.peak_bytes(start, end) > budget:
            start += 1
        starts.append(start)
    return starts


def _least_seconds_from(kinds: Sequence[_Kind]) -> list[float]:
    """For each position, a bound of the time that the units from there on take at least."""
    fastest = [min(times) for times in zip(*(kind.unit_s for kind in kinds), strict=True)]
    return [*accumulate(reversed(fastest), initial=0.0)][::-1]


def _balance(order: Sequence[Slot], seconds: float) -> dict[int, tuple[int, int]]:
    """The split along this order, no slower than `seconds`, with the most room on the fullest."""
    low, high = 0, max(slot.usable_bytes for slot in order)
    best = _split(order, 0, seconds)
    assert best is not None
    while high - low > _ROOM_STEP_BYTES:
        room = (low + high) // 2
        found = _split(order, room, seconds)
        if found is None:
            high = room
        else:
            low, best = room, found
    return best


def _split(order: Sequence[Slot], room: int, seconds: float) -> dict[int, tuple[int, int]] | None:
    """The fastest split along this order that leaves `room` bytes; None where none is in time."""
    num_units = order[0].model.num_units
    kinds: dict[tuple[object, ...], _Kind] = {}
    times = [0.0, *([inf] * num_units)]
    firsts: list[dict[int, int]] = []
    for position, slot in enumerate(order):
        if slot.kind not in kinds:
            kinds[slot.kind] = _Kind(slot, room)
        extended, came_from = [inf] * (num_units + 1), {}
        for first, end, time in kinds[slot.kind].extend(times, hops=position > 0):
            extended[end], came_from[end] = time, first
        times = extended
        firsts.append(came_from)
    if times[-1] > seconds * (1 + _TIME_TOLERANCE):
        return None
    ranges: list[tuple[int, int]] = []
    end = num_units
    for came_from in reversed(firsts):
        ranges.append((came_from[end], end))
        end = came_from[end]
    indexes = (slot.device.index for slot in order)
    return dict(zip(indexes, reversed(ranges), strict=True))
