"""Products with few tokens on CUDA: launches and tiles. Each weight is read once, in its format."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oomproof.formats import ceil_div
from oomproof.quantization.dequantize_triton import FourBits
from oomproof.quantization.product_kernels_triton import (
    add_splits,
    dot_4bit,
    dot_8bit,
    vector_4bit,
    vector_8bit,
)

FEW_TOKENS = 64
"""The most tokens of a product that is computed here."""
_VECTOR_TILES = {4: (4, 512, 1), 8: (1, 512, 1)}
"""For one token, by bits of a code: most rows of a program, columns of a step, warps. The fastest
of twelve on an H200 (benchmarks/LOG.md)."""
_PROGRAMS = 2048
"""Programs that keep the memory of the largest GPUs busy: several on each of 132 processors."""
_DOT_PROGRAMS = 264
_LEAST_STEPS = 4
_REDUCED = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """What one program computes in one step, and how many share a row of the weight."""

    rows: int
    columns: int
    splits: int
    """Programs among which the columns are shared; their sums are added in order."""
    num_warps: int
    num_stages: int


def tiles(tokens: int, rows: int, columns: int, *, bits: int, itemsize: int = 2) -> Tile:
    """The tile of a product with [rows, columns]; every number that decides on speed is here."""
    if tokens == 1:
        most_rows, step, warps = _VECTOR_TILES[bits]
        # Few rows a program where the weight has few: to split columns would cost a second launch.
        fewer = max(1, min(most_rows, rows // _PROGRAMS))
        return Tile(
            rows=1 << (fewer.bit_length() - 1),
            columns=min(step, max(64, 1 << (columns - 1).bit_length())),
            splits=1,
            num_warps=warps,
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
    tile = tiles(tokens, rows, columns, bits=4, itemsize=x.itemsize)
    (codes, *others), flags = weight.arguments()
    size = weight.block_size
    words, groups = codes.view(torch.int32), columns // size
    if tokens == 1:
        vector_4bit[(ceil_div(rows, tile.rows),)](
            x,
            words,
            *others,
            out,
            rows,
            groups,
            ROWS=tile.rows,
            SIZE=size,
            GROUPS=tile.columns // size,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **flags,
        )
        return
    splits, step = splits_of(tile, tokens, rows, columns, scratch)
    target = out if splits == 1 else partials_of(scratch, splits, tokens, rows)
    dot_4bit[(ceil_div(rows, tile.rows), splits)](
        x,
        words,
        *others,
        target,
        tokens,
        rows,
        groups,
        step // size,
        x.stride(0),
        target.stride(-2),
        ROWS=tile.rows,
        SIZE=size,
        GROUPS=tile.columns // size,
        TOKENS=padded(tokens),
        num_warps=tile.num_warps,
        # The kernel loads ahead itself: pipelining would copy the looked-up table to shared memory.
        num_stages=1,
        **flags,
    )
    if splits > 1:
        add_up(target, out)


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
        kernel, tile = vector_8bit, tiles(1, rows, columns, bits=8, itemsize=x.itemsize)
        codes = codes.view(torch.int32)
    else:
        kernel, tile = (
            dot_8bit,
            tiles(max(2, tokens), rows, columns, bits=8, itemsize=x.itemsize),
        )
        codes = codes.view(torch.uint8) if is_fp8 else codes
    splits, step = splits_of(tile, tokens, rows, columns, scratch)
    target = out if splits == 1 else partials_of(scratch, splits, tokens, rows)
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
        TOKENS=padded(tokens),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        add_up(target, out)


def padded(tokens: int) -> int:
    """Tokens of a tile: a matrix product has 16 at least."""
    return max(16, 1 << (tokens - 1).bit_length())


def splits_of(
    tile: Tile, tokens: int, rows: int, columns: int, scratch: torch.Tensor
) -> tuple[int, int]:
    """(splits, columns of each): as many as the tile wants and scratch has room for."""
    room = scratch.numel() // (4 * tokens * rows)
    splits = max(1, min(tile.splits, room))
    step = ceil_div(ceil_div(columns, tile.columns), splits) * tile.columns
    return ceil_div(columns, step), step


def partials_of(scratch: torch.Tensor, splits: int, tokens: int, rows: int) -> torch.Tensor:
    """Where splits leave their sums: float32 [splits, tokens, rows]."""
    size = splits * tokens * rows * 4
    return scratch[:size].view(torch.float32).view(splits, tokens, rows)


def add_up(partials: torch.Tensor, out: torch.Tensor) -> None:
    """The sums of all splits, in order."""
    splits, tokens, rows = partials.shape
    add_splits[(tokens, ceil_div(rows, _REDUCED))](
        partials, out, out.stride(0), tokens, rows, splits, ROWS=_REDUCED
    )
