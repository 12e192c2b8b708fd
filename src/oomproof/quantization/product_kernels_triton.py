"""The kernels of products_triton.py: a tile of the weight is dequantized in registers.

It is rounded to the type of the input, as the reference does, where matrix units multiply it. Codes
are read in words of 32 bits: a byte kept from one step to the next would take a register of its
own.
"""

# Triton's language is not typed.
# ruff: noqa: ARG001, E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from oomproof.quantization.dequantize_triton import (
    absmax_of,
    float_of,
    half_of_e4m3,
    load_scale,
    value_of,
)

# What makes 1/256 of a weight out of `_shifted_e4m3`; here the input is multiplied by it.
_E4M3_SHIFT = tl.constexpr(2.0**112)


@triton.jit
def vector_4bit(
    x, words, scales, table, nested_absmax, nested_table, offset, out, rows, groups,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One token: no tile for a matrix product to fill, so each thread sums up what it has read.

    Weights stay in float32, and their scale is applied to the sum over a word.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, GROUPS, SIZE // 8), tl.float32)
    word, scale, outer = _load_4bit(
        words,
        scales,
        nested_absmax,
        row,
        rows,
        0,
        groups,
        groups,
        NESTED=NESTED,
        SIZE=SIZE,
        GROUPS=GROUPS,
    )
    for first in range(0, groups, GROUPS):
        # What the next step needs is on its way while this one computes.
        next_word, next_scale, next_outer = _load_4bit(
            words, scales, nested_absmax, row, rows, first + GROUPS, groups, groups,
            NESTED=NESTED, SIZE=SIZE, GROUPS=GROUPS,
        )  # fmt: skip
        column = first * SIZE + tl.arange(0, GROUPS * SIZE)
        values = tl.load(x + column, mask=column < groups * SIZE, other=0.0)
        even, odd = tl.split(tl.reshape(values, (1, GROUPS, SIZE // 8, 2, 2, 2)))
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
def dot_4bit(
    x, words, scales, table, nested_absmax, nested_table, offset, out,
    tokens, rows, groups, groups_per_split, x_stride, out_stride,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr,
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
        words,
        scales,
        nested_absmax,
        row,
        rows,
        begin,
        end,
        groups,
        NESTED=NESTED,
        SIZE=SIZE,
        GROUPS=GROUPS,
    )
    for first in range(begin, end, GROUPS):
        next_word, next_scale, next_outer = _load_4bit(
            words, scales, nested_absmax, row, rows, first + GROUPS, end, groups,
            NESTED=NESTED, SIZE=SIZE, GROUPS=GROUPS,
        )  # fmt: skip
        column = first * SIZE + tl.arange(0, GROUPS * SIZE)
        values = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=(token < tokens)[:, None] & (column < end * SIZE)[None, :],
            other=0.0,
        )
        even, odd = tl.split(tl.reshape(values, (TOKENS, GROUPS * SIZE // 2, 2)))
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
    NESTED: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Words of eight codes [rows, groups, SIZE / 8] and what is stored of their scales, 0 outside."""
    group = first + tl.arange(0, GROUPS)
    inside = (row < rows)[:, None] & (group < end)[None, :]
    block = row.to(tl.int64)[:, None] * groups + group[None, :]
    place = block[:, :, None] * (SIZE // 8) + tl.arange(0, SIZE // 8)[None, None, :]
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
    """Weights of the low half of each byte [rows, groups * SIZE / 2]; what is outside meets zeros in x."""
    w0 = (_value(word, 0, table, HAS_TABLE=HAS_TABLE) * absmax).to(dtype)
    w1 = (_value(word, 8, table, HAS_TABLE=HAS_TABLE) * absmax).to(dtype)
    w2 = (_value(word, 16, table, HAS_TABLE=HAS_TABLE) * absmax).to(dtype)
    w3 = (_value(word, 24, table, HAS_TABLE=HAS_TABLE) * absmax).to(dtype)
    joined = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(joined, (word.shape[0], word.shape[1] * word.shape[2] * 4))


@triton.jit
def _fourths(values):
    """[…, 2, 2] → its four columns […], in order."""
    evens, odds = tl.split(values)
    first, third = tl.split(evens)
    second, fourth = tl.split(odds)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["tokens"])
def vector_8bit(
    x, words, row_scale, token_scale, out,
    tokens, rows, columns, columns_per_split, x_stride, out_stride, factor,
    IS_FP8: tl.constexpr, BY_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """As `vector_4bit`, with four codes to a word.

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
def dot_8bit(
    x, codes, row_scale, token_scale, out,
    tokens, rows, columns, columns_per_split, x_stride, out_stride, factor,
    IS_FP8: tl.constexpr, BY_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """As `dot_4bit`, with a code a byte: rows of any number of columns."""
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
def add_splits(partials, out, out_stride, tokens, rows, splits, ROWS: tl.constexpr):
    """Adds up the sums of splits, in order: the same bits every time."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(splits):
        total += tl.load(partials + (split * tokens + token) * rows + row, mask=inside, other=0.0)
    tl.store(out + token * out_stride + row, total.to(out.dtype.element_ty), mask=inside)
