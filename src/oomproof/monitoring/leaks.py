"""A leak, told from noise, steps and warm-up: a robust slope of bytes over requests.

The slope is the median over all pairs of points (Theil 1950; Sen 1968), its lower bound that of
Sen's interval from Kendall's statistic. Both hold whatever the noise is, and a third of the points
may be wrong. They cannot tell a leak from a single step or from memory that fills up and stays, so
a good part of the slope must be found in each quarter of what is looked at, and it must not fade.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from statistics import median

from oomproof.units import KIB, MIB

Point = tuple[float, float]
"""(requests so far, bytes)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakRule:
    """When growth counts as a leak."""

    warm_up_requests: int = 16
    """Requests that are not looked at."""
    min_requests: int = 512
    """Over which growth must be seen: a saw with longer teeth looks like a leak until it falls."""
    min_slope: float = KIB / 2
    """Bytes a request that the slope's lower bound must exceed."""
    min_growth: int = MIB
    """Bytes over all that is looked at."""
    min_growth_over_noise: float = 6.0
    """Growth over the spread of the points around their line (1.48 × median absolute deviation)."""
    z: float = 3.3
    """Of the slope's lower bound: one chance in 2,000 where there is no slope."""
    min_quarter_share: float = 1 / 3
    """Of the slope, that each quarter must show."""
    min_later_share: float = 0.75
    """Of the slope of the first half, that the second must show: what fills up fades."""
    confirmations: int = 3
    """Looks in a row that must find it, or, of one that was told, must not."""
    points: int = 64
    """Kept at most; then every two become one, of their lower bytes."""
    max_stride: int = 64
    """Samples of a point at most; from then on the older half of the points is forgotten."""
    look_every: int = 4
    """New points between looks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leak:
    """Growth that counts as a leak."""

    bytes_per_request: float
    at_least: float
    """Lower bound of bytes_per_request."""
    requests: float
    """Over which it was seen."""
    grown_bytes: float


def slope(points: Sequence[Point], z: float) -> tuple[float, float]:
    """(Slope, its lower bound): the median of the slopes of all pairs, and Sen's interval."""
    slopes = sorted(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for number, earlier in enumerate(points)
        for later in points[number + 1 :]
        if later[0] > earlier[0]
    )
    if not slopes:
        return 0.0, 0.0
    n = len(points)
    spread = z * sqrt(n * (n - 1) * (2 * n + 5) / 18)
    rank = int((len(slopes) - spread) / 2)
    return median(slopes), slopes[rank] if rank >= 0 else float("-inf")


def find_leak(points: Sequence[Point], rule: LeakRule, before: Sequence[Point] = ()) -> Leak | None:
    """The leak that so many points show; None where they show none.

    Args:
        points: In order.
        rule: When growth counts.
        before: What was seen earlier: growth that fades is none that began late.
    """
    found, at_least = slope(points, rule.z)
    requests = points[-1][0] - points[0][0]
    grown = found * requests
    if requests < rule.min_requests or at_least <= rule.min_slope or grown < rule.min_growth:
        return None
    offsets = [y - found * x for x, y in points]
    level = median(offsets)
    noise = 1.4826 * median(abs(offset - level) for offset in offsets)
    if grown < rule.min_growth_over_noise * noise:
        return None
    half = len(points) // 2
    first, second = slope(points[:half], rule.z)[0], slope(points[half:], rule.z)[0]
    if second < rule.min_later_share * max(first, slope(before, rule.z)[0]):
        return None
    least = rule.min_quarter_share * found
    size = len(points) // 4
    middles = [
        (median(x for x, _ in quarter), median(y for _, y in quarter))
        for quarter in (points[start : start + size] for start in range(0, 4 * size, size))
    ]
    if any((y1 - y0) < least * (x1 - x0) for (x0, y0), (x1, y1) in pairwise(middles)):
        return None
    return Leak(bytes_per_request=found, at_least=at_least, requests=requests, grown_bytes=grown)


class LeakDetector:
    """Watches one count of bytes over requests; holds a bounded number of points.

    Args:
        rule: When growth counts.
    """

    def __init__(self, rule: LeakRule | None = None) -> None:
        self._rule = rule or LeakRule()
        self._begin()
        self.leak: Leak | None = None
        """What was found and is not over; None for nothing."""

    def _begin(self) -> None:
        self._points: list[Point] = []
        self._pending: list[Point] = []
        self._stride = 1
        self._since_look = self._streak = 0

    def add(self, requests: float, size_bytes: float) -> Leak | None:
        """Takes a sample after so many requests.

        Returns:
            A leak that is new with this sample; None otherwise.
        """
        if requests <= self._rule.warm_up_requests:
            return None
        self._pending.append((requests, size_bytes))
        if len(self._pending) < self._stride:
            return None
        # A garbage collector's saw has its leak at the bottom.
        lowest = min(size for _, size in self._pending)
        self._points.append((self._pending[-1][0], lowest))
        self._pending.clear()
        if len(self._points) == self._rule.points and self._stride >= self._rule.max_stride:
            del self._points[: self._rule.points // 2]
        elif len(self._points) == self._rule.points:
            self._points = [
                (later[0], min(earlier[1], later[1]))
                for earlier, later in zip(self._points[::2], self._points[1::2], strict=True)
            ]
            self._stride *= 2
        self._since_look += 1
        if self._since_look < self._rule.look_every:
            return None
        self._since_look = 0
        return self._look()

    def _look(self) -> Leak | None:
        """All that is kept, then its later half and quarter: a leak may begin late."""
        rule, count = self._rule, len(self._points)
        found = None
        for kept in sorted({count, rule.points // 2, rule.points // 4}, reverse=True):
            if rule.points // 4 <= kept <= count and found is None:
                found = find_leak(self._points[-kept:], rule, self._points[:-kept])
        is_told = self.leak is not None
        self._streak = self._streak + 1 if (found is not None) != is_told else 0
        if self._streak < rule.confirmations:
            return None
        self._streak = 0
        if not is_told:
            self.leak = found
            return found
        # It is over: what comes is looked at afresh.
        self.leak = None
        self._begin()
        return None
