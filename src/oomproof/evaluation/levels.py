"""Where a format's levels lie, and where a model's weights do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oomproof.evaluation.report import Histogram, LevelsResult
from oomproof.formats import BLOCK_SIZE
from oomproof.quantization.handlers import handler

BINS = 256
ERROR_BINS = 64
_MOST_LEVELS = 32
_MARK = 16
"""Every so many weights one is 1: the largest of its block, however short blocks are."""
_ROWS = 64


def levels_of(format_name: str) -> tuple[float, ...]:
    """The levels of a format for a block whose largest magnitude is 1, ascending.

    They are found by quantizing every value there is; none where a format has more than a few.
    """
    ramp = torch.linspace(-1.0, 1.0, _ROWS * BLOCK_SIZE).view(_ROWS, BLOCK_SIZE).clone()
    ramp[:, ::_MARK] = 1.0
    codec = handler(format_name)
    decoded = codec.decode(codec.encode(ramp), (_ROWS, BLOCK_SIZE), torch.float32)
    # bfloat16 scales and nested ones are not exactly 1.
    found = torch.unique((decoded / decoded.abs().max()).mul(1e4).round() + 0.0)
    return tuple((found.double() / 1e4).tolist()) if len(found) <= _MOST_LEVELS else ()


class HistogramCounter:
    """Counts weights over the largest magnitude of their block."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def add(self, weight: torch.Tensor) -> None:
        """Some rows of a weight, float32, a number of elements that blocks divide or the last."""
        flat = weight.reshape(-1)
        flat = flat[: flat.numel() // BLOCK_SIZE * BLOCK_SIZE].view(-1, BLOCK_SIZE)
        largest = flat.abs().amax(dim=1, keepdim=True)
        scaled = flat / largest.clamp(min=torch.finfo(torch.float32).tiny)
        bins = ((scaled + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        self._counts += torch.bincount(bins.view(-1), minlength=BINS)

    def result(self, formats: Sequence[str]) -> Histogram:
        """All that was added, beside the levels of formats that have few."""
        counts = self._counts.tolist()
        middle = _middle(counts)
        found = []
        for name in formats:
            levels = levels_of(name)
            if levels:
                found.append(_beside(name, levels, counts, middle))
        return Histogram(counts=tuple(counts), middle=middle, formats=tuple(found))


def _beside(
    name: str, levels: tuple[float, ...], counts: Sequence[int], middle: float
) -> LevelsResult:
    """How far weights with such a histogram lie from levels."""
    weights = torch.tensor(counts, dtype=torch.float64)
    weights /= weights.sum().clamp(min=1)
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 / BINS) - 1
    # The largest of each block is exactly a level: the outermost bins' centres are not theirs.
    centres[0], centres[-1] = -1.0, 1.0
    distances = (centres.unsqueeze(1) - torch.tensor(levels, dtype=torch.float64)).abs()
    squared = distances.amin(dim=1).square()
    inner = (middle - centres.abs()).mul(BINS / 2).add(0.5).clamp(0, 1)
    inner_weights, outer_weights = weights * inner, weights * (1 - inner)
    return LevelsResult(
        format=name,
        levels=levels,
        error=_root(squared, weights),
        inner_error=_root(squared, inner_weights),
        outer_error=_root(squared, outer_weights),
        squared_errors=tuple((squared * weights).view(ERROR_BINS, -1).sum(dim=1).tolist()),
    )


def _root(squared: torch.Tensor, weights: torch.Tensor) -> float:
    whole = float(weights.sum())
    return float((squared * weights).sum() / whole) ** 0.5 if whole else 0.0


def _middle(counts: Sequence[int]) -> float:
    """The magnitude below which half of all lie, between the edges of bins."""
    half, below = len(counts) // 2, 0.0
    wanted = sum(counts) / 2
    for distance in range(half):
        here = counts[half - 1 - distance] + counts[half + distance]
        if here and below + here >= wanted:
            return (distance + (wanted - below) / here) / half
        below += here
    return 1.0
