"""Which format each item gets, so that predicted damage is least within a budget of bytes.

A multiple-choice knapsack (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11).
Steps along the lower convex hull of every item's (bytes, damage), the most damage a byte first,
solve its linear relaxation; the step that is the first not to fit is all that separates the result
from the relaxation's bound: at most its damage is lost against the best choice there is. What is
left of the budget then goes to whatever step still fits, and pairs of a raise and a cut are tried;
of few items, each is also fixed to each of its formats. Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

_EXCHANGED_ITEMS = 192
"""Items among which pairs are tried; with more of them a step is too small a part to matter."""
_EXCHANGES = 64
_FIXED_ITEMS = 32
"""Items of which each is also fixed to each of its formats, and the others chosen again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A format that an item can have."""

    format: str
    size_bytes: int
    damage: float
    """Predicted, in any unit that adds up over items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What gets one format: the weights of one projection of one layer, say."""

    name: str
    choices: tuple[Choice, ...]
    """At least one, in any order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A choice for every item."""

    chosen: tuple[Choice, ...]
    """One for each item, in their order."""
    bound: float
    """No choice within the budget has less damage than this."""

    @property
    def size_bytes(self) -> int:
        """Of all items."""
        return sum(choice.size_bytes for choice in self.chosen)

    @property
    def damage(self) -> float:
        """Of all items."""
        return sum(choice.damage for choice in self.chosen)


def choose(items: Sequence[Item], budget_bytes: int) -> Fit | None:
    """The choices of least damage found; None where the smallest ones are more than the budget.

    Args:
        items: What gets a format.
        budget_bytes: For all of them together.
    """
    best = _choose(items, budget_bytes)
    if best is None or len(items) > _FIXED_ITEMS:
        return best
    bound = best.bound
    for number, item in enumerate(items):
        for choice in item.choices:
            fixed = (*items[:number], replace(item, choices=(choice,)), *items[number + 1 :])
            found = _choose(fixed, budget_bytes)
            if found is not None and found.damage < best.damage * (1 - 1e-12):
                best = found
    return replace(best, bound=bound)


def no_worse_than_uniform(items: Sequence[Item], budget_bytes: int) -> list[Item]:
    """Items without the choices that do more damage than the best format that all could have.

    What is chosen of them does no more damage to any item than that format does, whatever an item's
    damage counts: where sensitivities are guessed, a mixture is no worse than one format for all.

    Args:
        items: What gets a format.
        budget_bytes: For all of them together.
    """
    by_format = [{choice.format: choice for choice in item.choices} for item in items]
    shared = set.intersection(*(set(one) for one in by_format)) if by_format else set()
    fitting = [
        name for name in shared if sum(one[name].size_bytes for one in by_format) <= budget_bytes
    ]
    if not fitting:
        return list(items)
    best = min(fitting, key=lambda name: (sum(one[name].damage for one in by_format), name))
    return [
        replace(item, choices=tuple(c for c in item.choices if c.damage <= own[best].damage))
        for item, own in zip(items, by_format, strict=True)
    ]


def _choose(items: Sequence[Item], budget_bytes: int) -> Fit | None:
    hulls = [_hull(item.choices) for item in items]
    places = [0] * len(items)
    left = budget_bytes - sum(hull[0].size_bytes for hull in hulls)
    if left < 0:
        return None
    steps = sorted(
        (
            (-(low.damage - high.damage) / (high.size_bytes - low.size_bytes), number, place)
            for number, hull in enumerate(hulls)
            for place, (low, high) in enumerate(pairwise(hull))
        ),
    )
    bound = sum(hull[0].damage for hull in hulls)
    relaxed = True
    for slope, number, place in steps:
        hull = hulls[number]
        size = hull[place + 1].size_bytes - hull[place].size_bytes
        if relaxed:
            bound += slope * min(size, left)
            relaxed = size <= left
        # On a hull each step is worth less a byte than the one before: they come in order.
        if size <= left and places[number] == place:
            places[number] += 1
            left -= size
    chosen = [hull[place] for hull, place in zip(hulls, places, strict=True)]
    left = _fill(items, chosen, left)
    if len(items) <= _EXCHANGED_ITEMS:
        for _ in range(_EXCHANGES):
            gained = _exchange(items, chosen, left)
            if gained is None:
                break
            left = _fill(items, chosen, gained)
    return Fit(chosen=tuple(chosen), bound=bound)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those on the lower convex hull, the smallest first; each has less damage than the last."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.size_bytes, one.damage)):
        if found and choice.damage >= found[-1].damage:
            continue
        while len(found) > 1 and _slope(found[-2], choice) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(choice)
    return found


def _slope(low: Choice, high: Choice) -> float:
    """Damage a byte, below zero."""
    return (high.damage - low.damage) / (high.size_bytes - low.size_bytes)


def _fill(items: Sequence[Item], chosen: list[Choice], left: int) -> int:
    """Takes the raise that helps most of those that fit until none does; bytes left."""
    while True:
        best, place = 0.0, None
        for number, (item, now) in enumerate(zip(items, chosen, strict=True)):
            for choice in item.choices:
                gain = now.damage - choice.damage
                if gain > best and choice.size_bytes - now.size_bytes <= left:
                    best, place = gain, (number, choice)
        if place is None:
            return left
        number, choice = place
        left -= choice.size_bytes - chosen[number].size_bytes
        chosen[number] = choice


def _exchange(items: Sequence[Item], chosen: list[Choice], left: int) -> int | None:
    """Raises one item at the cost of another, where damage falls; bytes left, None where none."""
    moves = [
        (choice.size_bytes - now.size_bytes, now.damage - choice.damage, number, choice)
        for number, (item, now) in enumerate(zip(items, chosen, strict=True))
        for choice in item.choices
        if choice is not now
    ]
    raises = [move for move in moves if move[1] > 0]
    cuts = [move for move in moves if move[0] < 0]
    best, found = 0.0, None
    for size, gain, number, choice in raises:
        for freed, lost, other, smaller in cuts:
            better = gain + lost
            # Sums of the same damages in another order differ by their rounding.
            if better > best + 1e-12 * gain and other != number and size + freed <= left:
                best, found = better, (number, choice, other, smaller, size + freed)
    if found is None:
        return None
    number, choice, other, smaller, size = found
    chosen[number], chosen[other] = choice, smaller
    return left - size
