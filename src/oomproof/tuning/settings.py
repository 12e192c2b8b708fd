"""What the training core is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from oomproof.errors import InputError
from oomproof.memory.training_shape import ALL_LINEARS, DEFAULT_SCRATCH_BYTES, Kept

_MOST_RANK = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), by peft's names."""

    rank: int = 16
    alpha: float = 32.0
    """What adapters' products are multiplied by, times the rank."""
    dropout: float = 0.0
    """Of an adapter's input; projections that share an input share its mask."""
    target_modules: tuple[str, ...] = ALL_LINEARS

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= _MOST_RANK:
            raise InputError(f"rank {self.rank} is not from 1 to {_MOST_RANK}")
        if not self.alpha > 0:
            raise InputError(f"alpha {self.alpha:g} must be more than 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout {self.dropout:g} is not from 0 to less than 1")
        unknown = sorted(set(self.target_modules) - set(ALL_LINEARS))
        if unknown or not self.target_modules:
            raise InputError(
                f"target_modules: {unknown[0]!r} is no linear layer of the decoder"
                if unknown
                else "target_modules is empty",
                remedy=f"use some of {', '.join(ALL_LINEARS)}",
            )

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """Shapes of a step, and what is spent on its speed."""

    tokens: int
    """Of a step, at most: batch × sequence. Every buffer is made for so many."""
    positions: int | None = None
    """Tokens of the longest sequence; None for `tokens`."""
    sequences: int = 0
    """Documents in a step, for the plan; 0 for as many as of 64 tokens each."""
    format: str = "nf4-dq"
    """Of the frozen linears."""
    kept: Kept | None = None
    """Activations that are kept; None for attention's output in every layer."""
    limit_bytes: int | None = None
    """Of the step's peak: as many activations are kept as fit, in the place of `kept`."""
    optimizer: str = "adamw"
    """What `limit_bytes` leaves room for: a key of memory.training.OPTIMIZER_STATE_BYTES."""
    attention: str = "auto"
    """"auto", "flash", "cudnn" or "plain"."""
    offload_checkpoints: bool = False
    """Whether the inputs of layers wait in page-locked host memory for their backward pass."""
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES
    """Where weights are dequantized to; a larger projection is multiplied in slices."""
    loss_tokens: int = 0
    """Tokens whose logits exist at once; 0 for a choice."""
    sharded: bool = False
    """Whether each of several ranks holds a part of every frozen layer: for bases that are larger
    than a GPU. Layers travel between ranks in every pass; embedding and head stay whole."""
