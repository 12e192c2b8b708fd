"""What training a LoRA adapter on transformers and peft takes of a device, beside its weights.

Bounds from what their modules save for the backward pass, in the order they compute; where several
never live at once, the largest counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oomproof.formats import ceil_div
from oomproof.memory.training_shape import Kept
from oomproof.models.spec import ModelSpec, Role, TensorSpec

FLOAT32 = 4
LOSS_POSITIONS = 1024
"""As tuning.peft_model.CHUNK_POSITIONS."""
_BLOCK_8BIT = 256
_LEAST_8BIT = 4096
"""bitsandbytes keeps the states of smaller tensors in 32 bits."""
_LEAST_PAGED = 100_000
"""Of smaller tensors bitsandbytes' paged optimizers keep the states on the device."""
_RECOMPUTED = 1.5
"""A layer's saved tensors and the gradients that flow through it, over the saved tensors alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What is trained, and how."""

    rank: int
    target_modules: tuple[str, ...]
    """Names of linears, or ("all-linear",)."""
    optimizer: str
    """"adamw", "adamw-8bit", "paged-adamw" or "paged-adamw-8bit"."""
    checkpointing: str
    """"none", "layers", "offload", or of our own engine "auto"."""
    compute_bytes: int
    """Of an element that is computed: 2 for bfloat16, 4 for float32."""
    packed: bool
    """Whether several documents share a sequence, so that attention has a mask."""
    documents: int = 0
    """In a sequence, at most; 0 for as many as of 64 tokens each."""
    kept: Kept | None = None
    """What layers of our own engine keep, where `checkpointing` leaves it to the memory."""


def target_linears(spec: ModelSpec, target_modules: Sequence[str]) -> tuple[TensorSpec, ...]:
    """The weights that get an adapter."""
    everything = tuple(target_modules) == ("all-linear",)
    return tuple(
        tensor
        for tensor in spec.tensors
        if tensor.role is Role.LINEAR
        and len(tensor.shape) == 2
        and (everything or tensor.name.removesuffix(".weight").rpartition(".")[2] in target_modules)
    )


def adapter_tensors(spec: ModelSpec, tuned: Tuned) -> tuple[int, ...]:
    """Elements of each matrix of the adapter: A is [rank, in], B is [out, rank]."""
    return tuple(
        tuned.rank * side
        for tensor in target_linears(spec, tuned.target_modules)
        for side in reversed(tensor.shape)
    )


def optimizer_bytes(elements: Sequence[int], optimizer: str) -> int:
    """Both moments of AdamW."""
    if "8bit" not in optimizer:
        return 2 * FLOAT32 * sum(elements)
    return sum(
        2 * FLOAT32 * count
        if count < _LEAST_8BIT
        else 2 * (count + FLOAT32 * ceil_div(count, _BLOCK_8BIT))
        for count in elements
    )


def split_optimizer_bytes(elements: Sequence[int], optimizer: str) -> tuple[int, int]:
    """Bytes of both moments on the device, and in the managed memory of paged optimizers.

    bitsandbytes pages the states of large matrices, not the scales of their 8-bit blocks.
    """
    everything = optimizer_bytes(elements, optimizer)
    if not optimizer.startswith("paged"):
        return everything, 0
    size = 1 if "8bit" in optimizer else FLOAT32
    paged = 2 * size * sum(count for count in elements if count >= _LEAST_PAGED)
    return everything - paged, paged


def training_terms(
    spec: ModelSpec, tuned: Tuned, *, micro_batch: int, length: int
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Bytes of a device, and of the host, for one micro-batch.

    Args:
        spec: The model.
        tuned: What is trained, and how.
        micro_batch: Sequences at once.
        length: Tokens of each.

    Returns:
        adapters, gradients, optimizer, activations, logits and dequantization of the device;
        offloaded and optimizer of the host.
    """
    elements = adapter_tensors(spec, tuned)
    states, paged_states = split_optimizer_bytes(elements, tuned.optimizer)
    tokens = micro_batch * length
    inputs = spec.num_hidden_layers * tokens * spec.hidden_size * tuned.compute_bytes
    layer = max(
        _layer_bytes(spec, tuned, layer, micro_batch, length)
        for layer in range(spec.num_hidden_layers)
    )
    if tuned.checkpointing == "none":
        activations = spec.num_hidden_layers * layer + int((_RECOMPUTED - 1) * layer)
    else:
        activations = int(_RECOMPUTED * layer)
        activations += inputs if tuned.checkpointing == "layers" else 0
    # The embedding's output, the final norm's input and output, and their gradients.
    activations += tokens * spec.hidden_size * (4 * tuned.compute_bytes + FLOAT32)
    positions = min(tokens, LOSS_POSITIONS)
    device = {
        "adapters": FLOAT32 * sum(elements),
        "gradients": FLOAT32 * sum(elements),
        "optimizer": states,
        "activations": activations,
        # Logits, as float32, their probabilities and their gradients in both.
        "logits": positions * spec.vocab_size * (2 * tuned.compute_bytes + 3 * FLOAT32),
        "dequantization": tuned.compute_bytes
        * max((one.numel for one in spec.tensors if one.role is Role.LINEAR), default=0),
    }
    host = {
        "offloaded": inputs if tuned.checkpointing == "offload" else 0,
        "optimizer": paged_states,
    }
    return device, host


def _layer_bytes(spec: ModelSpec, tuned: Tuned, layer: int, micro_batch: int, length: int) -> int:
    """What one layer saves for its backward pass."""
    tokens, element = micro_batch * length, tuned.compute_bytes
    hidden, attention = spec.hidden_size, spec.attention[layer]
    queries = spec.num_attention_heads * attention.query_head_dim
    values = spec.num_attention_heads * attention.output_head_dim
    # Two norms in float32, their results, two sums.
    total = tokens * hidden * (2 * 2 * FLOAT32 + 4 * element)
    # Queries and keys before and after rotation, copies of keys and values to every head, outputs.
    total += tokens * element * (3 * queries + 2 * (queries + values) + values)
    if tuned.packed or attention.sliding_window is not None:
        # A mask of every token against every token, and what the kernel makes of it.
        total += micro_batch * length * length * (1 + element)
    # Gate and up, their activation and product.
    total += tokens * element * 4 * spec.intermediate_size
    names = [one for one in target_linears(spec, tuned.target_modules) if one.layer == layer]
    for tensor in names:
        outputs, inputs = tensor.shape
        # peft casts the input to float32 for each adapter, and adds a result of its own.
        total += tokens * (FLOAT32 * (inputs + tuned.rank) + (FLOAT32 + element) * outputs)
    return total
