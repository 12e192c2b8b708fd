"""Norm, rotary positions and the next step's rows in Triton; operators.py says what each computes.

Every launch writes into tensors it is given, allocates nothing and does not wait, so that it can be
captured in a CUDA graph. Attention is in attend_triton.py.
"""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oomproof.engine.native.e4m3_triton import FLOAT8, bits_of, to_e4m3
from oomproof.memory.kv_cache import PAGE_TOKENS

_HALVES_PER_PROGRAM = 1024
"""Pairs that a program rotates: 16 bytes of 16-bit values in either half for each of 128 threads."""


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
    """A program a row and block of heads: queries first, then keys, then values."""
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    total = heads + 2 * kv_heads
    block = triton.next_power_of_2(head_dim // 2)
    heads_block = min(triton.next_power_of_2(total), max(1, _HALVES_PER_PROGRAM // block))
    _rotate_and_store[(qkv.shape[0], triton.cdiv(total, heads_block))](
        qkv,
        rotary,
        positions,
        slots,
        pages,
        bits_of(keys),
        bits_of(values),
        q_norm,
        k_norm,
        qkv.stride(0),
        rotary.stride(0),
        pages.shape[1],
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEADS_BLOCK=heads_block,
        HALF=head_dim // 2,
        BLOCK=block,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        AS_FLOAT8=keys.dtype is FLOAT8,
        PAGE=PAGE_TOKENS,
        num_warps=4,
    )


@triton.jit
def _rotate_and_store(
    qkv, rotary, positions, slots, pages, keys, values, q_norm, k_norm,
    qkv_stride, rotary_stride, num_pages, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr,
    AS_FLOAT8: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first_head = tl.program_id(1) * HEADS_BLOCK
    position = tl.load(positions + row)
    head = first_head + tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, BLOCK)
    in_half = column < HALF
    inside = (head < HEADS + 2 * KV_HEADS) & in_half[None, :]
    source = qkv + row * qkv_stride + (head * (2 * HALF) + column[None, :])
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    dtype = first.dtype
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    left, right = first, second
    if HAS_Q_NORM:
        low, high = _normed(first, second, q_norm, column, in_half, eps, HALF)
        left, right = tl.where(is_query, low, left), tl.where(is_query, high, right)
    if HAS_K_NORM:
        low, high = _normed(first, second, k_norm, column, in_half, eps, HALF)
        left, right = tl.where(is_query, left, low), tl.where(is_query, right, high)
    left, right = left.to(tl.float32), right.to(tl.float32)
    angle = rotary + position.to(tl.int64) * HALF + column
    cosine = tl.load(angle, mask=in_half, other=0.0)[None, :]
    sine = tl.load(angle + rotary_stride, mask=in_half, other=0.0)[None, :]
    low = tl.where(is_value, first, (left * cosine - right * sine).to(dtype))
    high = tl.where(is_value, second, (right * cosine + left * sine).to(dtype))
    if first_head < HEADS:
        tl.store(source, low, mask=inside & is_query)
        tl.store(source + HALF, high, mask=inside & is_query)
    if first_head + HEADS_BLOCK > HEADS:
        slot = tl.load(slots + row)
        if slot >= 0:
            page = tl.load(pages + slot * num_pages + position // PAGE % num_pages).to(tl.int64)
            kv_head = (head - HEADS) % KV_HEADS
            at = (page * KV_HEADS * PAGE + position % PAGE) * (2 * HALF)
            at += kv_head * (PAGE * 2 * HALF) + column[None, :]
            kept_low, kept_high = _kept(low, AS_FLOAT8), _kept(high, AS_FLOAT8)
            is_key = inside & (head >= HEADS) & (head < HEADS + KV_HEADS)
            tl.store(keys + at, kept_low, mask=is_key)
            tl.store(keys + at + HALF, kept_high, mask=is_key)
            tl.store(values + at, kept_low, mask=inside & is_value)
            tl.store(values + at + HALF, kept_high, mask=inside & is_value)


def next_inputs(inputs: torch.Tensor, drawn: torch.Tensor) -> None:
    """A program for every 256 rows."""
    rows = inputs.shape[1]
    _next_inputs[(triton.cdiv(rows, 256),)](inputs, drawn, inputs.stride(0), rows, BLOCK=256)


@triton.jit
def _next_inputs(inputs, drawn, stride, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    tokens = tl.load(drawn + row, mask=inside, other=0)
    positions = tl.load(inputs + stride + row, mask=inside, other=0)
    slots = tl.load(inputs + 2 * stride + row, mask=inside, other=-1)
    real = slots >= 0
    tl.store(inputs + row, tl.where(real, tokens, 0).to(tl.int32), mask=inside)
    tl.store(inputs + stride + row, positions + real.to(tl.int32), mask=inside)


@triton.jit
def _normed(first, second, weight, column, in_half, eps, HALF: tl.constexpr):
    """Each head of [heads, columns of a half]."""
    dtype = first.dtype
    left, right = first.to(tl.float32), second.to(tl.float32)
    total = tl.sum(left * left + right * right, axis=1)
    scale = (1.0 / tl.sqrt_rn(total / (2 * HALF) + eps))[:, None]
    low = tl.load(weight + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
    high = tl.load(weight + HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
    left = (left * scale).to(dtype).to(tl.float32) * low
    right = (right * scale).to(dtype).to(tl.float32) * high
    return left.to(dtype), right.to(dtype)


@triton.jit
def _kept(values, AS_FLOAT8: tl.constexpr):
    """As pages hold them."""
    return to_e4m3(values.to(tl.float32)) if AS_FLOAT8 else values
