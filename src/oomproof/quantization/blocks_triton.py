"""CUDA kernels for e4m3 codes that have a scale for each square of 128 × 128.

Inputs stay in 16 bits, so any GPU computes it: the codes become 16-bit numbers in registers, and a
step's sums are multiplied by the one scale that the step has.
"""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oomproof.formats import FP8_BLOCK, ceil_div
from oomproof.quantization.dequantize_triton import FP8_FACTOR, half_of_e4m3
from oomproof.quantization.products_triton import add_up, padded, partials_of, splits_of, tiles

_ELEMENTS = 1024
_BLOCK = tl.constexpr(FP8_BLOCK)
_FACTOR = tl.constexpr(FP8_FACTOR)


def dequantize_blocks(
    codes: torch.Tensor, block_scale: torch.Tensor, first_row: int, out: torch.Tensor
) -> None:
    """Rows from `first_row` on, as many as `out` [rows, columns] (contiguous) has.

    Args:
        codes: float8_e4m3fn [rows, columns] of the whole weight.
        block_scale: float32 [ceil(rows / 128), ceil(columns / 128)].
        first_row: Any.
        out: bfloat16, float16 or float32.
    """
    rows, columns = out.shape
    _dequantize[(rows, ceil_div(columns, _ELEMENTS))](
        codes.view(torch.uint8),
        block_scale,
        out,
        first_row,
        columns,
        block_scale.shape[1],
        ELEMENTS=_ELEMENTS,
    )


def product_blocks(
    x: torch.Tensor,
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """x [tokens, columns], at most FEW_TOKENS; codes and scales as for `dequantize_blocks`."""
    (tokens, columns), rows = x.shape, out.shape[1]
    bits = codes.view(torch.uint8)
    if tokens == 1:
        tile = tiles(1, rows, columns, bits=8, itemsize=x.itemsize)
        _vector[(ceil_div(rows, tile.rows),)](
            x,
            bits,
            block_scale,
            out,
            rows,
            columns,
            block_scale.shape[1],
            ROWS=tile.rows,
            BLOCKS=ceil_div(tile.columns, FP8_BLOCK),
            num_warps=tile.num_warps,
        )
        return
    tile = tiles(tokens, rows, columns, bits=8, itemsize=x.itemsize)
    splits, step = splits_of(tile, tokens, rows, columns, scratch)
    target = out if splits == 1 else partials_of(scratch, splits, tokens, rows)
    _dot[(ceil_div(rows, tile.rows), splits)](
        x,
        bits,
        block_scale,
        target,
        tokens,
        rows,
        columns,
        block_scale.shape[1],
        step,
        x.stride(0),
        target.stride(-2),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        TOKENS=padded(tokens),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        add_up(target, out)


@triton.jit
def _dequantize(codes, block_scale, out, first_row, columns, blocks, ELEMENTS: tl.constexpr):
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    column = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = column < columns
    code = tl.load(codes + row * columns + column, mask=inside, other=0)
    scale = tl.load(block_scale + row // _BLOCK * blocks + column // _BLOCK, mask=inside, other=0.0)
    # Exact but for the product: 256 is a power of two.
    value = half_of_e4m3(code).to(tl.float32) * _FACTOR * scale
    tl.store(out + local * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _vector(
    x, codes, block_scale, out, rows, columns, blocks,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One token: each thread sums up what it has read, weights in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, BLOCKS, _BLOCK), tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        column = block[None, :, None] * _BLOCK + tl.arange(0, _BLOCK)[None, None, :]
        inside = (row < rows)[:, None, None] & (column < columns)
        place = row.to(tl.int64)[:, None, None] * columns + column
        weight = half_of_e4m3(tl.load(codes + place, mask=inside, other=0)).to(tl.float32)
        square = (row // _BLOCK)[:, None] * blocks + block[None, :]
        known = (row < rows)[:, None] & (block < blocks)[None, :]
        scale = tl.load(block_scale + square, mask=known, other=0.0)
        values = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
        sums += weight * values * scale[:, :, None]
    total = tl.sum(tl.sum(sums, axis=2), axis=1) * _FACTOR
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["tokens"])
def _dot(
    x, codes, block_scale, out,
    tokens, rows, columns, blocks, columns_per_split, x_stride, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Several tokens. A tile of codes lies in one square: both its sizes divide 128."""
    tl.static_assert(_BLOCK % ROWS == 0)
    tl.static_assert(_BLOCK % COLUMNS == 0)
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    begin = tl.program_id(1) * columns_per_split
    end = tl.minimum(begin + columns_per_split, columns)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        code = tl.load(
            codes + row.to(tl.int64)[:, None] * columns + column[None, :],
            mask=(row < rows)[:, None] & (column < end)[None, :],
            other=0,
        )
        value = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=(token < tokens)[:, None] & (column < end)[None, :],
            other=0.0,
        )
        scale = tl.load(block_scale + first_row // _BLOCK * blocks + first // _BLOCK)
        weight = half_of_e4m3(code).to(x.dtype.element_ty)
        sums += tl.dot(weight, tl.trans(value), input_precision="ieee") * scale
    sums *= _FACTOR
    split = tl.program_id(1).to(tl.int64) * tokens * rows
    place = out + split + token.to(tl.int64)[None, :] * out_stride + row[:, None]
    inside = (token < tokens)[None, :] & (row < rows)[:, None]
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside)
