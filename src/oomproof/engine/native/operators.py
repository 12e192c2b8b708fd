"""What a decoder layer does besides products with weights, declared once as torch operators.

Each writes into tensors it is given and is its own plain-torch reference: it serves the CPU and
checks the CUDA kernels (kernels_triton.py, attend_triton.py, quantization/gate_cuda.py). Rows are
tokens of one call: `positions` [rows] and `slots` [rows] (int32) say where each stands, in which
request; slot -1 is padding. Keys and values of a layer are pages [pages, kv heads, PAGE_TOKENS,
head dim]; `pages` [slots, n] (int32) lists those of each request, and a request whose tokens need
more than n pages uses them as a ring.
"""

from __future__ import annotations

import torch

from oomproof.memory.kv_cache import PAGE_TOKENS
from oomproof.quantization.library import on_cuda, operator, writes_where_told

_FLOAT8 = torch.float8_e4m3fn
_FLOAT8_MAX = 448.0


@operator("oomproof::add_rms_norm", mutates_args=("hidden", "update"))
def add_rms_norm(
    hidden: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    multiplier: float,
    adds: bool,
) -> None:
    """Adds an update to the hidden states and normalises the sum (RMSNorm, arXiv:1910.07467).

    Args:
        hidden: [rows, hidden]; grows by update × multiplier where `adds`.
        update: [rows, hidden]; replaced by the normalised hidden states.
        weight: [hidden].
        eps: Added to the mean square.
        multiplier: Of the update.
        adds: Whether there is an update; else `update` is only written.
    """
    if adds:
        hidden.copy_(hidden.float() + update.float() * multiplier)
    update.copy_(_rms_norm(hidden, weight, eps))


@operator("oomproof::rotate_and_store", mutates_args=("qkv", "keys", "values"))
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
    """Rotates queries and keys, and puts keys and values into their pages.

    Args:
        qkv: [rows, (heads + 2 kv heads) × head dim]; queries are rotated in place.
        rotary: Cosines and sins, float32 [2, positions, head dim / 2].
        positions: int32 [rows].
        slots: int32 [rows].
        pages: int32 [slots, n].
        keys: [pages, kv heads, PAGE_TOKENS, head dim]; e4m3 without a scale where it is float8.
        values: Likewise.
        q_norm: [head dim], an RMSNorm of each query head before it is rotated, or None.
        k_norm: The same for keys.
        eps: Of these norms.
    """
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    parts = qkv.view(qkv.shape[0], -1, head_dim)
    queries, new_keys, new_values = parts.split((heads, kv_heads, kv_heads), dim=1)
    cosines, sines = (part[positions.long()].unsqueeze(1) for part in rotary)
    rotated = _rotated(_head_norm(new_keys, k_norm, eps), cosines, sines)
    queries.copy_(_rotated(_head_norm(queries, q_norm, eps), cosines, sines))
    real = slots >= 0
    page, offset = _place(positions[real], slots[real], pages)
    for pool, new in ((keys, rotated[real]), (values, new_values[real].float())):
        _bits(pool)[page, :, offset] = _bits(_as_stored(new, pool.dtype))


@operator("oomproof::attend", mutates_args=("out", "partials"))
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
    """Attention of each row to its request's tokens up to its own position.

    Args:
        qkv: [rows, (heads + 2 kv heads) × head dim], queries rotated.
        positions: int32 [rows].
        slots: int32 [rows]; a row of padding comes out as zeros.
        pages: int32 [slots, n].
        keys: [pages, kv heads, PAGE_TOKENS, head dim].
        values: Likewise.
        out: [rows, heads × head dim].
        partials: Scratch, float32 [rows of a decode step, heads, splits, head dim + 2].
        scale: Of the scores.
        window: Tokens that a row looks back at, itself included; 0 for all.
        one_request: Whether all rows are consecutive tokens of one request (a prefill chunk), or
            each is another request's (a decode step).
    """
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    heads = out.shape[1] // head_dim
    queries = qkv[:, : heads * head_dim].view(-1, heads, head_dim)
    result = out.view(-1, heads, head_dim)
    result.zero_()
    rows = [list(range(len(slots)))] if one_request else [[row] for row in range(len(slots))]
    for group in rows:
        slot, last = int(slots[group[0]]), int(positions[group[-1]])
        if slot < 0:
            continue
        first = max(0, int(positions[group[0]]) - window + 1) if window else 0
        span = torch.arange(first, last + 1, device=positions.device)
        page, offset = _place(span, torch.full_like(span, slot), pages)
        seen = span <= positions[group].unsqueeze(1)
        if window:
            seen &= span > positions[group].unsqueeze(1) - window
        result[group] = torch.nn.functional.scaled_dot_product_attention(
            queries[group].transpose(0, 1).unsqueeze(0),
            _read(keys, page, offset, queries.dtype),
            _read(values, page, offset, queries.dtype),
            attn_mask=seen,
            scale=scale,
            enable_gqa=heads != kv_heads,
        )[0].transpose(0, 1)


@operator("oomproof::silu_mul", mutates_args=("out",))
def silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """SwiGLU's gate (Shazeer 2020, arXiv:2002.05202): out = silu(gate) × up.

    Args:
        gate: [rows, width].
        up: [rows, width].
        out: [rows, width]; it may be `gate`.
    """
    out.copy_(torch.nn.functional.silu(gate.float()) * up.float())


@operator("oomproof::next_inputs", mutates_args=("inputs",))
def next_inputs(inputs: torch.Tensor, drawn: torch.Tensor) -> None:
    """Makes the rows of a decode step those of the one after it.

    Args:
        inputs: int32 [3, rows]: tokens, positions and slots. The tokens become those that were
            drawn, and every row but padding goes one position further; padding has token 0.
        drawn: int64 [rows].
    """
    real = inputs[2] >= 0
    inputs[0].copy_(torch.where(real, drawn, 0))
    inputs[1].add_(real)


for _operator, _module, _function in (
    (add_rms_norm, "engine.native.kernels_triton", "add_rms_norm"),
    (rotate_and_store, "engine.native.kernels_triton", "rotate_and_store"),
    (attend, "engine.native.attend_triton", "attend"),
    (silu_mul, "quantization.gate_cuda", "silu_mul"),
    (next_inputs, "engine.native.kernels_triton", "next_inputs"),
):
    _operator.register_fake(writes_where_told)
    _operator.register_kernel("cuda")(on_cuda(f"oomproof.{_module}", _function))


def _rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = values.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    # transformers rounds to the compute dtype before it multiplies with the weight.
    return weight * scaled.to(values.dtype)


def _head_norm(values: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return values if weight is None else _rms_norm(values, weight, eps)


def _rotated(values: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """values [rows, heads, head dim], float32 on return; the halves of a head form the pairs."""
    first, second = values.float().chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def _place(
    positions: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(page, offset within it) of each position."""
    logical = positions.long() // PAGE_TOKENS % pages.shape[1]
    return pages[slots.long(), logical].long(), positions.long() % PAGE_TOKENS


def _read(
    pool: torch.Tensor, page: torch.Tensor, offset: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Tokens of a pool: [1, kv heads, tokens, head dim]."""
    found = _bits(pool)[page, :, offset].view(pool.dtype).to(dtype)
    return found.transpose(0, 1).unsqueeze(0)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """As bytes where it is float8, which torch cannot index."""
    return values.view(torch.uint8) if values.dtype is _FLOAT8 else values


def _as_stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # e4m3 has no infinity: what is too large is the largest value, not NaN.
    if dtype is _FLOAT8:
        return values.clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(dtype)
    return values.to(dtype)
