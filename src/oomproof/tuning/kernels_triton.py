"""Training's kernels in Triton; operators.py says what each computes.

Every launch writes into tensors it is given, allocates nothing and does not wait.
"""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oomproof.tuning.launch_triton import launch

_PAIRS_PER_PROGRAM = 1024
_VOCAB_BLOCK = 4096
_ROW_BLOCK = 1024
_LOW_TILE = (64, 64)
"""(rows, columns) of a program that adds adapters' products."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """A program a row."""
    rows, width = x.shape
    block, warps = _row_of(width)
    launch(
        _rms_norm,
        (rows, 1, 1),
        x,
        weight,
        out,
        x.stride(0),
        out.stride(0),
        width,
        eps,
        BLOCK=block,
        num_warps=warps,
    )


def accumulate(
    stream: torch.Tensor,
    update: torch.Tensor,
    rounded: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
) -> None:
    """A program a row."""
    rows, width = stream.shape
    block, warps = _row_of(width)
    launch(
        _accumulate,
        (rows, 1, 1),
        stream,
        update,
        rounded,
        weight,
        out,
        stream.stride(0),
        update.stride(0),
        0 if rounded is None else rounded.stride(0),
        0 if out is None else out.stride(0),
        width,
        eps,
        ROUNDS=rounded is not None,
        NORMS=weight is not None,
        BLOCK=block,
        num_warps=warps,
    )


def rms_norm_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    adds: bool,
    rounded: torch.Tensor | None,
) -> None:
    """A program a row."""
    rows, width = x.shape
    block, warps = _row_of(width)
    launch(
        _rms_norm_backward,
        (rows, 1, 1),
        grad_out,
        x,
        weight,
        grad,
        rounded,
        grad_out.stride(0),
        x.stride(0),
        grad.stride(0),
        0 if rounded is None else rounded.stride(0),
        width,
        eps,
        ADDS=adds,
        ROUNDS=rounded is not None,
        BLOCK=block,
        num_warps=warps,
    )


def rotate(
    x: torch.Tensor,
    rotary: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """A program a row and block of heads."""
    _rotation(x, x, rotary, positions, weight, eps, out, backward=False)


def rotate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    rotary: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """A program a row and block of heads."""
    _rotation(grad, x, rotary, positions, weight, eps, out, backward=True)


def _rotation(
    grad: torch.Tensor,
    x: torch.Tensor,
    rotary: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    *,
    backward: bool,
) -> None:
    rows, heads, head_dim = grad.shape
    block = triton.next_power_of_2(head_dim // 2)
    heads_block = min(triton.next_power_of_2(heads), max(1, _PAIRS_PER_PROGRAM // block))
    launch(
        _rotate,
        (rows, triton.cdiv(heads, heads_block), 1),
        grad,
        x,
        rotary,
        positions,
        weight,
        out,
        *grad.stride()[:2],
        *x.stride()[:2],
        *out.stride()[:2],
        rotary.stride(0),
        heads,
        eps,
        HEADS_BLOCK=heads_block,
        HALF=head_dim // 2,
        BLOCK=block,
        NORMED=weight is not None,
        BACKWARD=backward,
        num_warps=4,
    )


def silu_mul_backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> None:
    """A program a block of a row."""
    rows, width = grad.shape
    launch(
        _silu_mul_backward,
        (rows, triton.cdiv(width, _ROW_BLOCK), 1),
        gate,
        up,
        grad,
        gate.stride(0),
        up.stride(0),
        grad.stride(0),
        width,
        BLOCK=_ROW_BLOCK,
        num_warps=4,
    )


def silu_mul_low(
    gate: torch.Tensor,
    up: torch.Tensor,
    low: torch.Tensor,
    gate_b: torch.Tensor,
    up_b: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """A program a tile."""
    _with_low(gate, up, low, gate_b, up_b, scale, out, backward=False)


def silu_mul_low_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    low: torch.Tensor,
    gate_b: torch.Tensor,
    up_b: torch.Tensor,
    scale: float,
    grad: torch.Tensor,
) -> None:
    """A program a tile."""
    _with_low(gate, up, low, gate_b, up_b, scale, grad, backward=True)


def _with_low(
    gate: torch.Tensor,
    up: torch.Tensor,
    low: torch.Tensor,
    gate_b: torch.Tensor,
    up_b: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    *,
    backward: bool,
) -> None:
    rows, width = out.shape
    rank = gate_b.shape[1]
    height, columns = _LOW_TILE
    launch(
        _silu_mul_low,
        (triton.cdiv(width, columns), triton.cdiv(rows, height), 1),
        gate,
        up,
        low,
        gate_b,
        up_b,
        out,
        gate.stride(0),
        up.stride(0),
        low.stride(0),
        out.stride(0),
        rows,
        width,
        scale,
        RANK=rank,
        # What a matrix instruction takes at least.
        PADDED=max(16, triton.next_power_of_2(rank)),
        ROWS=height,
        COLUMNS=columns,
        BACKWARD=backward,
        num_warps=8,
    )


def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    inverse: float,
    scale: torch.Tensor,
    losses: torch.Tensor,
    writes_grad: bool,
) -> None:
    """A program a row, which is read again from the second cache."""
    rows, vocab = logits.shape
    launch(
        _cross_entropy,
        (rows, 1, 1),
        logits,
        labels,
        scale,
        losses,
        logits.stride(0),
        vocab,
        inverse,
        WRITES=writes_grad,
        BLOCK=_VOCAB_BLOCK,
        num_warps=16,
    )


def drop(x: torch.Tensor, seed: int, probability: float, out: torch.Tensor, adds: bool) -> None:
    """A program a block of a row."""
    rows, columns = x.shape
    _drop[(rows, triton.cdiv(columns, _ROW_BLOCK))](
        x,
        out,
        x.stride(0),
        out.stride(0),
        columns,
        seed,
        round(probability * 2**32),
        1 / (1 - probability),
        ADDS=adds,
        BLOCK=_ROW_BLOCK,
        num_warps=4,
    )


def _row_of(width: int) -> tuple[int, int]:
    """(elements of a program, warps)."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))


@triton.jit
def _rms_norm(x, weight, out, x_stride, out_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / width + eps)
    normed = (wide * scale).to(values.dtype).to(tl.float32)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = (normed * weights).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, normed, mask=inside)


@triton.jit
def _accumulate(
    stream, update, rounded, weight, out,
    stream_stride, update_stride, rounded_stride, out_stride, width, eps,
    ROUNDS: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    added = tl.load(update + row * update_stride + column, mask=inside, other=0.0)
    place = stream + row * stream_stride + column
    total = tl.load(place, mask=inside, other=0.0) + added.to(tl.float32)
    tl.store(place, total, mask=inside)
    values = total.to(added.dtype)
    if ROUNDS:
        tl.store(rounded + row * rounded_stride + column, values, mask=inside)
    if NORMS:
        wide = values.to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / width + eps)
        normed = (wide * scale).to(values.dtype).to(tl.float32)
        weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        normed = (normed * weights).to(values.dtype)
        tl.store(out + row * out_stride + column, normed, mask=inside)


@triton.jit
def _rms_norm_backward(
    grad_out, x, weight, grad, rounded,
    grad_out_stride, x_stride, grad_stride, rounded_stride, width, eps,
    ADDS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(grad_out + row * grad_out_stride + column, mask=inside, other=0.0).to(
        tl.float32
    )
    above *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    place = grad + row * grad_stride + column
    inverse = 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / width + eps)
    normed = values * inverse
    found = inverse * (above - normed * (tl.sum(above * normed, axis=0) / width))
    if ADDS:
        found += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, found.to(grad.dtype.element_ty), mask=inside)
    if ROUNDS:
        place = rounded + row * rounded_stride + column
        tl.store(place, found.to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    grad, x, rotary, positions, weight, out,
    grad_row, grad_head, x_row, x_head, out_row, out_head, rotary_stride, heads, eps,
    HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    NORMED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Forward, `grad` is what is rotated."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK))[:, None]
    column = tl.arange(0, BLOCK)
    in_half = column < HALF
    inside = (head < heads) & in_half[None, :]
    source = grad + row * grad_row + head * grad_head + column[None, :]
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    dtype = out.dtype.element_ty
    angle = rotary + tl.load(positions + row).to(tl.int64) * HALF + column
    cosine = tl.load(angle, mask=in_half, other=0.0)[None, :]
    sine = tl.load(angle + rotary_stride, mask=in_half, other=0.0)[None, :]
    left, right = first.to(tl.float32), second.to(tl.float32)
    if NORMED:
        low = tl.load(weight + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
        high = tl.load(weight + HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:
        turned = left * cosine + right * sine
        right = right * cosine - left * sine
        left = turned
        if NORMED:
            before = x + row * x_row + head * x_head + column[None, :]
            one = tl.load(before, mask=inside, other=0.0).to(tl.float32)
            other = tl.load(before + HALF, mask=inside, other=0.0).to(tl.float32)
            inverse = _inverse(one, other, eps, HALF)
            one, other = one * inverse, other * inverse
            left, right = left * low, right * high
            mean = (tl.sum(left * one + right * other, axis=1) / (2 * HALF))[:, None]
            left, right = inverse * (left - one * mean), inverse * (right - other * mean)
    else:
        if NORMED:
            inverse = _inverse(left, right, eps, HALF)
            left = ((left * inverse).to(dtype).to(tl.float32) * low).to(dtype).to(tl.float32)
            right = ((right * inverse).to(dtype).to(tl.float32) * high).to(dtype).to(tl.float32)
        turned = left * cosine - right * sine
        right = right * cosine + left * sine
        left = turned
    place = out + row * out_row + head * out_head + column[None, :]
    tl.store(place, left.to(dtype), mask=inside)
    tl.store(place + HALF, right.to(dtype), mask=inside)


@triton.jit
def _inverse(left, right, eps, HALF: tl.constexpr):
    total = tl.sum(left * left + right * right, axis=1)
    return (1.0 / tl.sqrt_rn(total / (2 * HALF) + eps))[:, None]


@triton.jit
def _silu_mul_backward(
    gate, up, grad, gate_stride, up_stride, grad_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate += row * gate_stride + column
    up += row * up_stride + column
    grad += row * grad_stride + column
    left = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(up, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-left))
    silu = left * sigmoid
    dtype = grad.dtype.element_ty
    tl.store(grad, (silu * right).to(dtype), mask=inside)
    tl.store(up, (above * silu).to(dtype), mask=inside)
    inner = above * right * sigmoid * (1.0 + left * (1.0 - sigmoid))
    tl.store(gate, inner.to(dtype), mask=inside)


@triton.jit
def _silu_mul_low(
    gate, up, low, gate_b, up_b, out,
    gate_stride, up_stride, low_stride, out_stride, rows, width, scale,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """`out` is the gradient of the result, and then the result, where BACKWARD."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows) & (column < width)[None, :]
    gate += row * gate_stride + column[None, :]
    up += row * up_stride + column[None, :]
    out += row * out_stride + column[None, :]
    left = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(up, mask=inside, other=0.0).to(tl.float32)
    rank = tl.arange(0, PADDED)[None, :]
    in_low = (row < rows) & (rank < RANK)
    low += row * low_stride + rank
    in_b = (column < width)[:, None] & (rank < RANK)
    place = column[:, None] * RANK + rank
    one = tl.load(low, mask=in_low, other=0.0)
    other = tl.load(low + RANK, mask=in_low, other=0.0)
    one_b = tl.load(gate_b + place, mask=in_b, other=0.0)
    other_b = tl.load(up_b + place, mask=in_b, other=0.0)
    left += scale * tl.dot(one, tl.trans(one_b), input_precision="ieee")
    right += scale * tl.dot(other, tl.trans(other_b), input_precision="ieee")
    sigmoid = 1.0 / (1.0 + tl.exp(-left))
    silu = left * sigmoid
    dtype = out.dtype.element_ty
    if BACKWARD:
        above = tl.load(out, mask=inside, other=0.0).to(tl.float32)
        tl.store(up, (above * silu).to(dtype), mask=inside)
        inner = above * right * sigmoid * (1.0 + left * (1.0 - sigmoid))
        tl.store(gate, inner.to(dtype), mask=inside)
    tl.store(out, (silu * right).to(dtype), mask=inside)


@triton.jit
def _cross_entropy(
    logits, labels, scale, losses, stride, vocab, inverse,
    WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    # Before any of them is written over.
    chosen = tl.load(logits + label).to(tl.float32) * inverse
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab, BLOCK):
        column = first + tl.arange(0, BLOCK)
        values = tl.load(logits + column, mask=column < vocab, other=float("-inf"))
        values = values.to(tl.float32) * inverse
        larger = tl.maximum(most, values)
        # Columns behind the last have seen nothing but -inf.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - shift) + tl.exp(values - shift)
        most = larger
    highest = tl.max(most, axis=0)
    total = tl.sum(total * tl.exp(most - highest), axis=0)
    log_sum = highest + tl.log(total)
    tl.store(losses + row, log_sum - chosen)
    if WRITES:
        factor = tl.load(scale) * inverse
        tl.debug_barrier()
        for first in range(0, vocab, BLOCK):
            column = first + tl.arange(0, BLOCK)
            values = tl.load(logits + column, mask=column < vocab, other=0.0).to(tl.float32)
            found = tl.exp(values * inverse - log_sum)
            found = tl.where(column == label, found - 1.0, found) * factor
            tl.store(logits + column, found.to(logits.dtype.element_ty), mask=column < vocab)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _drop(
    x, out, x_stride, out_stride, columns, seed, threshold, factor,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = (row * columns + column).to(tl.uint32)
    bits = _hashed(_hashed(place ^ seed.to(tl.uint32)) + seed.to(tl.uint32))
    kept = bits.to(tl.int64) >= threshold
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    found = tl.where(kept, values * factor, 0.0)
    into = out + row * out_stride + column
    if ADDS:
        found += tl.load(into, mask=inside, other=0.0).to(tl.float32)
    tl.store(into, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _hashed(values):
    """See operators._hashed."""
    values = (values ^ (values >> 16)) * 0x7FEB352D
    values = (values ^ (values >> 15)) * 0x846CA68B
    return values ^ (values >> 16)
