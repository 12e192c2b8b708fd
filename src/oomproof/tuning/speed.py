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
    launch_s: float
    """Of the host for a layer of a pass: no pass is faster than its launches."""
    measured: str
    """When, on which device, with which versions."""


_SOURCE = "2026-11-21, NVIDIA H200, torch 2.11, nf4-dq, rank 16 on all linears"
EFFICIENCIES: dict[str, Efficiency] = {
    # Least squares over the 11 rows of 8B and 70B with cuDNN's attention and adamw, from nothing to
    # everything kept: within 3 %. Flash attention, of packed documents, takes some 5 % longer.
    "native": Efficiency(
        products=0.587,
        attention=0.533,
        layer_s=0.59e-3,
        launch_s=0.0,
        measured=f"{_SOURCE}, Triton 3.6 (benchmarks/results/tuning-h200.jsonl)",
    ),
    # An 8B's rows with enough tokens for arithmetic and casts to float32, which go with them, and
    # its fastest row of 2,048 tokens for the host; a slower one took a third longer.
    "transformers": Efficiency(
        products=0.294,
        attention=0.56,
        layer_s=0.0,
        launch_s=4.2e-3,
        measured=f"{_SOURCE}, transformers 5.17, peft, bitsandbytes 0.50.2 "
        "(benchmarks/results/tuning-peft-h200.jsonl)",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The arithmetic of some tokens."""

    products: float
    """FLOPs of products with weights."""
    attention: float
    passes: int
    """Through each layer: two, and one more where it is computed again."""

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
        passes=3 if again else 2,
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
    layers = micro_batches * spec.num_hidden_layers
    computed = weighted / device.flops_per_s + layers * found.layer_s
    return max(computed, layers * work.passes * found.launch_s)
