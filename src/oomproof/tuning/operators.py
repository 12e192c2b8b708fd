"""What training computes besides matrix products and attention, declared once as torch operators.

Each writes into tensors it is given, and is its own plain-torch reference: it serves the CPU and
checks the Triton kernels (kernels_triton.py). Gradients of a norm, a rotation or a gate take what
the forward pass took, and need nothing that it left.
"""

from __future__ import annotations

import torch

from oomproof.quantization.library import on_cuda, operator, writes_where_told

_HASH = ((16, 0x7FEB352D), (15, 0x846CA68B))
_32_BITS = 0xFFFFFFFF


@operator("oomproof::rms_norm", mutates_args=("out",))
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """RMSNorm (arXiv:1910.07467): x and out [rows, hidden], weight [hidden]."""
    # transformers rounds to the compute dtype before it multiplies with the weight.
    out.copy_(weight * (_wide(x) * _inverse_rms(x, eps)).to(x.dtype))


@operator("oomproof::accumulate", mutates_args=("stream", "rounded", "out"))
def accumulate(
    stream: torch.Tensor,
    update: torch.Tensor,
    rounded: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
) -> None:
    """Adds an update to hidden states in float32, rounds them, and normalises what was rounded.

    Args:
        stream: float32 [rows, hidden].
        update: [rows, hidden].
        rounded: Where the rounded sum goes, [rows, hidden], or None.
        weight: [hidden], of the RMSNorm that follows; None for no norm.
        eps: Of the norm.
        out: Its result, [rows, hidden], where there is a weight; it may be `update`.
    """
    stream.add_(update)
    if rounded is not None:
        rounded.copy_(stream)
    if weight is not None and out is not None:
        # What the backward pass finds in `rounded` is then what was normalised, bit by bit.
        x = stream.to(out.dtype)
        out.copy_(weight * (_wide(x) * _inverse_rms(x, eps)).to(x.dtype))


@operator("oomproof::rms_norm_backward", mutates_args=("grad", "rounded"))
def rms_norm_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    grad: torch.Tensor,
    adds: bool,
    rounded: torch.Tensor | None,
) -> None:
    """The gradient of RMSNorm's input.

    Args:
        grad_out: Of its output, [rows, hidden].
        x: Its input.
        weight: [hidden].
        eps: Added to the mean square.
        grad: [rows, hidden]; grows by the gradient where `adds`, else is replaced. It may be x.
        adds: Whether the input went on beside the norm too.
        rounded: Where `grad` goes in fewer bits too, or None; it may be grad_out.
    """
    found = _norm_backward(grad_out, x, weight, eps)
    grad.copy_(_wide(grad) + found if adds else found)
    if rounded is not None:
        rounded.copy_(grad)


@operator("oomproof::rotate", mutates_args=("out",))
def rotate(
    x: torch.Tensor,
    rotary: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """Rotary positions (arXiv:2104.09864) of heads, normalised first where there is a weight.

    Args:
        x: [rows, heads, head dim], x.stride(2) == 1.
        rotary: Cosines and sines, float32 [2, positions, head dim / 2].
        positions: int32 [rows].
        weight: Of an RMSNorm of each head, [head dim], or None.
        eps: Of that norm.
        out: As x; it may be x.
    """
    normed = x
    if weight is not None:
        normed = weight * (_wide(x) * _inverse_rms(x, eps)).to(x.dtype)
    out.copy_(_rotated(_wide(normed), rotary, positions, 1))


@operator("oomproof::rotate_backward", mutates_args=("out",))
def rotate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    rotary: torch.Tensor,
    positions: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """The gradient of what `rotate` took.

    Args:
        grad: Of its output, [rows, heads, head dim].
        x: What it took; not read without a weight.
        rotary: As there, as the following three.
        positions: int32 [rows].
        weight: Of the norm, or None.
        eps: Of the norm.
        out: [rows, heads, head dim]; it may be x.
    """
    turned = _rotated(_wide(grad), rotary, positions, -1)
    out.copy_(turned if weight is None else _norm_backward(turned, x, weight, eps))


@operator("oomproof::silu_mul_low", mutates_args=("out",))
def silu_mul_low(
    gate: torch.Tensor,
    up: torch.Tensor,
    low: torch.Tensor,
    gate_b: torch.Tensor,
    up_b: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """SwiGLU's gate (arXiv:2002.05202) of products whose adapters' part is added on the way.

    Args:
        gate: Of the frozen weights, [rows, width].
        up: Likewise.
        low: Inputs times A of gate, then of up: [rows, 2 × rank].
        gate_b: [width, rank].
        up_b: [width, rank].
        scale: Of the adapters.
        out: silu(gate + scale × low gate_bᵀ) × (up + …), [rows, width]; it may be `gate`.
    """
    left, right = _with_low(gate, up, low, gate_b, up_b, scale)
    out.copy_(torch.nn.functional.silu(left) * right)


@operator("oomproof::silu_mul_low_backward", mutates_args=("gate", "up", "grad"))
def silu_mul_low_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    low: torch.Tensor,
    gate_b: torch.Tensor,
    up_b: torch.Tensor,
    scale: float,
    grad: torch.Tensor,
) -> None:
    """`silu_mul_backward` of what `silu_mul_low` takes.

    Args:
        gate: As there; replaced by the gradient of the whole product.
        up: Likewise.
        low: As there, as the following three.
        gate_b: [width, rank].
        up_b: [width, rank].
        scale: Of the adapters.
        grad: Of the result, [rows, width]; replaced by the result itself.
    """
    left, right = _with_low(gate, up, low, gate_b, up_b, scale)
    _gate_backward(left, right, gate, up, grad)


@operator("oomproof::silu_mul_backward", mutates_args=("gate", "up", "grad"))
def silu_mul_backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> None:
    """Gradients of SwiGLU's gate, each in the place of what it belongs to.

    Args:
        gate: [rows, width]; replaced by its gradient.
        up: [rows, width]; replaced by its gradient.
        grad: Of silu(gate) × up, [rows, width]; replaced by that product itself.
    """
    _gate_backward(_wide(gate), _wide(up), gate, up, grad)


@operator("oomproof::cross_entropy_", mutates_args=("logits", "losses"))
def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    inverse: float,
    scale: torch.Tensor,
    losses: torch.Tensor,
    writes_grad: bool,
) -> None:
    """Cross-entropy of each row, and its gradient in the place of the logits; in float32.

    Args:
        logits: [rows, vocab].
        labels: int64 [rows], each in the vocabulary.
        inverse: What logits are multiplied by first.
        scale: float32 [1]: what gradients are multiplied by.
        losses: float32 [rows].
        writes_grad: Whether logits are replaced.
    """
    wide = _wide(logits) * inverse
    losses.copy_(torch.nn.functional.cross_entropy(wide, labels, reduction="none"))
    if writes_grad:
        grad = torch.softmax(wide, dim=1)
        grad[torch.arange(len(labels), device=labels.device), labels] -= 1
        logits.copy_(grad * (scale * inverse))


@operator("oomproof::drop", mutates_args=("out",))
def drop(x: torch.Tensor, seed: int, probability: float, out: torch.Tensor, adds: bool) -> None:
    """Dropout whose mask is a function of a seed and of each element's place: never stored.

    Args:
        x: [rows, columns].
        seed: From 0 to 2³¹ - 1.
        probability: Of an element to become 0; the others are divided by 1 - probability.
        out: [rows, columns]; it may be x.
        adds: Whether the result is added to out, rather than written.
    """
    rows, columns = x.shape
    place = torch.arange(rows * columns, device=x.device).view(rows, columns)
    kept = _hashed(_hashed(place ^ seed) + seed) >= round(probability * 2**32)
    found = _wide(x) * kept / (1 - probability)
    out.copy_(_wide(out) + found if adds else found)


for _operator, _function in (
    (rms_norm, "rms_norm"),
    (accumulate, "accumulate"),
    (rms_norm_backward, "rms_norm_backward"),
    (rotate, "rotate"),
    (rotate_backward, "rotate_backward"),
    (silu_mul_low, "silu_mul_low"),
    (silu_mul_low_backward, "silu_mul_low_backward"),
    (silu_mul_backward, "silu_mul_backward"),
    (cross_entropy_, "cross_entropy_"),
    (drop, "drop"),
):
    _operator.register_fake(writes_where_told)
    _operator.register_kernel("cuda")(on_cuda("oomproof.tuning.kernels_triton", _function))


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype is torch.float64 else values.float()


def _with_low(
    gate: torch.Tensor,
    up: torch.Tensor,
    low: torch.Tensor,
    gate_b: torch.Tensor,
    up_b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = _wide(low).chunk(2, dim=1)
    return (
        _wide(gate) + scale * (left @ _wide(gate_b).t()),
        _wide(up) + scale * (right @ _wide(up_b).t()),
    )


def _gate_backward(
    left: torch.Tensor,
    right: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grad: torch.Tensor,
) -> None:
    above = _wide(grad)
    sigmoid = torch.sigmoid(left)
    silu = left * sigmoid
    inner = above * right * sigmoid * (1 + left * (1 - sigmoid))
    grad_up, product = above * silu, silu * right
    gate.copy_(inner)
    up.copy_(grad_up)
    grad.copy_(product)


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(_wide(x).pow(2).mean(dim=-1, keepdim=True) + eps)


def _norm_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    inverse = _inverse_rms(x, eps)
    normed, weighted = _wide(x) * inverse, _wide(grad_out) * _wide(weight)
    return inverse * (weighted - normed * (weighted * normed).mean(dim=-1, keepdim=True))


def _rotated(
    x: torch.Tensor, rotary: torch.Tensor, positions: torch.Tensor, direction: int
) -> torch.Tensor:
    cosines, sines = (part[positions.long()].unsqueeze(1) for part in rotary)
    left, right = x.chunk(2, dim=-1)
    sines = direction * sines
    return torch.cat((left * cosines - right * sines, right * cosines + left * sines), dim=-1)


def _hashed(values: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits (lowbias32, Wellons 2018) of each int64."""
    values = values & _32_BITS
    for shift, factor in _HASH:
        values = (values ^ (values >> shift)) * factor & _32_BITS
    return values ^ (values >> 16)
