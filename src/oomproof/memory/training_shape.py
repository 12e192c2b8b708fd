"""What is trained, and in which steps: the model's widths, its adapters, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from oomproof.errors import InputError
from oomproof.formats import DType
from oomproof.models.spec import ModelSpec, Role
from oomproof.units import MIB

PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linears that share an input, and are multiplied as one."""
ALL_LINEARS = tuple(name.split(".")[1] for names in PROJECTIONS.values() for name in names)
DEFAULT_SCRATCH_BYTES = 256 * MIB
"""Of dequantized weights, at most: all of a projection of an 8B, slices of one of a 70B."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """How many layers, the last ones, keep what their backward pass would compute again."""

    attention: int = 0
    """Attention's output and log-sum-exp."""
    mid: int = 0
    """Hidden states between attention and MLP: spares the product with o."""
    qkv: int = 0
    """Queries, keys and values."""
    gate_up: int = 0
    """What the MLP's gate is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingShape:
    """What the buffers depend on, besides the model."""

    tokens: int
    """T: rows of a step, batch × sequence."""
    positions: int
    """Tokens of the longest sequence."""
    sequences: int = 0
    """Documents in a step; 0 for as many as of 64 tokens each."""
    compute_dtype: DType = DType.BFLOAT16
    format: str = "nf4-dq"
    rank: int = 16
    targets: tuple[str, ...] = ALL_LINEARS
    dropout: bool = False
    kept: Kept = Kept()
    loss_tokens: int = 0
    """Tokens whose logits exist at once; 0 for what 256 MiB of them are, at most 1,024."""
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES
    offload_checkpoints: bool = False
    """Whether the inputs of layers wait in page-locked host memory."""
    ranks: int = 1
    """Processes that train together, each on a device and on batches of its own."""
    sharded: bool = False
    """Whether each of them holds a part of every frozen layer, and not all of it."""

    @property
    def is_sharded(self) -> bool:
        """Whether layers are cut: of one rank they are not."""
        return self.sharded and self.ranks > 1

    def __post_init__(self) -> None:
        for name in ("tokens", "positions", "rank", "ranks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least 1")
        unknown = [name for name in self.targets if name not in ALL_LINEARS]
        if unknown or not self.targets:
            raise InputError(
                f"target module {unknown[0]!r} is no linear layer of the decoder"
                if unknown
                else "there is no target module",
                remedy=f"use some of {', '.join(ALL_LINEARS)}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Columns of what a layer computes."""

    hidden: int
    queries: int
    """Of all query heads."""
    keys: int
    """Of all key heads; values have as many."""
    mlp: int
    heads: int
    layers: int
    vocab: int
    head_dim: int
    normed_heads: bool
    """Whether queries and keys are normalised: what they were before is needed too."""

    @property
    def qkv(self) -> int:
        """Queries, keys and values."""
        return self.queries + 2 * self.keys


def widths_of(spec: ModelSpec) -> Widths:
    """Of a model whose layers are alike."""
    attention = spec.attention[0]
    return Widths(
        hidden=spec.hidden_size,
        queries=spec.num_attention_heads * attention.key_head_dim,
        keys=attention.num_key_value_heads * attention.key_head_dim,
        mlp=spec.intermediate_size,
        heads=spec.num_attention_heads,
        layers=spec.num_hidden_layers,
        vocab=spec.vocab_size,
        head_dim=attention.key_head_dim,
        normed_heads=any(tensor.name.endswith("q_norm.weight") for tensor in spec.tensors),
    )


def linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Module in a layer ("mlp.up_proj") → [rows, columns] of its weight."""
    prefix = f"{spec.decoder_prefix}.layers.0."
    return {
        tensor.name.removeprefix(prefix).removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for tensor in spec.tensors
        if tensor.layer == 0 and tensor.role is Role.LINEAR and len(tensor.shape) == 2
    }


def adapter_shapes(
    spec: ModelSpec, rank: int, targets: tuple[str, ...]
) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Module of a layer → shapes of its A [rank, columns] and B [rows, rank] (arXiv:2106.09685)."""
    shapes = linear_shapes(spec)
    return {
        name: ((rank, shapes[name][1]), (shapes[name][0], rank))
        for names in PROJECTIONS.values()
        for name in names
        if name.rpartition(".")[2] in targets
    }


def adapter_numel(spec: ModelSpec, rank: int, targets: tuple[str, ...]) -> int:
    """Numbers in a layer's adapters."""
    shapes = adapter_shapes(spec, rank, targets).values()
    return sum(prod(a) + prod(b) for a, b in shapes)
