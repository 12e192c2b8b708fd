"""One decoder layer over one window with gradients: what its weights' errors cost at the end.

A perturbation of a weight W by independent noise in proportion to the norm of its rows, of relative
squared error e, adds e · ½ Σᵢ ‖Wᵢ‖² ‖Gᵢ‖² / columns to the divergence, to second order, where the
gradient G of the outputs is weighted by the Fisher information of the distributions they stand for.
Of one product G = Yᵀ X, with X its inputs and Y the gradients of its outputs, and the squared norms
of its rows are found without it: ‖Gᵢ‖² = Σ over pairs of tokens of (X Xᵀ) · (yᵢ yᵢᵀ). So nothing
here has the size of a weight, and a window of T tokens takes T² numbers.

Its numbers are the engine's; what differs is that autograd follows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from oomproof.models.forward import ForwardSpec
from oomproof.models.spec import AttentionSpec

Sink = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called with (linear, inputs [tokens, columns], gradients of the outputs [tokens, rows])."""


class _Linear(torch.autograd.Function):
    """A product that tells of its inputs and of its outputs' gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        name: str,
        sink: Sink,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.sink = name, sink
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.sink(ctx.name, x, gradient)
        return gradient @ weight, None, None, None, None


def weight_cost(weight: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """½ Σᵢ ‖Wᵢ‖² ‖Gᵢ‖² / columns of a window, a float32 scalar.

    Args:
        weight: [rows, columns].
        x: Inputs [tokens, columns].
        gradient: Of the outputs, [tokens, rows].
    """
    inputs, wide = x.float(), gradient.float()
    pairs = torch.mm(inputs, inputs.t())
    norms = torch.mm(pairs, wide).mul_(wide).sum(dim=0)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    return 0.5 * torch.dot(squares, norms) / weight.shape[1]


def decoder_layer(
    tensors: Mapping[str, torch.Tensor],
    states: torch.Tensor,
    rotary: torch.Tensor,
    forward: ForwardSpec,
    attention: AttentionSpec,
    sink: Sink,
) -> torch.Tensor:
    """The hidden states that leave a layer: [tokens, hidden].

    Args:
        tensors: Name in the layer ("mlp.up_proj.weight") → parameter.
        states: Hidden states of one window, [tokens, hidden].
        rotary: Cosines and sines, float32 [2, at least tokens, head dim / 2].
        forward: The model's numbers.
        attention: The layer's heads.
        sink: Told of every linear while gradients travel back.
    """

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        bias = tensors.get(f"{name}.bias")
        found: torch.Tensor = _Linear.apply(x, tensors[f"{name}.weight"], bias, name, sink)  # type: ignore[no-untyped-call]
        return found

    eps, multiplier = forward.rms_norm_eps, forward.residual_multiplier
    normed = rms_norm(states, tensors["input_layernorm.weight"], eps)
    heads = [linear(normed, f"self_attn.{one}_proj") for one in "qkv"]
    queries, keys, values = (one.view(len(one), -1, attention.key_head_dim) for one in heads)
    turned = []
    for part, name in ((queries, "q_norm"), (keys, "k_norm")):
        weight = tensors.get(f"self_attn.{name}.weight")
        own = part if weight is None else rms_norm(part, weight, eps)
        turned.append(_rotated(own, rotary[:, : len(own)]).to(states.dtype))
    queries, keys, values = (one.transpose(0, 1).unsqueeze(0) for one in (*turned, values))
    attended = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=_mask(len(states), attention.sliding_window, states.device),
        scale=forward.attention_scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    attended = attended[0].transpose(0, 1)
    update = linear(attended.reshape(len(states), -1), "self_attn.o_proj")
    states = states + update * multiplier
    normed = rms_norm(states, tensors["post_attention_layernorm.weight"], eps)
    gate, up = (linear(normed, f"mlp.{one}_proj") for one in ("gate", "up"))
    return states + linear(functional.silu(gate) * up, "mlp.down_proj") * multiplier


def rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), rounded before it is multiplied."""
    wide = values.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * scaled.to(values.dtype)


def fisher_noise(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random gradient of logits whose covariance is their Fisher information.

    For probabilities p it is diag(p) - p pᵀ, that of √p ∘ r - p ⟨√p, r⟩ for random signs r.

    Args:
        logits: float32 [tokens, vocab].
        generator: Of the signs, on the CPU.
    """
    probabilities = torch.softmax(logits, dim=1)
    signs = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8)
    noise = signs.to(logits.device).float().mul_(2).sub_(1).mul_(probabilities.sqrt())
    return noise.sub_(probabilities * noise.sum(dim=1, keepdim=True))


def _rotated(values: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """values [tokens, heads, head dim], float32 on return; the halves of a head form the pairs."""
    cosines, sines = (part.unsqueeze(1) for part in rotary)
    first, second = values.float().chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def _mask(tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [tokens, tokens]: what each token looks at."""
    place = torch.arange(tokens, device=device)
    back = place.unsqueeze(1) - place
    return (back >= 0) & (back < (window or tokens))
