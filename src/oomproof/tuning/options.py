"""What a fine-tuning is asked to do. Free of torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from oomproof.errors import InputError
from oomproof.formats import FIT

LongSamples = Literal["refuse", "truncate", "drop"]
Checkpointing = Literal["auto", "none", "layers", "offload"]
Optimizer = Literal["auto", "adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]
Shard = Literal["auto", "on", "off"]
TuneEngine = Literal["auto", "native", "transformers"]

OPTIMIZERS: dict[str, str] = {
    "adamw": "adamw_torch_fused",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}
"""Name here → transformers' name."""
ALL_LINEARS = "all-linear"
MAX_RANK = 1024
MAX_BATCH = 1 << 16
MAX_EPOCHS = 10_000
_MODULE = re.compile(r"\w+", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSettings:
    """The low-rank adapter (Hu et al. 2021, "LoRA"): W + (alpha / rank) · B A."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    """Of the adapter's input, while training."""
    target_modules: tuple[str, ...] = (ALL_LINEARS,)
    """Names of linear layers ("q_proj"), or "all-linear": every linear of every decoder layer."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise InputError(f"rank {self.rank} must be from 1 to {MAX_RANK}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"alpha {self.alpha} must be more than 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout {self.dropout} must be from 0 to below 1")
        for name in self.target_modules:
            if name != ALL_LINEARS and not _MODULE.fullmatch(name):
                raise InputError(
                    f"target module {name[:40]!r} is no name of a linear layer",
                    remedy='write "q_proj,v_proj", or "all-linear"',
                )
        if not self.target_modules or (ALL_LINEARS in self.target_modules) != (
            self.target_modules == (ALL_LINEARS,)
        ):
            raise InputError(
                f"target modules {', '.join(self.target_modules)[:80]!r} contradict each other",
                remedy='write "q_proj,v_proj", or "all-linear" alone',
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningSettings:
    """Options of `tune`; it refuses what makes no sense before anything is read."""

    adapter: AdapterSettings
    format: str = "auto"
    """Of the frozen weights; "auto": nf4-dq, or what the checkpoint is quantized in."""
    context: int | None = None
    """Tokens of a sequence; None for min(2048, the model's maximum)."""
    long_samples: LongSamples = "refuse"
    packing: bool = True
    batch_size: int = 16
    """Sequences of an optimizer step, over all micro-batches."""
    micro_batch: int | None = None
    """Sequences computed at once; None for as many as the plan has room for."""
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 2e-4
    warmup: float = 0.03
    """Share of the steps."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: Optimizer = "auto"
    checkpointing: Checkpointing = "auto"
    """Of activations: recomputed for each layer, and its input kept on the host with "offload"."""
    validation: float = 0.05
    """Share of the samples that is held out; 0 for none."""
    evaluations: int = 10
    """How often the held-out samples are evaluated, evenly over the run, the end included."""
    patience: int | None = None
    """Evaluations in a row without a new best before it stops; None for never."""
    save_every: int | None = None
    """Steps between checkpoints; None for at each evaluation."""
    keep_checkpoints: int = 2
    engine: TuneEngine = "auto"
    shard: Shard = "auto"
    """Whether each of several ranks holds a part of the frozen layers; "auto": where whole ones
    leave too little room."""
    compute_dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format == FIT:
            raise InputError(f"format {FIT} is not trained on", remedy="use nf4-dq")
        _require(self.long_samples, "long-samples", LongSamples)
        _require(self.optimizer, "optimizer", Optimizer)
        _require(self.checkpointing, "checkpointing", Checkpointing)
        _require(self.engine, "engine", TuneEngine)
        _require(self.shard, "shard", Shard)
        _within("batch-size", self.batch_size, 1, MAX_BATCH)
        if self.micro_batch is not None:
            _within("micro-batch", self.micro_batch, 1, self.batch_size)
        if self.max_steps is not None:
            _within("max-steps", self.max_steps, 1, 1 << 40)
        if self.context is not None:
            _within("context", self.context, 8, 1 << 30)
        if self.patience is not None:
            _within("patience", self.patience, 1, 1 << 20)
        if self.save_every is not None:
            _within("save-every", self.save_every, 1, 1 << 40)
        _within("keep-checkpoints", self.keep_checkpoints, 1, 1000)
        _within("evaluations", self.evaluations, 1, 10_000)
        _within("seed", self.seed, 0, (1 << 32) - 1)
        _between("epochs", self.epochs, 0, MAX_EPOCHS)
        _between("learning-rate", self.learning_rate, 0, 10)
        _between("max-grad-norm", self.max_grad_norm, 0, 1e9)
        for name, value, most in (
            ("warmup", self.warmup, 1.0),
            ("validation", self.validation, 0.9),
            ("weight-decay", self.weight_decay, 10.0),
        ):
            if not 0 <= value <= most:
                raise InputError(f"{name} {value} must be from 0 to {most:g}")
        if self.patience is not None and self.validation == 0:
            raise InputError(
                "patience needs samples to evaluate on",
                remedy="leave --patience out, or hold some out with --validation 0.05",
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def digest(self) -> str:
        """Of everything that decides the weights."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _require(value: str, what: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise InputError(
            f"unknown {what} {value[:40]!r}", remedy=f"use one of {', '.join(get_args(allowed))}"
        )


def _within(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InputError(f"{what} {value:,} must be from {least:,} to {most:,}")


def _between(what: str, value: float, low: float, most: float) -> None:
    if not (math.isfinite(value) and low < value <= most):
        raise InputError(f"{what} {value:g} must be more than {low:g} and at most {most:g}")
