"""Block scales that are searched: the least squared error of a block, in plain torch.

The largest magnitude of a block is not the scale that rounds it best. Each of a few candidates
around it gives codes, and codes have one best scale, the least-squares one: with x the weights over
their largest magnitude and t the values of the codes, it is ⟨x,t⟩ / ⟨t,t⟩, and what is left is
⟨x,x⟩ - ⟨x,t⟩² / ⟨t,t⟩. So the candidate with the largest ⟨x,t⟩² / ⟨t,t⟩ wins, and the weights are
rounded once more to its scale.

The scale that is stored is another one for the codes of a table: √(⟨x,x⟩ / ⟨t,t⟩), which leaves a
block its norm. Least squares makes every block shorter by half of its relative squared error, and
what is in common to all blocks adds up over a product where errors of single weights do not: with
0.2 % more squared error than the least, answers diverge by 7 % less on a model that was hardly
trained, and as much on one that was (benchmarks/LOG.md). The error is a parabola about the least
squares, so near it that under double quantization the nearest of the 8-bit codes of the scale will
do: to search both together gains less than 0.1 %.

Sums are of integers: x in steps of 1/4096, values of codes too. They are exact in any order, and a
GPU finds what a processor finds, bit for bit (search_triton.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch

from oomproof.quantization.tables import FP4_CODES, codebook_of, thresholds_4bit

UNIT = 4096
"""Steps of 1: of the weights over their block's largest magnitude, and of a table's values."""
CANDIDATES_16THS = (15, 16, 17, 18, 19, 20, 21, 22)
"""A table's candidates: the largest magnitude over so many 16ths of 1."""
INT4_CANDIDATES_16THS = (112, 120, 128, 136, 144, 152)
"""int4's: over so many 16ths, 7 to 9.5; each with both signs, for its codes go down to -8."""
INT4_SHIFT = 16
"""Of x · candidate, in units of 1 / (16 · 4096), to the integer below."""
TINY = 1e-38
_STEP_ELEMENTS = 1 << 20
_INT4_MIN, _INT4_MAX = -8, 7


def search_4bit(values: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a table for blocks with searched scales.

    Args:
        values: float32 [blocks, size]; a short last block is filled up with zeros.
        quant_type: "nf4" or "fp4".

    Returns:
        Codes uint8 [blocks, size], and scales float32 [blocks]. Blocks that no scale serves, all
        zero, not finite or below the least normal number, keep their largest magnitude.
    """
    return _by_steps(values, lambda part: _search_table(part, quant_type))


def search_int4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of int4 and scales that may be negative.

    Args:
        values: float32 [groups, size].

    Returns:
        Codes with 8 added, uint8 [groups, size], and scales bfloat16 [groups].
    """
    return _by_steps(values, _search_int4)


@cache
def levels_of(quant_type: str) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]]:
    """(values ascending in steps of 1/4096, thresholds between them, codes).

    For "fp4" they are of magnitudes, as in tables.thresholds_4bit.
    """
    thresholds, codes = thresholds_4bit(quant_type)
    table = codebook_of(quant_type)[codes if quant_type == "nf4" else torch.tensor(FP4_CODES)]
    values = tuple(round(value * UNIT) for value in table.tolist())
    assert all(one < following for one, following in pairwise(values))
    return values, tuple(thresholds.tolist()), tuple(codes.tolist())


@cache
def thresholds_of(quant_type: str) -> tuple[tuple[int, ...], ...]:
    """For each candidate, what x is compared with, in steps of 1/4096: `x > threshold`."""
    _, thresholds, _ = levels_of(quant_type)
    return tuple(
        # Of an integer that is larger than a number, it is larger than what is below that number.
        tuple(int(threshold * UNIT * 16 // candidate) for threshold in thresholds)
        for candidate in CANDIDATES_16THS
    )


def _by_steps(
    values: torch.Tensor, search: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some blocks at a time: what a processor makes on the way is many times them."""
    step = max(1, _STEP_ELEMENTS // values.shape[1])
    codes, scales = zip(*(search(part) for part in values.split(step)), strict=True)
    return torch.cat(codes), torch.cat(scales)


def _search_table(values: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    peak, x = _steps(values)
    magnitudes = quant_type == "fp4"
    sizes = x.abs() if magnitudes else x
    device = values.device
    levels, thresholds, _ = (torch.tensor(part, device=device) for part in levels_of(quant_type))
    levels = levels.int()
    best, ratio = torch.zeros_like(peak), torch.ones_like(peak)
    for bounds in thresholds_of(quant_type):
        # One look-up for each of the 8,193 values that x can have.
        every = torch.arange(0 if magnitudes else -UNIT, UNIT + 1, device=device)
        table = levels[torch.bucketize(every, torch.tensor(bounds, device=device))]
        best, ratio = _better(sizes, table[sizes + (0 if magnitudes else UNIT)], best, ratio)
    usable = (best > 0) & (peak >= TINY) & torch.isfinite(peak)
    scale = torch.where(usable, peak * ratio, peak)
    scaled = values * (1.0 / scale.clamp(min=TINY)).unsqueeze(1)
    rank = torch.bucketize(scaled.abs() if magnitudes else scaled, thresholds)
    found = levels[rank.clamp(max=len(levels) - 1)]
    score, _ = _better(sizes, found, torch.zeros_like(peak), torch.ones_like(peak))
    ratio = _same_norm(sizes, found)
    codes = rank
    if magnitudes:
        codes = torch.tensor(FP4_CODES, device=device)[rank] + 8 * (scaled < 0)
    scale = torch.where(usable & (score > 0), peak * ratio, scale)
    return codes.to(torch.uint8), scale


def _search_int4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    peak, x = _steps(values)
    best, ratio = torch.zeros_like(peak), torch.zeros_like(peak)
    half = 1 << (INT4_SHIFT - 1)
    for size in INT4_CANDIDATES_16THS:
        for candidate in (size, -size):
            codes = (x * candidate + half) >> INT4_SHIFT
            codes = codes.clamp(_INT4_MIN, _INT4_MAX)
            best, ratio = _better(x, codes, best, ratio)
    usable = (best > 0) & (peak >= TINY) & torch.isfinite(peak)
    searched = peak * (ratio / UNIT)
    plain = peak / torch.full_like(peak, _INT4_MAX)
    scale = torch.where(usable, searched, plain).to(torch.bfloat16)
    divisor = scale.float()
    divisor = torch.where(divisor.abs() >= TINY, divisor, TINY)
    codes = (values / divisor.unsqueeze(1)).round().clamp(_INT4_MIN, _INT4_MAX)
    return (codes - _INT4_MIN).to(torch.uint8), scale


def _steps(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest magnitude of each block, and the values over it in steps of 1/4096, int32."""
    peak = values.abs().amax(dim=1)
    x = values * (1.0 / peak.clamp(min=TINY)).unsqueeze(1)
    x = torch.where(torch.isfinite(peak).unsqueeze(1), x, 0.0)
    return peak, (x * UNIT).round().int()


def _better(
    x: torch.Tensor, levels: torch.Tensor, best: torch.Tensor, ratio: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The better of the best score until now and of these codes', with its scale over the peak."""
    both = (x * levels).sum(dim=1, dtype=torch.int32).float()
    own = (levels * levels).sum(dim=1, dtype=torch.int32).float()
    divisor = own.clamp(min=1)
    score = both * both / divisor
    is_better = score > best
    return torch.where(is_better, score, best), torch.where(is_better, both / divisor, ratio)


def _same_norm(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The scale over the peak with which these codes have the norm of the weights."""
    whole = (x * x).sum(dim=1, dtype=torch.int32).float()
    own = (levels * levels).sum(dim=1, dtype=torch.int32).float()
    # Rounded once: torch's own root of float32 is not, on processors.
    return (whole / own.clamp(min=1)).double().sqrt().float()
