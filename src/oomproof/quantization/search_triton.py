"""CUDA kernels that search block scales, in Triton: what search.py finds, bit for bit.

A candidate takes a weight a search of four steps for the value of its code (constants that are
selected by comparisons, without memory) and two integer multiply-adds. With eight candidates and
the last rounding the kernel has 370 instructions for a weight of nf4, 280 of them at half rate: 650
slots. An H200 (132 multiprocessors of 128 lanes at 1.98 GHz) has 1,500 for each weight, where the
6.5 thousand million of an 8B take 0.3 s.
"""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oomproof.formats import BLOCK_SIZE, ceil_div
from oomproof.quantization import search
from oomproof.quantization.quantize_triton import (
    _at_least_tiny,
    _code_fp4,
    _code_nf4,
    _group_codes,
    _magnitude,
    _rounded,
)

_VALUES = 2048
"""Weights a program: more take more registers than there are, and are kept in memory."""
_GROUPS = 16
_BYTES = 512

_UNIT = tl.constexpr(float(search.UNIT))
_TINY = tl.constexpr(search.TINY)
_INT4_SHIFT = tl.constexpr(search.INT4_SHIFT)
_INT4_HALF = tl.constexpr(1 << (search.INT4_SHIFT - 1))
_INT4 = tl.constexpr(tuple(s * c for c in search.INT4_CANDIDATES_16THS for s in (1, -1)))
_INT4_COUNT = tl.constexpr(2 * len(search.INT4_CANDIDATES_16THS))
_COUNT = tl.constexpr(len(search.CANDIDATES_16THS))
_INFINITY_BITS = tl.constexpr(0x7F800000)


def search_4bit_out(
    weight: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    block_size: int,
) -> None:
    """`operators.quantize_4bit_out` with a search."""
    values, thresholds, _ = search.levels_of(quant_type)
    bounds = tuple(bound for row in search.thresholds_of(quant_type) for bound in row)
    blocks = ceil_div(weight.numel(), block_size)
    at_once = _VALUES // block_size
    _search_blocks[(ceil_div(blocks, at_once),)](
        weight.view(-1),
        codes,
        absmax,
        weight.numel(),
        THRESHOLDS=thresholds,
        BOUNDS=bounds,
        LEVELS=values,
        SIZE=block_size,
        BLOCKS=at_once,
    )


def search_groups_int4_out(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, starts_low: bool
) -> None:
    """`operators.quantize_groups_int4_out` with a search."""
    rows, columns = weight.shape
    bits = scale.view(torch.int16)
    groups = scale.shape[1]
    _search_groups[(rows, ceil_div(groups, _GROUPS))](
        weight, bits, weight.stride(0), columns, groups, SIZE=BLOCK_SIZE, GROUPS=_GROUPS
    )
    _group_codes[(ceil_div(codes.numel(), _BYTES),)](
        weight,
        bits,
        codes,
        weight.stride(0),
        columns,
        groups,
        weight.numel(),
        codes.numel(),
        STARTS_LOW=starts_low,
        BYTES=_BYTES,
    )


@triton.jit
def _search_blocks(
    values, codes, scales, numel,
    THRESHOLDS: tl.constexpr, BOUNDS: tl.constexpr, LEVELS: tl.constexpr,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(values + element, mask=element < numel, other=0.0).to(tl.float32)
    peak, x = _steps(value)
    if len(LEVELS) == 8:
        x = tl.abs(x)
    best = tl.zeros((BLOCKS,), tl.float32)
    ratio = tl.full((BLOCKS,), 1.0, tl.float32)
    for candidate in tl.static_range(_COUNT):
        if len(LEVELS) == 8:
            level = _level_of_8(
                x,
                BOUNDS[7 * candidate], BOUNDS[7 * candidate + 1], BOUNDS[7 * candidate + 2],
                BOUNDS[7 * candidate + 3], BOUNDS[7 * candidate + 4], BOUNDS[7 * candidate + 5],
                BOUNDS[7 * candidate + 6],
                LEVELS[0], LEVELS[1], LEVELS[2], LEVELS[3],
                LEVELS[4], LEVELS[5], LEVELS[6], LEVELS[7],
            )  # fmt: skip
        else:
            level = _level_of_16(x, candidate, BOUNDS, LEVELS)
        best, ratio = _better(x, level, best, ratio)
    usable = (best > 0) & (peak >= _TINY) & _is_finite(peak)
    scale = tl.where(usable, peak * ratio, peak)
    one = tl.full((BLOCKS,), 1.0, tl.float32)
    scaled = value * tl.div_rn(one, _at_least_tiny(scale))[:, None]
    if len(LEVELS) == 8:
        code = _code_fp4(scaled, THRESHOLDS)
        size = tl.abs(scaled)
        level = _level_of_8(
            size,
            THRESHOLDS[0], THRESHOLDS[1], THRESHOLDS[2], THRESHOLDS[3],
            THRESHOLDS[4], THRESHOLDS[5], THRESHOLDS[6],
            LEVELS[0], LEVELS[1], LEVELS[2], LEVELS[3],
            LEVELS[4], LEVELS[5], LEVELS[6], LEVELS[7],
        )  # fmt: skip
    else:
        code = _code_nf4(scaled, THRESHOLDS)
        level = _level_of_16(scaled, 0, THRESHOLDS, LEVELS)
    score, _ = _better(x, level, tl.zeros((BLOCKS,), tl.float32), one)
    ratio = _same_norm(x, level)
    scale = tl.where(usable & (score > 0), peak * ratio, scale)
    tl.store(scales + block, scale, mask=block * SIZE < numel)
    high, low = tl.split(tl.reshape(code, (BLOCKS, SIZE // 2, 2)))
    byte = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    tl.store(codes + byte, ((high << 4) | low).to(tl.uint8), mask=byte * 2 < numel)


@triton.jit
def _search_groups(
    values, bits, stride, columns, groups, SIZE: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(values + row * stride + column, mask=column < columns, other=0.0)
    peak, x = _steps(value.to(tl.float32))
    best = tl.zeros((GROUPS,), tl.float32)
    ratio = tl.zeros((GROUPS,), tl.float32)
    for candidate in tl.static_range(_INT4_COUNT):
        code = (x * _INT4[candidate] + _INT4_HALF) >> _INT4_SHIFT
        code = tl.minimum(tl.maximum(code, -8), 7)
        best, ratio = _better(x, code, best, ratio)
    seven = tl.full((GROUPS,), 7.0, tl.float32)
    plain = tl.div_rn(peak, seven)
    searched = peak * (ratio * (1.0 / _UNIT))
    usable = (best > 0) & (peak >= _TINY) & _is_finite(peak)
    scale = tl.where(usable, searched, plain)
    tl.store(bits + row * groups + group, _bf16_bits(scale), mask=group < groups)


@triton.jit
def _steps(value):
    """Peak of each block, and the values over it in steps of 1/4096."""
    peak = tl.max(_magnitude(value), axis=1).to(tl.float32, bitcast=True)
    one = tl.full(peak.shape, 1.0, tl.float32)
    x = value * tl.div_rn(one, _at_least_tiny(peak))[:, None]
    x = tl.where(_is_finite(peak)[:, None], x, 0.0)
    # The product with a power of two is exact: it may be one instruction with the sum that rounds.
    return peak, _rounded(x * _UNIT).to(tl.int32)


@triton.jit
def _better(x, level, best, ratio):
    both = tl.sum(x * level, axis=1).to(tl.float32)
    own = tl.maximum(
        tl.sum(level * level, axis=1).to(tl.float32), tl.full(best.shape, 1.0, tl.float32)
    )
    score = tl.div_rn(both * both, own)
    is_better = score > best
    return tl.where(is_better, score, best), tl.where(is_better, tl.div_rn(both, own), ratio)


@triton.jit
def _same_norm(x, level):
    own = tl.sum(level * level, axis=1).to(tl.float32)
    own = tl.maximum(own, tl.full(own.shape, 1.0, tl.float32))
    return tl.sqrt_rn(tl.div_rn(tl.sum(x * x, axis=1).to(tl.float32), own))


@triton.jit
def _level_of_16(x, candidate: tl.constexpr, B: tl.constexpr, V: tl.constexpr):
    """The value of the code: both thresholds and values are halved four times."""
    above = x > B[15 * candidate + 7]
    return _level_of_8(
        x,
        tl.where(above, B[15 * candidate + 8], B[15 * candidate]),
        tl.where(above, B[15 * candidate + 9], B[15 * candidate + 1]),
        tl.where(above, B[15 * candidate + 10], B[15 * candidate + 2]),
        tl.where(above, B[15 * candidate + 11], B[15 * candidate + 3]),
        tl.where(above, B[15 * candidate + 12], B[15 * candidate + 4]),
        tl.where(above, B[15 * candidate + 13], B[15 * candidate + 5]),
        tl.where(above, B[15 * candidate + 14], B[15 * candidate + 6]),
        tl.where(above, V[8], V[0]), tl.where(above, V[9], V[1]),
        tl.where(above, V[10], V[2]), tl.where(above, V[11], V[3]),
        tl.where(above, V[12], V[4]), tl.where(above, V[13], V[5]),
        tl.where(above, V[14], V[6]), tl.where(above, V[15], V[7]),
    )  # fmt: skip


@triton.jit
def _level_of_8(x, b0, b1, b2, b3, b4, b5, b6, v0, v1, v2, v3, v4, v5, v6, v7):
    above = x > b3
    b0 = tl.where(above, b4, b0)
    b1 = tl.where(above, b5, b1)
    b2 = tl.where(above, b6, b2)
    v0 = tl.where(above, v4, v0)
    v1 = tl.where(above, v5, v1)
    v2 = tl.where(above, v6, v2)
    v3 = tl.where(above, v7, v3)
    above = x > b1
    last = x > tl.where(above, b2, b0)
    return tl.where(above, tl.where(last, v3, v2), tl.where(last, v1, v0))


@triton.jit
def _is_finite(value):
    return value.to(tl.int32, bitcast=True) < _INFINITY_BITS


@triton.jit
def _bf16_bits(value):
    """The bits of a number in bfloat16, ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > _INFINITY_BITS, 0x7FC0, rounded).to(tl.int16)
