"""What an engine takes for a step of training, as the planner asks for it. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from oomproof.formats import DType
from oomproof.memory.peft import (
    FLOAT32,
    Tuned,
    adapter_tensors,
    logits_bytes,
    split_optimizer_bytes,
    training_terms,
)
from oomproof.memory.sharding import COMM_BYTES
from oomproof.memory.training import host_bytes, kept_within, training_memory, weights_bytes
from oomproof.memory.training_shape import ALL_LINEARS, Kept, TrainingShape
from oomproof.models.spec import ModelSpec
from oomproof.tuning.options import ALL_LINEARS as EVERYTHING

_STATES = {
    "adamw": "adamw",
    "adamw-8bit": "adamw-8bit",
    "paged-adamw": "adamw-paged-32bit",
    "paged-adamw-8bit": "adamw-paged",
}
"""Optimizer → its key of memory.training.OPTIMIZER_STATE_BYTES."""

Terms = tuple[Mapping[str, int], Mapping[str, int]]
"""Bytes of the device by tuning.plan.TrainingTerms' names, and of the host."""


class StepMemory(Protocol):
    """An engine's memory model of a step."""

    ways: tuple[str, ...]
    """Values of `checkpointing` that "auto" chooses among, the fastest first."""

    def terms(self, tuned: Tuned, micro_batch: int, length: int) -> Terms:
        """What a step of so many sequences takes."""

    def kept(self, tuned: Tuned, micro_batch: int, length: int, limit_bytes: int) -> Kept | None:
        """What is kept where the sum of the device's terms may be so much; None: no choice."""

    def slack_bytes(self, tuned: Tuned, micro_batch: int, length: int) -> int:
        """What the allocator would like to hold besides, and can do without."""


class PeftMemory:
    """transformers and peft.

    Args:
        spec: The model.
        on_gpu: Whether the device has a host beside it.
    """

    def __init__(self, spec: ModelSpec, *, on_gpu: bool) -> None:
        self._spec, self._on_gpu = spec, on_gpu
        self.ways: tuple[str, ...] = ("none", "layers", "offload") if on_gpu else ("none", "layers")

    def terms(self, tuned: Tuned, micro_batch: int, length: int) -> Terms:
        """See memory.peft."""
        return training_terms(self._spec, tuned, micro_batch=micro_batch, length=length)

    def kept(self, tuned: Tuned, micro_batch: int, length: int, limit_bytes: int) -> Kept | None:
        """Its layers keep everything or nothing."""
        del tuned, micro_batch, length, limit_bytes
        return None

    def slack_bytes(self, tuned: Tuned, micro_batch: int, length: int) -> int:
        """Logits once more: blocks of other sizes that the layers left are still cached."""
        del tuned
        return logits_bytes(self._spec, micro_batch * length) if self._on_gpu else 0


class NativeMemory:
    """Our own training core.

    Args:
        spec: The model.
        format_name: Of the frozen weights, as they are held.
        dropout: Whether adapters' inputs are dropped out.
        on_gpu: Whether the device has a host beside it.
        ranks: Processes that train together.
        sharded: Whether each holds a part of every layer.
    """

    def __init__(
        self,
        spec: ModelSpec,
        format_name: str,
        *,
        dropout: bool,
        on_gpu: bool,
        ranks: int = 1,
        sharded: bool = False,
    ) -> None:
        self._ranks, self._sharded = ranks, sharded
        self._spec, self._format, self._dropout = spec, format_name, dropout
        self._on_gpu = on_gpu
        self.ways: tuple[str, ...] = ("auto", "offload") if on_gpu else ("auto",)
        # Buffers depend on one layer: the others are like it.
        first = tuple(one for one in spec.tensors if one.layer in (None, 0))
        self._thin = replace(spec, tensors=first)
        self._weights = lru_cache(self._weights_bytes)

    def shape(self, tuned: Tuned, micro_batch: int, length: int) -> TrainingShape:
        """What the core's buffers are made for."""
        targets = tuned.target_modules
        layers = self._spec.num_hidden_layers
        kept = tuned.kept or Kept()
        if tuned.checkpointing == "layers":
            kept = Kept(attention=layers)
        elif tuned.checkpointing == "none":
            kept = Kept(attention=layers, mid=layers, qkv=layers, gate_up=layers)
        return TrainingShape(
            tokens=micro_batch * length,
            positions=length,
            # The padding behind a sequence's last document is one more.
            sequences=micro_batch * (tuned.documents + 1) if tuned.documents else 0,
            compute_dtype=(DType.FLOAT32 if tuned.compute_bytes == FLOAT32 else DType.BFLOAT16),
            format=self._format,
            rank=tuned.rank,
            targets=ALL_LINEARS if targets == (EVERYTHING,) else targets,
            dropout=self._dropout,
            kept=kept,
            offload_checkpoints=tuned.checkpointing == "offload",
            ranks=self._ranks,
            sharded=self._sharded,
        )

    def terms(self, tuned: Tuned, micro_batch: int, length: int) -> Terms:
        """See memory.training."""
        shape = self.shape(tuned, micro_batch, length)
        found = training_memory(self._thin, shape, optimizer=_STATES[tuned.optimizer])
        device = {
            "weights": self._weights(shape.compute_dtype),
            "gathered": found.gathered,
            "comm": found.comm if self._on_gpu else 0,
            "adapters": found.adapters,
            "gradients": found.gradients,
            "optimizer": found.optimizer,
            # Logits share their memory with a layer's activations: they are in the workspace.
            "activations": found.checkpoints
            + found.kept
            + found.buffers
            + found.workspace
            + found.batch,
            "dequantization": found.scratch,
            "library": found.libraries + found.rounding,
        }
        _, paged = split_optimizer_bytes(adapter_tensors(self._spec, tuned), tuned.optimizer)
        return device, {"offloaded": host_bytes(self._spec, shape), "optimizer": paged}

    def kept(self, tuned: Tuned, micro_batch: int, length: int, limit_bytes: int) -> Kept | None:
        """As much as fits, where the options leave it open.

        Raises:
            PlanDoesNotFitError: The step takes more without keeping anything.
        """
        if tuned.checkpointing not in self.ways:
            return self.shape(tuned, micro_batch, length).kept
        shape = self.shape(replace(tuned, kept=Kept()), micro_batch, length)
        others = self._weights(shape.compute_dtype) - weights_bytes(self._thin, shape)
        if not self._on_gpu and self._ranks > 1:
            others -= COMM_BYTES  # NCCL's, which the terms of a processor leave out
        limit = limit_bytes - others
        return kept_within(self._thin, shape, limit, optimizer=_STATES[tuned.optimizer]).kept

    def slack_bytes(self, tuned: Tuned, micro_batch: int, length: int) -> int:
        """Once more a phase's buffers: blocks of the last one, of other sizes, are still cached.

        With as much torch's allocator has not to give memory back within a step.
        """
        if not self._on_gpu:
            return 0
        shape = self.shape(tuned, micro_batch, length)
        return training_memory(self._thin, shape, optimizer="none").workspace

    def _weights_bytes(self, compute_dtype: DType) -> int:
        shape = TrainingShape(
            tokens=1,
            positions=1,
            format=self._format,
            compute_dtype=compute_dtype,
            ranks=self._ranks,
            sharded=self._sharded,
        )
        return weights_bytes(self._spec, shape)
