"""Every buffer of training LoRA adapters on frozen weights, by name and shape.

The trainer (tuning/) carves exactly these, so that its peak is a sum of shapes and not an estimate.
T is the most tokens of one step. Checkpoints are the inputs of layers (Chen et al. 2016,
arXiv:1604.06174); logits exist for some tokens at a time only (Liger Kernel, arXiv:2410.10989; Cut
Cross-Entropy, arXiv:2411.09009).
"""

from __future__ import annotations

from oomproof.formats import DType, ceil_div, get_format
from oomproof.memory.arena import Buffer, Layout, lay_out
from oomproof.memory.training_shape import (
    PROJECTIONS,
    TrainingShape,
    adapter_numel,
    adapter_shapes,
    linear_shapes,
    widths_of,
)
from oomproof.models.spec import ModelSpec
from oomproof.units import MIB, round_up

LOSS_TOKENS = 1024
"""Tokens whose logits exist at once, at most."""
_LOSS_BYTES = 256 * MIB
ALLOCATION_BYTES = 512
"""torch's CUDA allocator hands out multiples of this."""
SLICE_ROWS = 128
"""Slices of a weight are multiples of so many rows."""
_STREAM = DType.FLOAT32
_FLASH_ROWS = 128
"""To which attention's backward pads each sequence."""


def most_together(spec: ModelSpec, shape: TrainingShape) -> int:
    """Adapted linears of a projection, at most."""
    adapted = adapter_shapes(spec, shape.rank, shape.targets)
    return max(sum(name in adapted for name in names) for names in PROJECTIONS.values())


def loss_tokens(spec: ModelSpec, shape: TrainingShape) -> int:
    """Tokens whose logits exist at once."""
    fit = _LOSS_BYTES // (spec.vocab_size * shape.compute_dtype.itemsize)
    return min(shape.tokens, shape.loss_tokens or max(64, min(LOSS_TOKENS, fit // 64 * 64)))


def scratch_bytes(spec: ModelSpec, shape: TrainingShape) -> int:
    """Where weights are dequantized to: the largest projection, or slices of it."""
    if not get_format(shape.format).is_quantized:
        return 0
    shapes, item = linear_shapes(spec), shape.compute_dtype.itemsize
    largest = max(
        sum(shapes[name][0] for name in names) * shapes[names[0]][1] * item
        for names in PROJECTIONS.values()
    )
    row = max(columns for _, columns in shapes.values()) * item
    return min(largest, max(shape.scratch_bytes, SLICE_ROWS * row))


CHECKPOINT_SLOTS = 3
"""Inputs of layers on the device where they wait on the host: one is written, one read, one on its
way."""


def static_buffers(spec: ModelSpec, shape: TrainingShape) -> tuple[Buffer, ...]:
    """What is there from the first step to the last, adapters aside."""
    w, tokens, kept = widths_of(spec), shape.tokens, shape.kept
    compute, adapters = shape.compute_dtype, adapter_numel(spec, shape.rank, shape.targets)
    linears = adapter_shapes(spec, shape.rank, shape.targets)
    slots = min(w.layers, CHECKPOINT_SLOTS) if shape.offload_checkpoints else w.layers
    buffers = [
        Buffer(name="checkpoints", shape=(slots, tokens, w.hidden), dtype=compute),
        # The sum of all layers' updates, then its gradient: 16 bits would lose what adapters add.
        Buffer(name="stream", shape=(tokens, w.hidden), dtype=_STREAM),
        # What products take and give of it.
        Buffer(name="rounded", shape=(tokens, w.hidden), dtype=compute),
        Buffer(name="scratch", shape=(scratch_bytes(spec, shape),), dtype=DType.UINT8),
        Buffer(name="rotary", shape=(2, shape.positions, w.head_dim // 2), dtype=DType.FLOAT32),
        # Adapters of the layer at work in the compute dtype, and their gradients.
        Buffer(name="adapters", shape=(adapters,), dtype=compute),
        Buffer(name="adapter_grads", shape=(adapters,), dtype=compute),
        # Each adapted linear's input times its A: small, and needed three times.
        Buffer(
            name="low",
            shape=(w.layers, tokens, len(linears) * shape.rank),
            dtype=compute,
        ),
        Buffer(name="losses", shape=(tokens,), dtype=DType.FLOAT32),
        *(
            Buffer(name=f"kept.{name}", shape=(count, tokens, width), dtype=dtype)
            for name, count, width, dtype in (
                ("attention", kept.attention, w.queries, compute),
                ("lse", kept.attention, w.heads, DType.FLOAT32),
                ("mid", kept.mid, w.hidden, compute),
                ("qkv", kept.qkv, w.qkv, compute),
                ("gate_up", kept.gate_up, 2 * w.mlp, compute),
            )
            if count
        ),
    ]
    return tuple(buffers)


PHASES = (
    "forward.attention",
    "forward.mlp",
    "loss",
    "backward.mlp",
    "backward.attention",
)


def phase_buffers(spec: ModelSpec, shape: TrainingShape, phase: str) -> tuple[Buffer, ...]:
    """What lives as long as one phase of one layer; phases follow each other."""
    w, tokens, compute, kept = widths_of(spec), shape.tokens, shape.compute_dtype, shape.kept

    def rows(name: str, columns: int, *, when: bool = True) -> list[Buffer]:
        return [Buffer(name=name, shape=(tokens, columns), dtype=compute)] if when else []

    def least(count: int) -> bool:
        """Whether some layer does not keep it."""
        return count < w.layers

    low = most_together(spec, shape) * shape.rank
    rotated = rows("rotated", w.queries + w.keys, when=w.normed_heads)
    match phase:
        case "forward.attention":
            found = [
                *rows("qkv", w.qkv, when=least(kept.qkv)),
                *rotated,
                *rows("dropped", max(w.hidden, w.queries), when=shape.dropout),
            ]
        case "forward.mlp":
            found = [
                *rows("gate_up", 2 * w.mlp, when=least(kept.gate_up)),
                *rows("gated", w.mlp, when=kept.gate_up > 0),
                *rows("dropped", max(w.hidden, w.mlp), when=shape.dropout),
            ]
        case "loss":
            count = loss_tokens(spec, shape)
            found = [
                Buffer(name="picked", shape=(count, w.hidden), dtype=_STREAM),
                # And then its gradient.
                Buffer(name="normed", shape=(count, w.hidden), dtype=compute),
                Buffer(name="logits", shape=(count, w.vocab), dtype=compute),
            ]
        case "backward.mlp":
            found = [
                *rows("mid", w.hidden, when=least(kept.mid)),
                *rows("normed", w.hidden),
                *rows("grad_normed", w.hidden),
                *rows("gate_up", 2 * w.mlp, when=least(kept.gate_up)),
                *rows("gated", w.mlp),
                *rows("grad_low", low),
                *rows("dropped", max(w.hidden, w.mlp), when=shape.dropout),
            ]
        case "backward.attention":
            found = [
                *rows("normed", w.hidden),
                # Of the heads' outputs, then of the normalised hidden states.
                *rows("grad_normed", max(w.hidden, w.queries)),
                *rows("qkv", w.qkv, when=least(kept.qkv)),
                *rotated,
                *rows("grad_low", low),
                *rows("dropped", max(w.hidden, w.queries), when=shape.dropout),
            ]
        case _:
            raise ValueError(f"{phase!r} is no phase of training")
    return tuple(found)


def phase_layout(spec: ModelSpec, shape: TrainingShape, phase: str) -> Layout:
    """Where the buffers of a phase lie in its block."""
    return lay_out(phase_buffers(spec, shape, phase))


def attended_bytes(spec: ModelSpec, shape: TrainingShape) -> int:
    """Attention's output, its log-sum-exp and state, as torch allocates them."""
    w, tokens = widths_of(spec), shape.tokens
    out = tokens * w.queries * shape.compute_dtype.itemsize
    return allocated(out) + allocated(tokens * w.heads * 4) + 8 * ALLOCATION_BYTES


def attention_grad_bytes(spec: ModelSpec, shape: TrainingShape) -> int:
    """What attention's backward allocates: its three gradients, and what they are summed in.

    Where key heads are shared, their gradients exist once for each query head first: in the compute
    dtype for FlashAttention, in float32 at most for cuDNN. Gradients of queries are summed in
    float32, in rows that each sequence is padded to.
    """
    w, tokens, item = widths_of(spec), shape.tokens, shape.compute_dtype.itemsize
    sequences = shape.sequences or ceil_div(tokens, 64)
    padded = tokens + sequences * _FLASH_ROWS
    expanded = 2 * allocated(tokens * w.queries * 4) if w.keys < w.queries else 0
    return (
        allocated(tokens * w.queries * item)
        + 2 * allocated(tokens * w.keys * item)
        + expanded
        + allocated(padded * w.queries * 4)
        + allocated(padded * w.heads * 4)
        + 8 * ALLOCATION_BYTES
    )


def workspace_bytes(spec: ModelSpec, shape: TrainingShape) -> int:
    """The largest phase, with what attention allocates beside its buffers."""
    w, kept = widths_of(spec), shape.kept
    attended = attended_bytes(spec, shape)
    block = {phase: allocated(phase_layout(spec, shape, phase).size_bytes) for phase in PHASES}
    # Attention that is computed again is there, with its block, before the MLP's gradients are.
    again = attended if kept.attention < w.layers else 0
    extra = {
        "forward.attention": attended,
        "backward.mlp": again + block["backward.attention"] if again else 0,
        "backward.attention": again + attention_grad_bytes(spec, shape),
    }
    return max(size + extra.get(phase, 0) for phase, size in block.items())


def allocated(size_bytes: int) -> int:
    """What torch's allocator takes for it."""
    return round_up(size_bytes, ALLOCATION_BYTES)
