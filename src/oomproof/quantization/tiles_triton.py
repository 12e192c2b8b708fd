"""CUDA kernels for 4-bit weights in tiles (tiles.py): slices in 16 bits, and copies.

A weight has the same value, bit for bit, as in row-major order: the same functions of codes and
scales are used (dequantize_triton.py).
"""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oomproof.formats import BLOCK_SIZE, NESTED_BLOCK_SIZE, ceil_div
from oomproof.quantization.dequantize_triton import FourBits, absmax_of, value_of
from oomproof.quantization.tiled import Segment, TiledSet
from oomproof.quantization.tiles import FRAGMENT_BYTES, GROUP_BLOCKS, TILE_ROWS

_WORDS = 1024
_SIZE = tl.constexpr(BLOCK_SIZE)
_NESTED_SIZE = tl.constexpr(NESTED_BLOCK_SIZE)
_FRAGMENT = tl.constexpr(FRAGMENT_BYTES // 8)
_TILE_ROWS = tl.constexpr(TILE_ROWS)
_HALF_TILE = tl.constexpr(TILE_ROWS // 2)
_GROUP = tl.constexpr(GROUP_BLOCKS)
_HALF_GROUP = tl.constexpr(GROUP_BLOCKS // 2)


def dequantize_tiled(
    weights: TiledSet, segment: Segment, first_row: int, out: torch.Tensor
) -> None:
    """Rows of a linear from `first_row` on, as many as `out` [rows, columns] (contiguous) has."""
    end_row = first_row + len(out)
    tiles = ceil_div(end_row, TILE_ROWS) - first_row // TILE_ROWS
    weight = FourBits(
        codes=weights.codes.view(torch.int64),
        scales=weights.scales,
        table=weights.quant_map,
        nested=segment.nested,
    )
    tensors, flags = weight.arguments()
    _tiles[(tiles, ceil_div(weights.blocks, GROUP_BLOCKS))](
        *tensors,
        out,
        segment.first_tile,
        segment.tile_stride,
        first_row,
        end_row,
        weights.blocks,
        # Inline assembly is nothing for the interpreter.
        SHUFFLES=weight.table is not None and isinstance(_tiles, triton.JITFunction),
        num_warps=8,
        **flags,
    )


def copy_tiles(source: torch.Tensor, destination: torch.Tensor) -> None:
    """Both [tiles, elements], of whole words a tile, each tile contiguous.

    Either may be in page-locked host memory, which the GPU reads and writes itself: torch copies
    such views between devices through memory that it allocates.
    """
    count = len(source)
    one, other = (part.view(torch.int32) for part in (source, destination))
    words = one.shape[1]
    _copy[(count, ceil_div(words, _WORDS))](
        one, other, one.stride(0), other.stride(0), words, WORDS=_WORDS
    )


@triton.jit(do_not_specialize=["first_tile", "tile_stride", "first_row", "end_row", "blocks"])
def _tiles(
    words, scales, table, nested_absmax, nested_table, offset, out,
    first_tile, tile_stride, first_row, end_row, blocks,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr, SHUFFLES: tl.constexpr,
):  # fmt: skip
    """Eight blocks of a tile, in two steps of four.

    A thread has 8 bytes of a fragment: 8 columns of row g and 8 of row g + 8. With one word a
    thread the layout in which it is read is the one in which rows are written, 16 bytes a thread and
    512 a warp, and nothing travels through shared memory.
    """
    number = first_row // _TILE_ROWS + tl.program_id(0)
    group = tl.program_id(1) * _GROUP
    tile = (first_tile + number * tile_stride).to(tl.int64)
    left = tl.minimum(blocks - group, _GROUP)
    scales += tile * blocks * _TILE_ROWS + group * _TILE_ROWS
    words += (tile * blocks + group) * _FRAGMENT
    outer = number * _TILE_ROWS * blocks + group
    out += (number * _TILE_ROWS - first_row).to(tl.int64) * blocks * _SIZE + group * _SIZE
    first_row -= number * _TILE_ROWS
    end_row -= number * _TILE_ROWS
    # All loads come first, for none can pass a store.
    word_0 = _load_tile(words, 0, left)
    word_4 = _load_tile(words, 4, left)
    scale_00, outer_00 = _load_tile_scales(scales, nested_absmax, outer, 0, 0, left, blocks, NESTED)
    scale_01, outer_01 = _load_tile_scales(scales, nested_absmax, outer, 0, 1, left, blocks, NESTED)
    scale_40, outer_40 = _load_tile_scales(scales, nested_absmax, outer, 4, 0, left, blocks, NESTED)
    scale_41, outer_41 = _load_tile_scales(scales, nested_absmax, outer, 4, 1, left, blocks, NESTED)
    scale_00 = absmax_of(scale_00, outer_00, nested_table, offset, NESTED=NESTED)
    scale_01 = absmax_of(scale_01, outer_01, nested_table, offset, NESTED=NESTED)
    scale_40 = absmax_of(scale_40, outer_40, nested_table, offset, NESTED=NESTED)
    scale_41 = absmax_of(scale_41, outer_41, nested_table, offset, NESTED=NESTED)
    entry = _own_entry(table) if SHUFFLES else scale_00
    rows = (first_row, end_row)
    _store_tile_rows(
        word_0, scale_00, table, entry, out, 0, 0, left, blocks, rows, HAS_TABLE, SHUFFLES
    )  # fmt: skip
    _store_tile_rows(
        word_4, scale_40, table, entry, out, 4, 0, left, blocks, rows, HAS_TABLE, SHUFFLES
    )  # fmt: skip
    _store_tile_rows(
        word_0, scale_01, table, entry, out, 0, 1, left, blocks, rows, HAS_TABLE, SHUFFLES
    )  # fmt: skip
    _store_tile_rows(
        word_4, scale_41, table, entry, out, 4, 1, left, blocks, rows, HAS_TABLE, SHUFFLES
    )  # fmt: skip


@triton.jit
def _load_tile(words, first, left):
    """Eight words a block and a pair of rows: [8, 4 * 8]."""
    g = tl.arange(0, _HALF_TILE)[:, None]
    index = tl.arange(0, _HALF_GROUP * 8)[None, :]
    block = first + index // 8
    place = block * _FRAGMENT + g * 8 + index % 8
    return tl.load(words + place, mask=block < left, other=0)


@triton.jit
def _load_tile_scales(
    scales, nested_absmax, outer, first, HALF: tl.constexpr, left, blocks, NESTED: tl.constexpr
):
    """What is stored of the scales of those words, for one row of each pair."""
    g = tl.arange(0, _HALF_TILE)[:, None]
    index = tl.arange(0, _HALF_GROUP * 8)[None, :]
    block = first + index // 8
    inside = block < left
    place = g * 2 * left + (block // 2) * 4 + HALF * 2 + block % 2
    scale = tl.load(scales + place, mask=inside, other=0)
    if NESTED:
        row_major = outer + (g + HALF * _HALF_TILE) * blocks + block
        wider = tl.load(nested_absmax + row_major // _NESTED_SIZE, mask=inside, other=0.0)
    else:
        wider = scale
    return scale, wider


@triton.jit
def _own_entry(table):
    """In each lane of a warp the table's entry of that number, twice over: [8, 4 * 8]."""
    address = table.to(tl.int64) + tl.zeros((_HALF_TILE, _HALF_GROUP * 8), tl.int64)
    return tl.inline_asm_elementwise(
        """{
        .reg .u32 lane;
        .reg .u64 place;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 15;
        mad.wide.u32 place, lane, 4, $1;
        ld.global.nc.f32 $0, [place];
        }""",
        "=f,l", [address], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _tile_value(
    word, SHIFT: tl.constexpr, table, entry, HAS_TABLE: tl.constexpr, SHUFFLES: tl.constexpr
):
    """The value of one code of each word. From another lane: a load takes twice the instructions.

    A lane's number has five bits; the fifth, the next code's, chooses between equal entries.
    """
    if SHUFFLES:
        value = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [entry, word >> SHIFT],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        value = value_of((word >> SHIFT) & 15, table, HAS_TABLE=HAS_TABLE)
    return value


@triton.jit
def _store_tile_rows(
    word, scale, table, entry, out, first, HALF: tl.constexpr, left, blocks, rows,
    HAS_TABLE: tl.constexpr, SHUFFLES: tl.constexpr,
):  # fmt: skip
    """One row of each pair: bytes HALF and HALF + 2 of each 4, the first column in the high half."""
    dtype = out.dtype.element_ty
    low = (word >> 8 * HALF).to(tl.int32)
    high = (word >> 32 + 8 * HALF).to(tl.int32)
    v0 = (_tile_value(low, 4, table, entry, HAS_TABLE, SHUFFLES) * scale).to(dtype)
    v1 = (_tile_value(low, 0, table, entry, HAS_TABLE, SHUFFLES) * scale).to(dtype)
    v2 = (_tile_value(low, 20, table, entry, HAS_TABLE, SHUFFLES) * scale).to(dtype)
    v3 = (_tile_value(low, 16, table, entry, HAS_TABLE, SHUFFLES) * scale).to(dtype)
    v4 = (_tile_value(high, 4, table, entry, HAS_TABLE, SHUFFLES) * scale).to(dtype)
    v5 = (_tile_value(high, 0, table, entry, HAS_TABLE, SHUFFLES) * scale).to(dtype)
    v6 = (_tile_value(high, 20, table, entry, HAS_TABLE, SHUFFLES) * scale).to(dtype)
    v7 = (_tile_value(high, 16, table, entry, HAS_TABLE, SHUFFLES) * scale).to(dtype)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    values = tl.reshape(tl.join(even, odd), (_HALF_TILE, _HALF_GROUP * _SIZE))
    row = HALF * _HALF_TILE + tl.arange(0, _HALF_TILE)[:, None]
    column = first * _SIZE + tl.arange(0, _HALF_GROUP * _SIZE)[None, :]
    inside = (row >= rows[0]) & (row < rows[1]) & (column < left * _SIZE)
    tl.store(out + row * blocks * _SIZE + column, values, mask=inside)


@triton.jit
def _copy(source, destination, stride, other_stride, words, WORDS: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < words
    value = tl.load(source + tile * stride + word, mask=inside)
    tl.store(destination + tile * other_stride + word, value, mask=inside)
