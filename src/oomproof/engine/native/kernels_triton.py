"""The CUDA kernels behind operators.py, in Triton; the operators say what each computes.

Every launch writes into tensors it is given, allocates nothing and does not wait, so that it can be
captured in a CUDA graph: lengths are read from `positions` on the device. e4m3 pages are read
and written as bytes with integer arithmetic, which any GPU has.
"""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oomproof.memory.kv_cache import PAGE_TOKENS

_FLOAT8 = torch.float8_e4m3fn
_TILE_TOKENS = 64
"""Keys that attention looks at in one go; it divides a page."""
_LEAST_DOT_ROWS = 16
"""Of either side of a matrix product, and of what it sums over."""


def add_rms_norm(
    hidden: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    multiplier: float,
    adds: bool,
) -> None:
    """A program a row."""
    rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    _add_rms_norm[(rows,)](
        hidden,
        update,
        weight,
        hidden.stride(0),
        update.stride(0),
        width,
        eps,
        multiplier,
        ADDS=adds,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )


@triton.jit
def _add_rms_norm(
    hidden, update, weight, hidden_stride, update_stride, width, eps, multiplier,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0)
    dtype = values.dtype
    if ADDS:
        added = tl.load(update + row * update_stride + column, mask=inside, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32) * multiplier).to(dtype)
        tl.store(hidden + row * hidden_stride + column, values, mask=inside)
    wide = values.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / width + eps)
    normed = (wide * scale).to(dtype).to(tl.float32)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(update + row * update_stride + column, (normed * weights).to(dtype), mask=inside)


def rotate_and_store(
    qkv: torch.Tensor,
    rotary: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    pages: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> None:
    """A program a row and head: queries first, then keys, then values."""
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    _rotate_and_store[(qkv.shape[0], heads + 2 * kv_heads)](
        qkv,
        rotary,
        positions,
        slots,
        pages,
        _bits(keys),
        _bits(values),
        q_norm,
        k_norm,
        qkv.stride(0),
        rotary.stride(0),
        pages.shape[1],
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        AS_FLOAT8=keys.dtype is _FLOAT8,
        PAGE=PAGE_TOKENS,
        num_warps=1,
    )


@triton.jit
def _rotate_and_store(
    qkv, rotary, positions, slots, pages, keys, values, q_norm, k_norm,
    qkv_stride, rotary_stride, num_pages, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, AS_FLOAT8: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    source = qkv + row * qkv_stride + head * (2 * HALF)
    first = tl.load(source + column, mask=inside, other=0.0)
    second = tl.load(source + HALF + column, mask=inside, other=0.0)
    dtype = first.dtype
    is_value = head >= HEADS + KV_HEADS
    if not is_value:
        if HAS_Q_NORM:
            if head < HEADS:
                first, second = _normed(first, second, q_norm, column, inside, eps, HALF)
        if HAS_K_NORM:
            if head >= HEADS:
                first, second = _normed(first, second, k_norm, column, inside, eps, HALF)
        angle = rotary + position.to(tl.int64) * HALF + column
        cosine = tl.load(angle, mask=inside, other=0.0)
        sine = tl.load(angle + rotary_stride, mask=inside, other=0.0)
        left, right = first.to(tl.float32), second.to(tl.float32)
        first = (left * cosine - right * sine).to(dtype)
        second = (right * cosine + left * sine).to(dtype)
    if head < HEADS:
        tl.store(source + column, first, mask=inside)
        tl.store(source + HALF + column, second, mask=inside)
    elif slot >= 0:
        page = tl.load(pages + slot * num_pages + position // PAGE % num_pages).to(tl.int64)
        kv_head = (head - HEADS) % KV_HEADS
        place = ((page * KV_HEADS + kv_head) * PAGE + position % PAGE) * (2 * HALF)
        if AS_FLOAT8:
            low, high = _to_e4m3(first.to(tl.float32)), _to_e4m3(second.to(tl.float32))
        else:
            low, high = first, second
        if is_value:
            tl.store(values + place + column, low, mask=inside)
            tl.store(values + place + HALF + column, high, mask=inside)
        else:
            tl.store(keys + place + column, low, mask=inside)
            tl.store(keys + place + HALF + column, high, mask=inside)


@triton.jit
def _normed(first, second, weight, column, inside, eps, HALF: tl.constexpr):
    dtype = first.dtype
    left, right = first.to(tl.float32), second.to(tl.float32)
    total = tl.sum(left * left, axis=0) + tl.sum(right * right, axis=0)
    scale = 1.0 / tl.sqrt_rn(total / (2 * HALF) + eps)
    low = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(weight + HALF + column, mask=inside, other=0.0).to(tl.float32)
    left = (left * scale).to(dtype).to(tl.float32) * low
    right = (right * scale).to(dtype).to(tl.float32) * high
    return left.to(dtype), right.to(dtype)


@triton.jit
def _to_e4m3(values):
    """The bits of the nearest e4m3 value (ties to even), the largest one where it is too large."""
    bits = values.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(values), 448.0)
    wide = magnitude.to(tl.uint32, bitcast=True)
    # 20 of float32's 23 fraction bits are dropped, and the exponent's bias goes from 127 to 7.
    rounded = (wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20
    normal = rounded - (120 << 3)
    # Below 2^-6 values are multiples of 2^-9: adding 2^14 leaves exactly these bits, rounded.
    small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, small, normal)
    return (sign | code).to(tl.uint8)


@triton.jit
def _from_e4m3(codes):
    """float32 of e4m3 bits."""
    wide = codes.to(tl.uint32)
    # As float16 bits the exponent's bias is 15 instead of 7: the value is 2^8 times too small.
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.uint16)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


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
        _bits(keys),
        _bits(values),
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
        FLOAT8=keys.dtype is _FLOAT8,
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
        key = _loaded(keys, at, inside, query.dtype, FLOAT8)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp(score - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weight, axis=1)
        value = _loaded(values, at, inside, query.dtype, FLOAT8)
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
    wide = qkv.dtype is torch.float32 or block > 128
    tile_rows = 32 if wide else 128
    _attend_chunk[(triton.cdiv(rows, tile_rows), heads)](
        qkv,
        positions,
        slots,
        pages,
        _bits(keys),
        _bits(values),
        out,
        qkv.stride(0),
        out.stride(0),
        pages.shape[1],
        rows,
        scale,
        window,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=block,
        ROWS=tile_rows,
        TILE=32 if wide else _TILE_TOKENS,
        FLOAT8=keys.dtype is _FLOAT8,
        PAGE=PAGE_TOKENS,
        num_warps=4 if wide else 8,
        num_stages=1 if wide else 2,
    )


# A kernel for any number of rows: none is compiled while somebody waits for an answer.
@triton.jit(do_not_specialize=["rows", "num_pages", "window"])
def _attend_chunk(
    qkv, positions, slots, pages, keys, values, out,
    qkv_stride, out_stride, num_pages, rows, scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, FLOAT8: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    # The last tiles look at the most keys: they begin first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    kv_head = head // GROUP
    slot = tl.load(slots)
    start_position = tl.load(positions)
    row = first_row + tl.arange(0, ROWS)
    position = start_position + row
    column = tl.arange(0, BLOCK)
    in_head = (column < HEAD_DIM)[None, :]
    real = (row < rows)[:, None] & in_head
    at = row.to(tl.int64)[:, None] * qkv_stride + head * HEAD_DIM + column[None, :]
    query = tl.load(qkv + at, mask=real, other=0.0)
    end = start_position + tl.minimum(first_row + ROWS, rows)
    begin = 0
    if window > 0:
        begin = tl.maximum(start_position + first_row - window + 1, 0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, BLOCK], tl.float32)
    token = tl.arange(0, TILE)
    log2_scale = scale * 1.4426950408889634
    for number in range(begin // TILE, tl.cdiv(end, TILE)):
        start = number * TILE
        page = tl.load(pages + slot * num_pages + start // PAGE % num_pages).to(tl.int64)
        place = ((page * KV_HEADS + kv_head) * PAGE + start % PAGE) * HEAD_DIM
        inside = (start + token < end)[:, None] & in_head
        kv_at = place + token[:, None] * HEAD_DIM + column[None, :]
        key = _loaded(keys, kv_at, inside, query.dtype, FLOAT8)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * log2_scale
        seen = (start + token)[None, :] <= position[:, None]
        if window > 0:
            seen = seen & ((start + token)[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        # With a window a row may see nothing of a tile: its largest score stays finite.
        new_largest = tl.maximum(tl.maximum(largest, tl.max(score, axis=1)), -1e30)
        weight = tl.exp2(score - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weight, axis=1)
        value = _loaded(values, kv_at, inside, query.dtype, FLOAT8)
        weighted = weighted * shrink[:, None] + tl.dot(
            weight.to(query.dtype), value, input_precision="ieee"
        )
        largest = new_largest
    result = weighted / tl.maximum(total, 1e-30)[:, None]
    place = row.to(tl.int64)[:, None] * out_stride + head * HEAD_DIM + column[None, :]
    tl.store(out + place, result.to(query.dtype), mask=real)


@triton.jit
def _loaded(pool, at, inside, dtype: tl.constexpr, FLOAT8: tl.constexpr):
    if FLOAT8:
        values = _from_e4m3(tl.load(pool + at, mask=inside, other=0)).to(dtype)
    else:
        values = tl.load(pool + at, mask=inside, other=0.0)
    return values


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """A program a block of a row."""
    rows, width = out.shape
    block = 1024
    _silu_mul[(rows, triton.cdiv(width, block))](
        gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=block, num_warps=4
    )


@triton.jit
def _silu_mul(gate_up, out, in_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    source = gate_up + row * in_stride + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=inside)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.uint8) if values.dtype is _FLOAT8 else values
