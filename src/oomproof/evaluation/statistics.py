"""Means with confidence intervals of figures that follow each other in a text.

Neighbouring tokens are not independent, so whole blocks of them are drawn: the circular block
bootstrap (Politis and Romano 1992, "A circular block-resampling procedure for stationary data",
after Künsch 1989, Annals of Statistics 17), blocks of √n tokens, 1,000 draws, percentiles 2.5 and
97.5. All formats are drawn alike, and differences between two are those of the same blocks.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch

DRAWS = 1000
METHOD = (
    "95 % by the circular block bootstrap (Politis and Romano 1992), blocks of √n tokens, "
    f"{DRAWS:,} draws"
)
_PERCENTILES = (0.025, 0.975)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its confidence interval of 95 %."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit; `factor` is positive."""
        return Estimate(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def exponential(self) -> Estimate:
        """Perplexity of a mean negative log-likelihood; infinite beyond what a float holds."""
        return Estimate(value=_exp(self.value), low=_exp(self.low), high=_exp(self.high))

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no infinity: null in its place."""
        each = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in each.items()}


class Bootstrap:
    """The draws of n tokens, the same for every series of them.

    Args:
        count: n.
        seed: Makes them repeatable.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        self._count = count
        self._block = max(1, round(math.sqrt(count)))
        generator = torch.Generator().manual_seed(seed)
        draws = (DRAWS, max(1, count // self._block))
        self._starts = torch.randint(count, draws, generator=generator)

    def mean(self, series: torch.Tensor) -> Estimate:
        """Of a series [n], in the order of the text."""
        values = series.double()
        ring = torch.cat((values, values[: self._block]))
        sums = torch.cat((ring.new_zeros(1), ring.cumsum(0)))
        blocks = sums[self._starts + self._block] - sums[self._starts]
        means = blocks.mean(dim=1) / self._block
        low, high = torch.quantile(means, torch.tensor(_PERCENTILES, dtype=torch.float64)).tolist()
        return Estimate(value=float(values.mean()), low=low, high=high)


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < math.log(sys.float_info.max) else math.inf


def position_bins(scored: int) -> tuple[tuple[int, int], ...]:
    """(first, end) of the positions in a window that are told together: each twice as many."""
    edges = [0]
    edge = min(16, scored)
    while edge < scored:
        edges.append(edge)
        edge *= 2
    return tuple(zip(edges, [*edges[1:], scored], strict=True))
