"""Leaks are found through noise; steps, saws, warm-up and jitter are none."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from oomproof.monitoring.leaks import Leak, LeakDetector, slope
from oomproof.units import KIB, MIB

REQUESTS = 6_000
Series = Callable[[int], float]


def leaks(series: Series, requests: int = REQUESTS) -> list[tuple[int, Leak]]:
    detector = LeakDetector()
    found = ((number, detector.add(number, 500 * MIB + series(number))) for number in
             range(1, requests + 1))  # fmt: skip
    return [(number, leak) for number, leak in found if leak is not None]


def noise(deviation: float, seed: int) -> Series:
    generator = random.Random(seed)
    return lambda _: generator.gauss(0, deviation)


@pytest.mark.parametrize("deviation", [0, 64 * KIB, 256 * KIB])
@pytest.mark.parametrize("seed", range(4))
def test_a_leak_of_1_kib_a_request_is_found_once_through_noise(deviation: int, seed: int) -> None:
    jitter = noise(deviation, seed)
    [(first, leak)] = leaks(lambda number: KIB * number + jitter(number))
    assert first < 4_000
    assert leak.bytes_per_request == pytest.approx(KIB, rel=0.25)
    assert leak.at_least <= leak.bytes_per_request


@pytest.mark.parametrize("grain", [4 * KIB, 132 * KIB])
def test_a_leak_that_shows_in_pages_or_arenas_is_found(grain: int) -> None:
    assert len(leaks(lambda number: KIB * number // grain * grain)) == 1


def test_a_leak_under_a_garbage_collectors_saw_is_found() -> None:
    assert len(leaks(lambda number: KIB * number + number % 97 * 50 * KIB)) == 1


def test_a_leak_that_begins_late_is_found() -> None:
    [(first, _)] = leaks(lambda number: 4 * KIB * max(0, number - 2_000))
    assert first > 2_000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "series",
    [
        lambda number: 0,
        lambda number: number % 97 * 50 * KIB,
        lambda number: 20 * MIB * (number > 700),
        lambda number: 20 * MIB * (number > 700) + 30 * MIB * (number > 2_500),
        lambda number: 100 * MIB * (1 - math.exp(-number / 100)),
        lambda number: 100 * MIB * (1 - math.exp(-number / 500)),
        lambda number: MIB * min(number, 200),
        lambda number: 5 * MIB * math.log(number),
        lambda number: -KIB * number,
        lambda number: 100 * number,
    ],
    ids=[
        "flat",
        "a saw",
        "a step",
        "two steps",
        "quick warm-up",
        "slow warm-up",
        "a ramp that ends",
        "growth that fades",
        "memory given back",
        "100 bytes a request",
    ],
)
def test_what_is_no_leak_is_not_told(series: Series, seed: int) -> None:
    jitter = noise(64 * KIB, seed)
    assert leaks(lambda number: series(number) + jitter(number)) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_garbage_collectors_jitter_is_no_leak(seed: int) -> None:
    generator = random.Random(seed)
    assert leaks(lambda _: generator.expovariate(1 / (3 * MIB))) == []


def test_a_leak_that_ended_is_over_and_another_one_is_told_again() -> None:
    def series(number: int) -> float:
        grown = min(number, 3_000) + max(0, number - 20_000)
        return 4 * KIB * grown

    found = leaks(series, 28_000)
    assert len(found) == 2
    assert found[0][0] < 3_100
    assert 20_000 < found[1][0] < 24_000


def test_what_is_kept_is_bounded_and_requests_may_come_in_leaps() -> None:
    detector = LeakDetector()
    told = [detector.add(100 * number, 10 * KIB * 100 * number) for number in range(5_000)]
    assert sum(leak is not None for leak in told) == 1
    assert len(detector._points) <= 64
    assert len(detector._pending) <= detector._stride


def test_the_slope_is_that_of_the_line_whatever_a_fifth_of_the_points_say() -> None:
    points = [(float(x), 3.0 * x + (1e6 if x % 5 == 0 else 0)) for x in range(40)]
    found, at_least = slope(points, 3.3)
    assert found == pytest.approx(3, rel=0.1)
    assert at_least <= found
    assert slope([], 3.3) == (0, 0)
    assert slope([(1.0, 1.0), (1.0, 9.0)], 3.3) == (0, 0)
