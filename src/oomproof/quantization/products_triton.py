"""CUDA kernels for products with few tokens: each weight is read once, in its format.

A tile of the weight is dequantized in registers to the type of the input, rounded as the reference
rounds it, and multiplied there. Codes are read in words of 32 bits: a byte kept from one step to
the next would take a register of its own.
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
    value_of,
)

FEW_TOKENS = 64
"""The most tokens of a product that is computed here."""
_PROGRAMS = 2048
"""Programs that keep the memory of the largest GPUs busy: several on each of 132 processors."""
_DOT_PROGRAMS = 264
_LEAST_STEPS = 4
_REDUCED = 1024

_SIZE = tl.constexpr(BLOCK_SIZE)
_WORDS = tl.constexpr(BLOCK_SIZE // 8)
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
    (codes, *others), flags = weight.arguments()
    words, groups = codes.view(torch.int32), columns // BLOCK_SIZE
    if tokens == 1:
        _vector_4bit[(ceil_div(rows, tile.rows),)](
            x,
            words,
            *others,
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
        words,
        *others,
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
    is_fp8 = codes.dtype == torch.float8_e4m3fn
    if tokens == 1 and columns % 4 == 0:
        kernel, tile = _vector_8bit, tiles(1, rows, columns, itemsize=x.itemsize)
        codes = codes.view(torch.int32)
    else:
        kernel, tile = _dot_8bit, tiles(max(2, tokens), rows, columns, itemsize=x.itemsize)
        codes = codes.view(torch.uint8) if is_fp8 else codes
    splits, step = _splits(tile, tokens, rows, columns, scratch)
    target = out if splits == 1 else _partials(scratch, splits, tokens, rows)
    kernel[(ceil_div(rows, tile.rows), splits)](
        x,
        codes,
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
    x, words, scales, table, nested_absmax, nested_table, offset, out, rows, groups,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One token: no tile for a matrix product to fill, so each thread sums up what it has read.

    Weights stay in float32, and their scale is applied to the sum over a word.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, GROUPS, _WORDS), tl.float32)
    word, scale, outer = _load_4bit(
        words, scales, nested_absmax, row, rows, 0, groups, groups, NESTED=NESTED, GROUPS=GROUPS
    )
    for first in range(0, groups, GROUPS):
        # What the next step needs is on its way while this one computes.
        next_word, next_scale, next_outer = _load_4bit(
            words, scales, nested_absmax, row, rows, first + GROUPS, groups, groups,
            NESTED=NESTED, GROUPS=GROUPS,
        )  # fmt: skip
        column = first * _SIZE + tl.arange(0, GROUPS * _SIZE)
        values = tl.load(x + column, mask=column < groups * _SIZE, other=0.0)
        even, odd = tl.split(tl.reshape(values, (1, GROUPS, _WORDS, 2, 2, 2)))
        x0, x2, x4, x6 = _fourths(even.to(tl.float32))
        x1, x3, x5, x7 = _fourths(odd.to(tl.float32))
        # The first code of a byte is in its high half, the first byte in the low end of the word.
        part = _value(word, 4, table, HAS_TABLE=HAS_TABLE) * x0
        part += _value(word, 0, table, HAS_TABLE=HAS_TABLE) * x1
        part += _value(word, 12, table, HAS_TABLE=HAS_TABLE) * x2
        part += _value(word, 8, table, HAS_TABLE=HAS_TABLE) * x3
        part += _value(word, 20, table, HAS_TABLE=HAS_TABLE) * x4
        part += _value(word, 16, table, HAS_TABLE=HAS_TABLE) * x5
        part += _value(word, 28, table, HAS_TABLE=HAS_TABLE) * x6
        part += _value(word, 24, table, HAS_TABLE=HAS_TABLE) * x7
        sums += part * absmax_of(scale, outer, nested_table, offset, NESTED=NESTED)[:, :, None]
        word, scale, outer = next_word, next_scale, next_outer
    total = tl.sum(tl.sum(sums, axis=2), axis=1)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["tokens"])
def _dot_4bit(
    x, words, scales, table, nested_absmax, nested_table, offset, out,
    tokens, rows, groups, groups_per_split, x_stride, out_stride,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A few tokens: tiles of the transposed product [rows, tokens], so that rows fill them.

    The input is split into its even and odd columns, and so nothing of the weight is interleaved.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    begin = tl.program_id(1) * groups_per_split
    end = tl.minimum(begin + groups_per_split, groups)
    dtype = x.dtype.element_ty
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    word, scale, outer = _load_4bit(
        words, scales, nested_absmax, row, rows, begin, end, groups, NESTED=NESTED, GROUPS=GROUPS
    )
    for first in range(begin, end, GROUPS):
        next_word, next_scale, next_outer = _load_4bit(
            words, scales, nested_absmax, row, rows, first + GROUPS, end, groups,
            NESTED=NESTED, GROUPS=GROUPS,
        )  # fmt: skip
        column = first * _SIZE + tl.arange(0, GROUPS * _SIZE)
        values = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=(token < tokens)[:, None] & (column < end * _SIZE)[None, :],
            other=0.0,
        )
        even, odd = tl.split(tl.reshape(values, (TOKENS, GROUPS * _SIZE // 2, 2)))
        absmax = absmax_of(scale, outer, nested_table, offset, NESTED=NESTED)[:, :, None]
        high = _tile(word >> 4, absmax, table, dtype, HAS_TABLE=HAS_TABLE)
        sums = tl.dot(high, tl.trans(even), sums, input_precision="ieee")
        low = _tile(word, absmax, table, dtype, HAS_TABLE=HAS_TABLE)
        sums = tl.dot(low, tl.trans(odd), sums, input_precision="ieee")
        word, scale, outer = next_word, next_scale, next_outer
    _store(sums, out, token, row, tokens, rows, out_stride)


@triton.jit
def _load_4bit(
    words, scales, nested_absmax, row, rows, first, end, groups,
    NESTED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Words of eight codes [rows, groups, 8] and what is stored of their scales, 0 outside."""
    group = first + tl.arange(0, GROUPS)
    inside = (row < rows)[:, None] & (group < end)[None, :]
    block = row.to(tl.int64)[:, None] * groups + group[None, :]
    place = block[:, :, None] * _WORDS + tl.arange(0, _WORDS)[None, None, :]
    word = tl.load(words + place, mask=inside[:, :, None], other=0)
    scale, outer = load_scale(scales, nested_absmax, block, inside, NESTED=NESTED)
    return word, scale, outer


@triton.jit
def _value(word, SHIFT: tl.constexpr, table, HAS_TABLE: tl.constexpr):
    """The values of one code of each word, in the words' shape.

    In another shape the table's loads would get another layout than the words', and their pointers
    would travel through shared memory.
    """
    return value_of((word >> SHIFT) & 15, table, HAS_TABLE=HAS_TABLE)


@triton.jit
def _tile(word, absmax, table, dtype: tl.constexpr, HAS_TABLE: tl.constexpr):
    """Weights of the low half of each byte [rows, groups * 32]; what is outside meets zeros in x."""
    w0 = (_value(word, 0, table, HAS_TABLE=HAS_TABLE) * absmax).to(dtype)
    w1 = (_value(word, 8, table, HAS_TABLE=HAS_TABLE) * absmax).to(dtype)
    w2 = (_value(word, 16, table, HAS_TABLE=HAS_TABLE) * absmax).to(dtype)
    w3 = (_value(word, 24, table, HAS_TABLE=HAS_TABLE) * absmax).to(dtype)
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(joined, (word.shape[0], word.shape[1] * _SIZE // 2))


@triton.jit
def _fourths(values):
    """[…, 2, 2] → its four columns […], in order."""
    evens, odds = tl.split(values)
    first, third = tl.split(evens)
    second, fourth = tl.split(odds)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["tokens"])
def _vector_8bit(
    x, words, row_scale, token_scale, out,
    tokens, rows, columns, columns_per_split, x_stride, out_stride, factor,
    IS_FP8: tl.constexpr, BY_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """As `_vector_4bit`, with four codes to a word.

    Words come in pairs: a thread then loads eight codes and eight inputs, and has both.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs: tl.constexpr = COLUMNS // 8
    sums = tl.zeros((ROWS, pairs, 2), tl.float32)
    word = _load_pairs(words, row, rows, 0, columns // 4, PAIRS=pairs)
    for first in range(0, columns // 4, pairs * 2):
        next_word = _load_pairs(words, row, rows, first + pairs * 2, columns // 4, PAIRS=pairs)
        column = first * 4 + tl.arange(0, COLUMNS)
        values = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
        if IS_FP8:
            values *= _E4M3_SHIFT
        x0, x1, x2, x3 = _fourths(tl.reshape(values, (1, pairs, 2, 2, 2)))
        if IS_FP8:
            sums += _shifted_e4m3(word << 24) * x0
            sums += _shifted_e4m3(word << 16) * x1
            sums += _shifted_e4m3(word << 8) * x2
            sums += _shifted_e4m3(word) * x3
        else:
            # Sign bits, turned, add 128.
            word ^= -0x7F7F7F80
            sums += float_of(word & 0xFF, 128.0) * x0
            sums += float_of((word >> 8) & 0xFF, 128.0) * x1
            sums += float_of((word >> 16) & 0xFF, 128.0) * x2
            sums += float_of((word >> 24) & 0xFF, 128.0) * x3
        word = next_word
    total = tl.sum(tl.sum(sums, axis=2), axis=1) * factor
    total *= tl.load(row_scale + row, mask=row < rows, other=0.0)
    if BY_TOKEN:
        total *= tl.load(token_scale)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _load_pairs(words, row, rows, first, length, PAIRS: tl.constexpr):
    """Words of four codes [rows, pairs, 2], 0 outside."""
    pair = tl.arange(0, PAIRS)[None, :, None] * 2
    place = first + pair + tl.arange(0, 2)[None, None, :]
    inside = (row < rows)[:, None, None] & (place < length)
    return tl.load(words + row.to(tl.int64)[:, None, None] * length + place, mask=inside, other=0)


@triton.jit
def _shifted_e4m3(word):
    """The highest byte as a float32 number of 2⁻¹²⁰ of its value, as `half_of_e4m3` does it."""
    return ((word >> 4) & -0x78100000).to(tl.float32, bitcast=True)


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
        weight = half_of_e4m3(code) if IS_FP8 else code.to(x.dtype.element_ty)
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
