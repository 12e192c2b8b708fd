"""CUDA kernels for products with few tokens: each weight is read once, in its format.

A tile of the weight is dequantized in registers to the type of the input, rounded as the reference
rounds it, and multiplied there. The two codes of a byte are an even and an odd column: the input is
split into its even and odd columns, and nothing of the weight has to be interleaved.
"""

# Triton's language is not typed.
# ruff: noqa: ARG001, E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from oomproof.formats import BLOCK_SIZE, ceil_div
from oomproof.quantization.dequantize_triton import (
    FourBits,
    absmax_of,
    float_of,
    half_of_e4m3,
    load_scale,
    values_of,
)

FEW_TOKENS = 64
"""The most tokens of a product that is computed here."""
_PROGRAMS = 2048
"""Programs that keep the memory of the largest GPUs busy: several on each of 132 processors."""
_DOT_PROGRAMS = 264
_LEAST_STEPS = 4
_REDUCED = 1024

_SIZE = tl.constexpr(BLOCK_SIZE)
_HALF = tl.constexpr(BLOCK_SIZE // 2)
# What makes 1/256 of a weight out of `_shifted_e4m3`; here the input is multiplied by it.
_E4M3_SHIFT = tl.constexpr(2.0**112)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """What one program computes in one step, and how many share a row of the weight."""

    rows: int
    columns: int
    splits: int
    """Programs among which the columns are shared; their sums are added in order."""
    num_warps: int
    num_stages: int


def tiles(tokens: int, rows: int, columns: int, *, itemsize: int = 2) -> Tile:
    """The tile of a product with [rows, columns]; every number that decides on speed is here."""
    if tokens == 1:
        # One warp: nothing has to wait at a barrier. Few rows a program where the weight has few:
        # to split columns would cost a second launch.
        fewer = max(1, min(4, rows // _PROGRAMS))
        return Tile(
            rows=1 << (fewer.bit_length() - 1),
            columns=min(512, max(64, 1 << (columns - 1).bit_length())),
            splits=1,
            num_warps=1,
            num_stages=1,
        )
    # In float32 a tile takes twice the shared memory.
    tile_columns = 256 // itemsize
    steps = ceil_div(columns, tile_columns)
    wanted = max(1, _DOT_PROGRAMS // ceil_div(rows, 64))
    splits = max(1, min(wanted, steps // _LEAST_STEPS))
    stages = 3 if itemsize == 2 else 1
    return Tile(rows=64, columns=tile_columns, splits=splits, num_warps=4, num_stages=stages)


def product_4bit(
    x: torch.Tensor, weight: FourBits, out: torch.Tensor, scratch: torch.Tensor
) -> None:
    """x [tokens, columns] with columns in whole blocks, at most FEW_TOKENS; out [tokens, rows]."""
    (tokens, columns), rows = x.shape, out.shape[1]
    tile = tiles(tokens, rows, columns, itemsize=x.itemsize)
    tensors, flags = weight.arguments()
    groups = columns // BLOCK_SIZE
    if tokens == 1:
        _vector_4bit[(ceil_div(rows, tile.rows),)](
            x,
            *tensors,
            out,
            rows,
            groups,
            ROWS=tile.rows,
            GROUPS=tile.columns // BLOCK_SIZE,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **flags,
        )
        return
    splits, step = _splits(tile, tokens, rows, columns, scratch)
    target = out if splits == 1 else _partials(scratch, splits, tokens, rows)
    _dot_4bit[(ceil_div(rows, tile.rows), splits)](
        x,
        *tensors,
        target,
        tokens,
        rows,
        groups,
        step // BLOCK_SIZE,
        x.stride(0),
        target.stride(-2),
        ROWS=tile.rows,
        GROUPS=tile.columns // BLOCK_SIZE,
        TOKENS=_padded(tokens),
        num_warps=tile.num_warps,
        # The kernel loads ahead itself: pipelining would copy the looked-up table to shared memory.
        num_stages=1,
        **flags,
    )
    if splits > 1:
        _add_up(target, out)


def product_8bit(
    x: torch.Tensor,
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    token_scale: torch.Tensor | None,
    factor: float,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """x [tokens, columns], at most FEW_TOKENS; int8 codes, or e4m3 with x of `half_of_e4m3`.

    The sums are multiplied by a scale a row, a scale a token and a number.
    """
    (tokens, columns), rows = x.shape, out.shape[1]
    tile = tiles(tokens, rows, columns, itemsize=x.itemsize)
    is_fp8 = codes.dtype == torch.float8_e4m3fn
    splits, step = _splits(tile, tokens, rows, columns, scratch)
    target = out if splits == 1 else _partials(scratch, splits, tokens, rows)
    kernel = _vector_8bit if tokens == 1 else _dot_8bit
    kernel[(ceil_div(rows, tile.rows), splits)](
        x,
        codes.view(torch.uint8) if is_fp8 else codes,
        row_scale,
        row_scale if token_scale is None else token_scale,
        target,
        tokens,
        rows,
        columns,
        step,
        x.stride(0),
        target.stride(-2),
        factor,
        IS_FP8=is_fp8,
        BY_TOKEN=token_scale is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        TOKENS=_padded(tokens),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        _add_up(target, out)


def _padded(tokens: int) -> int:
    """Tokens of a tile: a matrix product has 16 at least."""
    return max(16, 1 << (tokens - 1).bit_length())


def _splits(
    tile: Tile, tokens: int, rows: int, columns: int, scratch: torch.Tensor
) -> tuple[int, int]:
    """(splits, columns of each): as many as the tile wants and scratch has room for."""
    room = scratch.numel() // (4 * tokens * rows)
    splits = max(1, min(tile.splits, room))
    step = ceil_div(ceil_div(columns, tile.columns), splits) * tile.columns
    return ceil_div(columns, step), step


def _partials(scratch: torch.Tensor, splits: int, tokens: int, rows: int) -> torch.Tensor:
    size = splits * tokens * rows * 4
    return scratch[:size].view(torch.float32).view(splits, tokens, rows)


def _add_up(partials: torch.Tensor, out: torch.Tensor) -> None:
    splits, tokens, rows = partials.shape
    _sum[(tokens, ceil_div(rows, _REDUCED))](
        partials, out, out.stride(0), tokens, rows, splits, ROWS=_REDUCED
    )


@triton.jit
def _vector_4bit(
    x, codes, scales, table, nested_absmax, nested_table, offset, out, rows, groups,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One token: no tile for a matrix product to fill, so each thread sums up what it has read.

    Weights stay in float32, and their scale is applied to the sum over 16 bytes of a block, which
    one thread reads.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, GROUPS, 8), tl.float32)
    packed, scale, outer = _load_4bit(
        codes,
        scales,
        nested_absmax,
        row,
        rows,
        0,
        groups,
        groups,
        NESTED=NESTED,
        GROUPS=GROUPS,
        PARTS=8,
    )
    for first in range(0, groups, GROUPS):
        # What the next step needs is on its way while this one computes.
        next_packed, next_scale, next_outer = _load_4bit(
            codes, scales, nested_absmax, row, rows, first + GROUPS, groups, groups,
            NESTED=NESTED, GROUPS=GROUPS, PARTS=8,
        )  # fmt: skip
        column = first * _SIZE + tl.arange(0, GROUPS * _SIZE)
        pairs = tl.load(x + column, mask=column < groups * _SIZE, other=0.0)
        even, odd = tl.split(tl.reshape(pairs, (1, GROUPS, 8, _HALF // 8, 2)))
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        high, low = values_of(packed, table, HAS_TABLE=HAS_TABLE)
        absmax = absmax_of(scale, outer, nested_table, offset, NESTED=NESTED)
        sums += tl.sum(even * high + odd * low, axis=3) * absmax[:, :, None]
        packed, scale, outer = next_packed, next_scale, next_outer
    total = tl.sum(tl.sum(sums, axis=2), axis=1)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["tokens"])
def _dot_4bit(
    x, codes, scales, table, nested_absmax, nested_table, offset, out,
    tokens, rows, groups, groups_per_split, x_stride, out_stride,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A few tokens: tiles of the transposed product [rows, tokens], so that rows fill them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    begin = tl.program_id(1) * groups_per_split
    end = tl.minimum(begin + groups_per_split, groups)
    dtype = x.dtype.element_ty
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    packed, scale, outer = _load_4bit(
        codes,
        scales,
        nested_absmax,
        row,
        rows,
        begin,
        end,
        groups,
        NESTED=NESTED,
        GROUPS=GROUPS,
        PARTS=1,
    )
    for first in range(begin, end, GROUPS):
        next_packed, next_scale, next_outer = _load_4bit(
            codes, scales, nested_absmax, row, rows, first + GROUPS, end, groups,
            NESTED=NESTED, GROUPS=GROUPS, PARTS=1,
        )  # fmt: skip
        column = first * _SIZE + tl.arange(0, GROUPS * _SIZE)
        pairs = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=(token < tokens)[:, None] & (column < end * _SIZE)[None, :],
            other=0.0,
        )
        even, odd = tl.split(tl.reshape(pairs, (TOKENS, GROUPS * _HALF, 2)))
        high, low = _weights_4bit(
            packed, scale, outer, table, nested_table, offset, dtype,
            HAS_TABLE=HAS_TABLE, NESTED=NESTED,
        )  # fmt: skip
        high = tl.reshape(high, (ROWS, GROUPS * _HALF))
        low = tl.reshape(low, (ROWS, GROUPS * _HALF))
        sums = tl.dot(high, tl.trans(even), sums, input_precision="ieee")
        sums = tl.dot(low, tl.trans(odd), sums, input_precision="ieee")
        packed, scale, outer = next_packed, next_scale, next_outer
    _store(sums, out, token, row, tokens, rows, out_stride)


@triton.jit
def _load_4bit(
    codes, scales, nested_absmax, row, rows, first, end, groups,
    NESTED: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Bytes [rows, groups, parts, bytes] and what is stored of their scales, 0 outside.

    Bytes have four dimensions from the start, so that the table is looked up in their shape: loads
    of one shape get one layout, and any other would send the pointers through shared memory.
    """
    group = first + tl.arange(0, GROUPS)
    inside = (row < rows)[:, None] & (group < end)[None, :]
    block = row.to(tl.int64)[:, None] * groups + group[None, :]
    size: tl.constexpr = _HALF // PARTS
    part = tl.arange(0, PARTS)[None, None, :, None] * size
    byte = part + tl.arange(0, size)[None, None, None, :]
    place = block[:, :, None, None] * _HALF + byte
    packed = tl.load(codes + place, mask=inside[:, :, None, None], other=0)
    scale, outer = load_scale(scales, nested_absmax, block, inside, NESTED=NESTED)
    return packed, scale, outer


@triton.jit
def _weights_4bit(
    packed, scale, outer, table, nested_table, offset, dtype: tl.constexpr,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Weights of even and of odd columns [rows, groups, 1, 32]; what is outside meets zeros in x."""
    absmax = absmax_of(scale, outer, nested_table, offset, NESTED=NESTED)[:, :, None, None]
    high, low = values_of(packed, table, HAS_TABLE=HAS_TABLE)
    return (high * absmax).to(dtype), (low * absmax).to(dtype)


@triton.jit(do_not_specialize=["tokens"])
def _vector_8bit(
    x, codes, row_scale, token_scale, out,
    tokens, rows, columns, columns_per_split, x_stride, out_stride, factor,
    IS_FP8: tl.constexpr, BY_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    code = _load_8bit(codes, row, rows, 0, columns, columns, COLUMNS=COLUMNS)
    for first in range(0, columns, COLUMNS):
        next_code = _load_8bit(codes, row, rows, first + COLUMNS, columns, columns, COLUMNS=COLUMNS)
        column = first + tl.arange(0, COLUMNS)
        value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
        if IS_FP8:
            value *= _E4M3_SHIFT
            weight = _shifted_e4m3(code)
        else:
            # The sign bit, turned, adds 128.
            weight = float_of(code.to(tl.uint8, bitcast=True) ^ 0x80, 128.0)
        sums += weight * value[None, :]
        code = next_code
    total = tl.sum(sums, axis=1) * factor
    total *= tl.load(row_scale + row, mask=row < rows, other=0.0)
    if BY_TOKEN:
        total *= tl.load(token_scale)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["tokens"])
def _dot_8bit(
    x, codes, row_scale, token_scale, out,
    tokens, rows, columns, columns_per_split, x_stride, out_stride, factor,
    IS_FP8: tl.constexpr, BY_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    begin = tl.program_id(1) * columns_per_split
    end = tl.minimum(begin + columns_per_split, columns)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(begin, end, COLUMNS):
        code = _load_8bit(codes, row, rows, first, end, columns, COLUMNS=COLUMNS)
        column = first + tl.arange(0, COLUMNS)
        value = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=(token < tokens)[:, None] & (column < end)[None, :],
            other=0.0,
        )
        if IS_FP8:
            weight = half_of_e4m3(code)
        else:
            weight = code.to(x.dtype.element_ty)
        sums = tl.dot(weight, tl.trans(value), sums, input_precision="ieee")
    sums *= factor * tl.load(row_scale + row, mask=row < rows, other=0.0)[:, None]
    if BY_TOKEN:
        sums *= tl.load(token_scale + token, mask=token < tokens, other=0.0)[None, :]
    _store(sums, out, token, row, tokens, rows, out_stride)


@triton.jit
def _load_8bit(codes, row, rows, first, end, columns, COLUMNS: tl.constexpr):
    column = first + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < end)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(codes + place, mask=inside, other=0)


@triton.jit
def _shifted_e4m3(code):
    """e4m3 bytes as float32 numbers of 2⁻¹²⁰ of the value, as in `half_of_e4m3`."""
    bits = code.to(tl.int8, bitcast=True).to(tl.int32) << 20
    return (bits & -0x78100000).to(tl.float32, bitcast=True)


@triton.jit
def _store(sums, out, token, row, tokens, rows, out_stride):
    """sums [rows, tokens] to out, or to this split's part of the partial sums."""
    split = tl.program_id(1).to(tl.int64) * tokens * rows
    place = out + split + token.to(tl.int64)[None, :] * out_stride + row[:, None]
    inside = (token < tokens)[None, :] & (row < rows)[:, None]
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _sum(partials, out, out_stride, tokens, rows, splits, ROWS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(splits):
        total += tl.load(partials + (split * tokens + token) * rows + row, mask=inside, other=0.0)
    tl.store(out + token * out_stride + row, total.to(out.dtype.element_ty), mask=inside)
