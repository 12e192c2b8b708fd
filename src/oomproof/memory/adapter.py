"""Where an adapter's factors lie on a device and how many bytes they take.

Both factors stay in the compute dtype, beside the layer that they change. In the native engine the
A's of linears that share an input are one matrix, so that one product serves all of them, and ranks
are rounded up to whole 16-byte vectors, with zeros: they add nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oomproof.formats import DType
from oomproof.memory.arena import ALIGNMENT_BYTES
from oomproof.models.adapter import AdaptedWeight
from oomproof.models.spec import ModelSpec
from oomproof.units import round_up

if TYPE_CHECKING:
    from oomproof.memory.profiles import EngineProfile

GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The native engine's products → the linears whose results they write side by side."""
_GROUP_OF = {module: name for name, modules in GROUPS.items() for module in modules}
RANK_MULTIPLE = 8
LORA_STEP_TOKENS = 64
"""Tokens up to which x Aᵀ is computed in parts, side by side: those of a decode step."""
LORA_SPLITS = 16
"""Such parts at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPart:
    """A linear's adapter within its group."""

    adapted: AdaptedWeight
    first_column: int
    """Of the group's result, where the linear's begins."""
    first_rank: int
    """Of the rows of the group's A, where the linear's begin."""
    padded_rank: int
    offset_bytes: int
    """Where B [rows, padded rank] begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraGroup:
    """The adapters of linears that share an input."""

    name: str
    """Of GROUPS."""
    columns: int
    """Of the input."""
    rank: int
    """Rows of A [rank, columns]."""
    offset_bytes: int
    """Where A begins."""
    parts: tuple[LoraPart, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLayer:
    """The adapters of a layer, one after the other."""

    groups: tuple[LoraGroup, ...]
    size_bytes: int


def lay_out_adapter(spec: ModelSpec, dtype: DType) -> Mapping[int, LoraLayer]:
    """Layer → where its adapters lie in the native engine; layers without any are left out."""
    if spec.adapter is None:
        return {}
    rows: dict[int, dict[str, int]] = {}
    for tensor in spec.tensors:
        if tensor.layer is not None:
            name = module_in_layer(tensor.name)
            rows.setdefault(tensor.layer, {})[name] = tensor.shape[0]
    adapted: dict[int, dict[str, AdaptedWeight]] = {}
    for one in spec.adapter.weights:
        adapted.setdefault(one.layer, {})[module_in_layer(one.weight)] = one
    return {layer: _lay_out(found, rows[layer], dtype) for layer, found in adapted.items()}


def _lay_out(
    adapted: Mapping[str, AdaptedWeight], rows: Mapping[str, int], dtype: DType
) -> LoraLayer:
    offset = 0
    groups = []

    def place(numel: int) -> int:
        nonlocal offset
        first = offset
        offset += round_up(numel * dtype.itemsize, ALIGNMENT_BYTES)
        return first

    for name, modules in GROUPS.items():
        members = [adapted[module] for module in modules if module in adapted]
        if not members:
            continue
        columns = members[0].shape[1]
        total = sum(round_up(one.rank, RANK_MULTIPLE) for one in members)
        first = place(total * columns)
        parts = []
        column = rank = 0
        for module in modules:
            if module in adapted:
                one = adapted[module]
                padded = round_up(one.rank, RANK_MULTIPLE)
                parts.append(
                    LoraPart(
                        adapted=one,
                        first_column=column,
                        first_rank=rank,
                        padded_rank=padded,
                        offset_bytes=place(one.shape[0] * padded),
                    )
                )
                rank += padded
            column += rows[module]
        groups.append(
            LoraGroup(
                name=name, columns=columns, rank=total, offset_bytes=first, parts=tuple(parts)
            )
        )
    return LoraLayer(groups=tuple(groups), size_bytes=offset)


def module_in_layer(weight: str) -> str:
    """A weight's linear, by its name within a layer: "self_attn.q_proj"."""
    return weight.partition(".layers.")[2].partition(".")[2].removesuffix(".weight")


def layer_lora_bytes(spec: ModelSpec, profile: EngineProfile, dtype: DType) -> Sequence[int]:
    """Bytes of each layer's adapters, as the engine's allocator rounds them."""
    if spec.adapter is None:
        return (0,) * spec.num_hidden_layers
    if profile.is_static:
        layers = lay_out_adapter(spec, dtype)
        return tuple(
            layers[index].size_bytes if index in layers else 0
            for index in range(spec.num_hidden_layers)
        )
    sizes = [0] * spec.num_hidden_layers
    for one in spec.adapter.weights:
        for width in one.shape:
            size = one.rank * width * dtype.itemsize
            sizes[one.layer] += round_up(size, profile.alignment_bytes)
    return tuple(sizes)


def adapted_groups(spec: ModelSpec) -> Sequence[int]:
    """Products of each layer that an adapter adds to, in the native engine."""
    counts = [0] * spec.num_hidden_layers
    for layer, _ in _group_ranks(spec):
        counts[layer] += 1
    return tuple(counts)


def lora_scratch_bytes(spec: ModelSpec, *, tokens: int, dtype: DType) -> int:
    """What x Aᵀ of the widest group takes: of a call's tokens, or of a step's in float32 parts.

    Args:
        spec: The model.
        tokens: The most of one call.
        dtype: What is computed in.
    """
    rank = max(_group_ranks(spec).values(), default=0)
    parts = LORA_SPLITS * LORA_STEP_TOKENS * DType.FLOAT32.itemsize
    return rank * max(tokens * dtype.itemsize, parts)


def _group_ranks(spec: ModelSpec) -> Mapping[tuple[int, str], int]:
    """(Layer, group) → rows of its A."""
    ranks: Counter[tuple[int, str]] = Counter()
    for one in () if spec.adapter is None else spec.adapter.weights:
        group = _GROUP_OF.get(module_in_layer(one.weight), "")
        ranks[one.layer, group] += round_up(one.rank, RANK_MULTIPLE)
    return ranks


def lora_activation_bytes(spec: ModelSpec, *, tokens: int, itemsize: int) -> int:
    """What peft's forward of one linear holds beside its result: x Aᵀ, times Bᵀ, and scaled."""
    weights = () if spec.adapter is None else spec.adapter.weights
    widths = (one.rank + 2 * one.shape[0] for one in weights)
    return tokens * max(widths, default=0) * itemsize


def not_adapted(spec: ModelSpec) -> str | None:
    """A linear with an adapter that the native engine has no place for, None for no such."""
    weights = () if spec.adapter is None else spec.adapter.weights
    return next((w.module for w in weights if module_in_layer(w.weight) not in _GROUP_OF), None)
