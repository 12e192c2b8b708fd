"""Attention over pages in Triton: of a prompt's chunk, and of decode steps that attend.cu is not for.

Every launch writes into tensors it is given, allocates nothing and does not wait, so that it can be
captured in a CUDA graph: lengths are read from `positions` on the device.
"""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from oomproof.engine.native.e4m3_triton import FLOAT8, bits_of, from_e4m3
from oomproof.memory.kv_cache import PAGE_TOKENS

_TILE_TOKENS = 64
"""Keys that a decode step's attention looks at in one go; it divides a page."""
_LEAST_DOT_ROWS = 16
"""Of either side of a matrix product, and of what it sums over."""


def attend(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    pages: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    partials: torch.Tensor,
    scale: float,
    window: int,
    one_request: bool,
) -> None:
    """A prefill chunk, or a decode step."""
    if one_request:
        attend_prefill(qkv, positions, slots, pages, keys, values, out, scale, window)
    else:
        attend_decode(qkv, positions, slots, pages, keys, values, out, partials, scale, window)


def attend_decode(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    pages: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    partials: torch.Tensor,
    scale: float,
    window: int,
) -> None:
    """Each request's tokens in `splits` parts side by side (flash-decoding), then put together."""
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    heads, splits, rows = out.shape[1] // head_dim, partials.shape[2], qkv.shape[0]
    block = max(_LEAST_DOT_ROWS, triton.next_power_of_2(head_dim))
    group = heads // kv_heads
    _attend_part[(rows, kv_heads, splits)](
        qkv,
        positions,
        slots,
        pages,
        bits_of(keys),
        bits_of(values),
        partials,
        qkv.stride(0),
        pages.shape[1],
        scale,
        window,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(_LEAST_DOT_ROWS, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK=block,
        TILE=_TILE_TOKENS,
        SPLITS=splits,
        FLOAT8=keys.dtype is FLOAT8,
        PAGE=PAGE_TOKENS,
        num_warps=4,
        num_stages=2,
    )
    _combine_parts[(rows, heads)](
        partials,
        out,
        out.stride(0),
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK=block,
        SPLITS=splits,
        SPLITS_BLOCK=triton.next_power_of_2(splits),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["num_pages", "window"])
def _attend_part(
    qkv, positions, slots, pages, keys, values, partials, qkv_stride, num_pages, scale, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    FLOAT8: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    slot = tl.load(slots + row)
    end = tl.load(positions + row) + 1
    if slot < 0:
        end = 0
    begin = 0
    if window > 0:
        begin = tl.maximum(end - window, 0)
    # Parts begin at whole tiles, so that a tile never lies in two pages.
    first_tile = begin // TILE
    tiles = tl.cdiv(end, TILE) - first_tile
    per_part = tl.cdiv(tiles, SPLITS)
    tile = first_tile + part * per_part
    last_tile = tl.minimum(tile + per_part, first_tile + tiles)
    in_group = tl.arange(0, GROUP_BLOCK)
    head = kv_head * GROUP + in_group
    column = tl.arange(0, BLOCK)
    real = (in_group < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    query = tl.load(
        qkv + row * qkv_stride + head[:, None] * HEAD_DIM + column[None, :], mask=real, other=0.0
    )
    largest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    weighted = tl.zeros([GROUP_BLOCK, BLOCK], tl.float32)
    token = tl.arange(0, TILE)
    for number in range(tile, last_tile):
        start = number * TILE
        page = tl.load(pages + slot * num_pages + start // PAGE % num_pages).to(tl.int64)
        place = ((page * KV_HEADS + kv_head) * PAGE + start % PAGE) * HEAD_DIM
        seen = (start + token < end) & (start + token >= begin)
        at = place + token[:, None] * HEAD_DIM + column[None, :]
        inside = seen[:, None] & (column < HEAD_DIM)[None, :]
        key = _loaded(keys + at, inside, True, query.dtype, FLOAT8)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp(score - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weight, axis=1)
        value = _loaded(values + at, inside, True, query.dtype, FLOAT8)
        weighted = weighted * shrink[:, None] + tl.dot(
            weight.to(query.dtype), value, input_precision="ieee"
        )
        largest = new_largest
    place = ((row * HEADS + head) * SPLITS + part) * (HEAD_DIM + 2)
    tl.store(partials + place[:, None] + column[None, :], weighted, mask=real)
    tl.store(partials + place + HEAD_DIM, largest, mask=in_group < GROUP)
    tl.store(partials + place + HEAD_DIM + 1, total, mask=in_group < GROUP)


@triton.jit
def _combine_parts(
    partials, out, out_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.arange(0, SPLITS_BLOCK)
    column = tl.arange(0, BLOCK)
    real = part < SPLITS
    place = ((row * HEADS + head) * SPLITS + part) * (HEAD_DIM + 2)
    largest = tl.load(partials + place + HEAD_DIM, mask=real, other=float("-inf"))
    total = tl.load(partials + place + HEAD_DIM + 1, mask=real, other=0.0)
    # A row of padding has no tokens: every part is empty, and the row comes out as zeros.
    top = tl.maximum(tl.max(largest, axis=0), -1e30)
    share = tl.exp(largest - top)
    inside = real[:, None] & (column < HEAD_DIM)[None, :]
    weighted = tl.load(partials + place[:, None] + column[None, :], mask=inside, other=0.0)
    result = tl.sum(weighted * share[:, None], axis=0)
    result = result / tl.maximum(tl.sum(total * share, axis=0), 1e-30)
    at = out + row * out_stride + head * HEAD_DIM + column
    tl.store(at, result.to(out.dtype.element_ty), mask=column < HEAD_DIM)


def attend_prefill(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    pages: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int,
) -> None:
    """Tiles of a head's queries against the keys before (FlashAttention 2, arXiv:2307.08691)."""
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    heads, rows = out.shape[1] // head_dim, qkv.shape[0]
    block = max(_LEAST_DOT_ROWS, triton.next_power_of_2(head_dim))
    float8 = keys.dtype is FLOAT8
    tiles = prefill_tiles(qkv.dtype, block, _capability(qkv.device), float8=float8)
    _attend_chunk[(heads, triton.cdiv(rows, tiles.rows))](
        qkv,
        positions,
        slots,
        pages,
        bits_of(keys),
        bits_of(values),
        out,
        qkv.stride(0),
        out.stride(0),
        pages.shape[1],
        rows,
        kv_heads,
        heads // kv_heads,
        scale,
        window,
        HEAD_DIM=head_dim,
        BLOCK=block,
        ROWS=tiles.rows,
        TILE=tiles.keys,
        OVERLAPS=tiles.overlaps,
        FLOAT8=float8,
        PAGE=PAGE_TOKENS,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How a prefill chunk's attention is cut."""

    rows: int
    """Queries of a program."""
    keys: int
    """Keys that it looks at in one go; they divide a page."""
    warps: int
    stages: int
    """Tiles of keys and values under way at once, about."""
    overlaps: bool = False
    """Whether weights of one tile are computed beside the product of those before with their
    values. It takes products that the GPU computes on its own (Hopper's), and registers."""


def prefill_tiles(
    dtype: torch.dtype, block: int, capability: tuple[int, int], *, float8: bool
) -> Tiles:
    """The fastest that a GPU's registers and shared memory have room for.

    Args:
        dtype: Of the queries.
        block: Head dim, filled up to a power of two.
        capability: The GPU's compute capability.
        float8: Whether pages are in e4m3.
    """
    if dtype is torch.float32:
        return Tiles(rows=32, keys=32, warps=8 if block > 64 else 4, stages=1)
    if capability[0] not in (9, 10):
        # 99 KB a block of threads, but for 8.0.
        if block > 128:
            return Tiles(rows=64, keys=32, warps=8, stages=2)
        return Tiles(rows=128, keys=64, warps=8, stages=3)
    if block > 128:
        return Tiles(rows=128, keys=64, warps=8, stages=2)
    if capability == (9, 0) and not float8:
        # 4 % faster than with 64 keys and overlaps: 388 to 498 TFLOP/s on an H200.
        return Tiles(rows=128, keys=128, warps=8, stages=3)
    return Tiles(rows=128, keys=64, warps=8, stages=3, overlaps=capability[0] == 9)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The least that kernels are made for in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


# A kernel for any number of rows: none is compiled while somebody waits for an answer.
@triton.jit(do_not_specialize=["num_pages", "rows", "kv_heads", "group", "window"])
def _attend_chunk(
    qkv, positions, slots, pages, keys, values, out,
    qkv_stride, out_stride, num_pages, rows, kv_heads, group, scale, window,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    OVERLAPS: tl.constexpr, FLOAT8: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    # Heads side by side read the same keys. The last rows look at the most keys: they begin first.
    head = tl.program_id(0)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    kv_head = head // group
    table = pages + tl.load(slots) * num_pages
    first = tl.load(positions) + first_row
    row = first_row + tl.arange(0, ROWS)
    # Rows of padding come last, and see what the last real one sees, if there is any.
    padded = tl.load(slots + row, mask=row < rows, other=-1) < 0
    end = first + ROWS - tl.sum(padded.to(tl.int32), axis=0)
    position = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_head = (column < HEAD_DIM)[None, :]
    real = (row < rows)[:, None] & in_head
    at = row.to(tl.int64)[:, None] * qkv_stride + (head * HEAD_DIM + column)[None, :]
    query = tl.load(qkv + at, mask=real, other=0.0)
    lookback = tl.where(window > 0, window, 1 << 30)
    begin = tl.maximum(first - lookback + 1, 0)
    # Tiles [whole, stop_whole) are seen by every row, those of [begin, end) around them in part.
    stop_whole = (first + 1) // TILE
    whole = tl.minimum(tl.cdiv(tl.maximum(end - lookback, 0), TILE), stop_whole)
    ring = begin // PAGE - begin // PAGE % num_pages
    # Scores are finite from here on, also those of a row that sees nothing of its first tile.
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK], tl.float32)
    token = tl.arange(0, TILE)
    in_tile = token[:, None] * HEAD_DIM + column[None, :]
    log2_scale = scale * 1.4426950408889634
    # What the last tile left to do: its weights times its values.
    weight = tl.zeros([ROWS, TILE], tl.float32)
    shrink = tl.full([ROWS], 1.0, tl.float32)
    for partly in tl.static_range(2):
        if partly:
            tile, skipped = begin // TILE, stop_whole - whole
            last = tl.cdiv(end, TILE) - skipped
        else:
            tile, skipped, last = whole, 0, stop_whole
        start = _start(tile, whole, skipped, TILE, partly)
        page = _page(table, start, ring, num_pages, PAGE)
        before = _place(page, start, kv_head, kv_heads, HEAD_DIM, PAGE)
        for number in range(tile, last):
            place = _place(page, start, kv_head, kv_heads, HEAD_DIM, PAGE)
            key = _loaded(keys + place + in_tile, in_head, HEAD_DIM != BLOCK, query.dtype, FLOAT8)
            score = tl.dot(query, tl.trans(key), input_precision="ieee")
            if OVERLAPS and not partly:
                weighted = _weighted(
                    weight, weighted * shrink[:, None], values + before + in_tile, in_head,
                    HEAD_DIM != BLOCK, query.dtype, FLOAT8,
                )  # fmt: skip
            if partly:
                back = position[:, None] - (start + token)[None, :]
                score = tl.where((back >= 0) & (back < lookback), score, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(score, axis=1))
            weight = tl.exp2(score * log2_scale - (new_largest * log2_scale)[:, None])
            shrink = tl.exp2((largest - new_largest) * log2_scale)
            total = total * shrink + tl.sum(weight, axis=1)
            largest = new_largest
            if partly or not OVERLAPS:
                # The mask keeps out what a page held before: 0 times NaN would stay NaN.
                weighted = _weighted(
                    weight, weighted * shrink[:, None], values + place + in_tile,
                    (start + token < end)[:, None] & in_head, partly or HEAD_DIM != BLOCK,
                    query.dtype, FLOAT8,
                )  # fmt: skip
            before = place
            # A load whose address another load of the same turn finds is not pipelined: the next
            # tile's page comes in this turn.
            start = _start(number + 1, whole, skipped, TILE, partly)
            page = _page(table, start, ring, num_pages, PAGE)
        if OVERLAPS and not partly:
            if last > tile:
                weighted = _weighted(
                    weight, weighted * shrink[:, None], values + before + in_tile, in_head,
                    HEAD_DIM != BLOCK, query.dtype, FLOAT8,
                )  # fmt: skip
    result = weighted * (1.0 / tl.maximum(total, 1e-30))[:, None]
    place = row.to(tl.int64)[:, None] * out_stride + (head * HEAD_DIM + column)[None, :]
    tl.store(out + place, result.to(query.dtype), mask=real)


@triton.jit
def _start(number, whole, skipped, TILE: tl.constexpr, PARTLY: tl.constexpr):
    """First token of a tile, counted without the `skipped` ones from tile `whole` on."""
    if PARTLY:
        number += tl.where(number >= whole, skipped, 0)
    return number * TILE


@triton.jit
def _page(table, start, ring, num_pages, PAGE: tl.constexpr):
    """Page of a token; a request's tokens go around its pages from page `ring` on at most once."""
    index = start // PAGE - ring
    index -= tl.where(index >= num_pages, num_pages, 0)
    return tl.load(table + index).to(tl.int64)


@triton.jit
def _place(page, start, kv_head, kv_heads, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr):
    """First element of a tile of a KV head."""
    return ((page * kv_heads + kv_head) * PAGE + start % PAGE) * HEAD_DIM


@triton.jit
def _weighted(
    weight, before, at, inside, MASKED: tl.constexpr, dtype: tl.constexpr, FLOAT8: tl.constexpr
):
    """A tile's values by weight, and what there was before."""
    value = _loaded(at, inside, MASKED, dtype, FLOAT8)
    return tl.dot(weight.to(dtype), value, before, input_precision="ieee")


@triton.jit
def _loaded(at, inside, MASKED: tl.constexpr, dtype: tl.constexpr, FLOAT8: tl.constexpr):
    values = tl.load(at, mask=inside, other=0) if MASKED else tl.load(at)
    if FLOAT8:
        values = from_e4m3(values).to(dtype)
    return values
