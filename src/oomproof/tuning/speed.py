"""How long training takes, from its arithmetic and measured efficiency. Free of torch.

A frozen weight has no gradient of its own: a product forward, one backward, and one more where the
forward's result was not kept. Attention's backward pass is two and a half forward ones
(FlashAttention-2, arXiv:2307.08691).
"""

from __future__ import annotations

from dataclasses import dataclass

from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.training_shape import PROJECTIONS, Kept, linear_shapes
from oomproof.models.spec import ModelSpec, Role

_ATTENTION_BACKWARD = 2.5
_KEPT_AS = {"qkv": "qkv", "o": "mid", "gate_up": "gate_up"}
"""Projection → what is kept in the place of its product; nothing needs that of "down" again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """How near an engine's training comes to the limits of a device."""

    products: float
    """Share of the datasheet's 16-bit FLOP/s that products with weights reach."""
    attention: float
    """The same of attention, whose future half is not counted."""
    layer_s: float
    """What a layer of a micro-batch costs besides: dequantization, norms, launches."""
    measured: str
    """When, on which device, with which versions."""


_SOURCE = (
    "2026-11-21, NVIDIA H200, torch 2.11, nf4-dq, rank 16 on all linears "
    "(benchmarks/results/tuning-h200.jsonl)"
)
EFFICIENCIES: dict[str, Efficiency] = {
    # Least squares over the 11 rows of 8B and 70B with cuDNN's attention and adamw, from nothing to
    # everything kept: within 3 %. Flash attention, of packed documents, takes some 5 % longer.
    "native": Efficiency(
        products=0.587, attention=0.533, layer_s=0.59e-3, measured=f"{_SOURCE}, Triton 3.6"
    ),
    # Three rows of an 8B for three numbers. Its launches are bound by the host: on another one the
    # shortest row took 0.57 s and not 0.80.
    "transformers": Efficiency(
        products=0.588,
        attention=0.648,
        layer_s=20e-3,
        measured=f"{_SOURCE}, transformers 5.17, peft, bitsandbytes 0.50.2",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The arithmetic of some tokens."""

    products: float
    """FLOPs of products with weights."""
    attention: float

    @property
    def flops(self) -> float:
        """All of them."""
        return self.products + self.attention


def work_of(
    spec: ModelSpec, *, tokens: float, document: float, kept: Kept | None, recompute: bool
) -> Work:
    """What training on some tokens computes.

    Args:
        spec: The model.
        tokens: All of them.
        document: Tokens that a token's attention reaches over: those of its document.
        kept: Layers that keep what would be computed again; None for all or none of them.
        recompute: Whether, where `kept` is None, layers are computed again whole.
    """
    head = spec.vocab_size * spec.hidden_size
    linears = sum(one.numel for one in spec.tensors if one.role is Role.LINEAR)
    layers, again, attended_again = spec.num_hidden_layers, 0.0, 0.0
    if kept is not None:
        shapes = linear_shapes(spec)
        for projection, name in _KEPT_AS.items():
            size = sum(shapes[one][0] * shapes[one][1] for one in PROJECTIONS[projection])
            again += (layers - getattr(kept, name)) * size
        attended_again = 1 - kept.attention / layers
    elif recompute:
        again, attended_again = float(linears), 1.0
    widths = sum(
        spec.num_attention_heads * (one.query_head_dim + one.output_head_dim)
        for one in spec.attention
    )
    passes = 1 + _ATTENTION_BACKWARD + attended_again
    return Work(
        products=2 * tokens * (2 * (linears + head) + again),
        attention=tokens * document * widths * passes,
    )


def seconds_of(
    spec: ModelSpec, device: DeviceSpec, engine: str, work: Work, *, micro_batches: int
) -> float | None:
    """How long that takes; None where the device's FLOP/s are not known.

    Args:
        spec: The model.
        device: Where.
        engine: A key of EFFICIENCIES.
        work: Of all micro-batches.
        micro_batches: How many there are.
    """
    if device.flops_per_s is None:
        return None
    found = EFFICIENCIES[engine]
    weighted = work.products / found.products + work.attention / found.attention
    overhead = micro_batches * spec.num_hidden_layers * found.layer_s
    return weighted / device.flops_per_s + overhead
