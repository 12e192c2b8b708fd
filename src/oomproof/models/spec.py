"""The values that describe a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Literal

from oomproof.formats import Component, DType
from oomproof.models.forward import ForwardSpec

if TYPE_CHECKING:
    from oomproof.models.adapter import AdapterSpec
    from oomproof.models.quantized import CheckpointQuantization


class Role(StrEnum):
    """What a tensor is for; it decides whether an engine quantizes it."""

    EMBEDDING = "embedding"
    LINEAR = "linear"
    """The weight of a linear layer inside a decoder layer."""
    BIAS = "bias"
    NORM = "norm"
    ROUTER = "router"
    """Chooses the experts of a mixture-of-experts layer."""
    EXPERTS = "experts"
    """All experts of a layer stacked in one 3-D parameter, as transformers 5 keeps them."""
    HEAD = "head"
    """lm_head, where it is not tied to the embedding."""
    OTHER = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One parameter of the model, by the name it has in transformers' state dict."""

    name: str
    shape: tuple[int, ...]
    """As stored: [out_features, in_features] for linear layers."""
    role: Role
    kept: bool = False
    """Whether it stays in 16 bits in a checkpoint that is quantized already."""
    stored_as: tuple[Component, ...] | None = None
    """What such a checkpoint holds for it, by the headers of its files."""
    layer: int | None = None
    """Index of the decoder layer it belongs to; None before the first and after the last."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """What one decoder layer keeps for each token."""

    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int
    sliding_window: int | None = None
    """Tokens that the layer looks back at; None for all of them."""
    expanded_key_head_dim: int | None = None
    """Latent attention: a head's key once the latent is expanded. There the latent is kept in the
    place of keys, the rotated part that all heads share in the place of values."""
    expanded_value_head_dim: int | None = None

    @property
    def is_latent(self) -> bool:
        """Whether a latent is kept instead of every head's keys and values."""
        return self.expanded_key_head_dim is not None

    @property
    def query_head_dim(self) -> int:
        """Width of a head's query, and of the keys it meets."""
        return self.expanded_key_head_dim or self.key_head_dim

    @property
    def output_head_dim(self) -> int:
        """Width of a head's output."""
        return self.expanded_value_head_dim or self.value_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointTensor:
    """Where one tensor's bytes lie in a checkpoint."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    """Shard's file name, relative to the checkpoint folder."""
    offset_bytes: int
    """From the beginning of the file."""
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec:
    """The safetensors files of a model, from their headers."""

    tensors: tuple[CheckpointTensor, ...]
    files: tuple[tuple[str, int], ...]
    """(file name, size in bytes) of each shard."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(size for _, size in self.files)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Where a model comes from."""

    kind: Literal["folder", "hub", "catalog"]
    path: str
    """Folder, hub repository id ("org/name")."""
    revision: str | None = None
    """Commit of the hub repository, where it was resolved."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model, before any of its weights is read.

    `tensors` is what transformers' model of this architecture holds, in its own order: exact names
    and shapes, tied weights once. `checkpoint` is what the files hold, where headers were read.
    """

    id: str
    """The name it was asked for by."""
    source: ModelSource
    architecture: str
    """transformers' class, such as "LlamaForCausalLM"."""
    family: str
    """Name of the reader in models/architectures.py, such as "llama"."""
    hidden_size: int
    intermediate_size: int
    """Width of the widest MLP that one token passes (experts per token included)."""
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    """Longest context the model was made for, in tokens."""
    tie_word_embeddings: bool
    dtype: DType
    """Element type of the published weights."""
    attention: tuple[AttentionSpec, ...]
    """One for each decoder layer."""
    tensors: tuple[TensorSpec, ...]
    config: Mapping[str, object] = field(default_factory=dict, repr=False, compare=False)
    """The fields of its config.json, as they were read."""
    checkpoint: CheckpointSpec | None = None
    download_bytes: int | None = None
    """Bytes of every file to fetch, where the hub told them."""
    cached_bytes: int = 0
    """The part of download_bytes that the cache already has."""
    checkpoint_quantization: CheckpointQuantization | None = None
    """How an already quantized checkpoint is stored, None for plain weights."""
    num_experts: int = 0
    """Experts of each mixture-of-experts layer, 0 for dense models."""
    num_experts_per_token: int = 0
    eager_attention: bool = False
    """Whether fused kernels cannot compute its attention: soft-capped scores (Gemma 2), sinks
    (gpt-oss)."""
    adapter: AdapterSpec | None = None
    """What is added to its linear layers while they stay as they are; None for nothing."""
    forward: ForwardSpec | None = None
    """How the native engine computes it; None where it cannot."""
    not_native: str | None = None
    """Why it cannot, None where it can."""

    @cached_property
    def decoder_prefix(self) -> str:
        """Name of the module that holds embedding, layers and norm: mostly "model"."""
        embedding = next(t for t in self.tensors if t.role is Role.EMBEDDING)
        return embedding.name.rsplit(".", 2)[0]

    @cached_property
    def extra_modules(self) -> tuple[str, ...]:
        """Modules beside the decoder and its head, such as a vision tower."""
        decoder = self.decoder_prefix + "."
        names = (t.name for t in self.tensors if t.role is not Role.HEAD)
        outside = (name for name in names if not name.startswith((decoder, "lm_head.")))
        return tuple(dict.fromkeys(".".join(name.split(".")[:2]) for name in outside))

    @cached_property
    def num_parameters(self) -> int:
        """Exact number of parameters, tied weights once."""
        return sum(tensor.numel for tensor in self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what a plan depends on: architecture, tensor names and shapes."""
        digest = hashlib.sha256(self.architecture.encode())
        for tensor in self.tensors:
            digest.update(f"{tensor.name}:{tensor.shape};".encode())
        return digest.hexdigest()[:16]
