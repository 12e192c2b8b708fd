"""The plan of a fine-tuning: what it takes of the device, before anything is loaded. Free of torch.

A training plan stands on a plan of the model itself, which the loader executes, and adds what
training takes: adapters, gradients, optimizer, activations, logits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oomproof.planning.plan import Plan

SCHEMA = 1
"""Version of the plan's JSON; it changes when a field's meaning does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTerms:
    """Predicted bytes of the device while it trains; docs/7-tuning.md names each."""

    cuda_context: int = 0
    weights: int = 0
    """The frozen model, as planned for loading; of several ranks, a part of it where shared."""
    gathered: int = 0
    """Where the parts of a shared layer come together."""
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    """Of a chunk of positions, with their gradient."""
    dequantization: int = 0
    """The 16-bit copy of the weight that is multiplied."""
    library: int = 0
    """What cuBLAS keeps, and how torch's allocator rounds."""
    allocator: int = 0
    """Blocks of other sizes that torch's allocator may cache; it can do without."""
    staging: int = 0
    """Source tensors on their way, while loading."""
    comm: int = 0
    """What NCCL takes, outside torch's allocator."""
    margin: int = 0

    @property
    def training_bytes(self) -> int:
        """Beside the weights, while a step runs."""
        return (
            self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.dequantization
            + self.library
            + self.allocator
        )

    @property
    def peak_bytes(self) -> int:
        """The most the device ever holds: loading and training do not overlap."""
        held = self.cuda_context + self.weights + self.adapters + self.margin
        held += self.gathered + self.comm
        return held + max(self.staging, self.training_bytes)

    def as_dict(self) -> dict[str, int]:
        """Term → bytes."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Samples of about one length."""

    longest: int
    """Tokens; samples have more than the bucket before it, and at most this."""
    samples: int
    micro_batch: int
    """The most sequences of this length at once; 0 where not one fits."""
    peak_bytes: int
    """With as many, or with one where none fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """What the plan knows of the data."""

    name: str
    samples: int
    tokens: int
    learned_tokens: int
    longest: int
    longest_line: int
    truncated: int
    dropped: int
    validation_samples: int
    rows: int
    """Sequences of an epoch."""
    filled: float
    """Share of their tokens that is no padding."""
    lengths: tuple[tuple[int, int], ...]
    """(tokens, samples): the histogram, in powers of two."""
    documents: int = 0
    """Samples in a sequence, at most; 0 where it is not known."""
    is_cut: bool = False
    """Whether it is cut into sequences wherever they are full, so that none is too long."""

    @property
    def tokens_per_row(self) -> float:
        """Mean of the sequences' tokens, held-out samples counted with the others."""
        learned = self.samples - self.validation_samples
        return self.tokens * learned / max(1, self.samples) / max(1, self.rows)

    @property
    def document_tokens(self) -> float:
        """Mean length of the sample that a token is in, by the histogram."""
        tokens = sum(length * count for length, count in self.lengths)
        return sum(length * length * count for length, count in self.lengths) / max(1, tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """What a fine-tuning does, and what it takes."""

    base: Plan
    """How the frozen model is loaded."""
    engine: str
    """"native" or "transformers"."""
    format: str
    compute_dtype: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    trainable_parameters: int
    context: int
    packing: bool
    longest: int
    """Tokens of the longest sequence, as it is padded."""
    fits: bool
    """Whether `micro_batch` of the longest sequences do, with everything else."""
    shortfall_bytes: int
    """What the device lacks; where it lacks nothing, what the host does."""
    micro_batch: int
    """Sequences at once, of the longest; where none fit, one or as many as were asked for."""
    batch_size: int
    """Sequences of an optimizer step, over all ranks."""
    micro_batches_per_step: int
    """Passes of an optimizer step, on each rank."""
    optimizer: str
    checkpointing: str
    """"none", "layers", "offload", or "auto": as `kept` has it."""
    kept: Mapping[str, int] | None
    """What the last layers keep for the backward pass → how many of them; None where the engine
    keeps all of it or nothing."""
    chunked_loss: bool
    device: str
    device_index: int
    usable_bytes: int
    terms: TrainingTerms
    host_bytes: int
    """Host memory beside the process: offloaded activations, paged optimizer states."""
    buckets: tuple[Bucket, ...]
    data: TrainingData
    steps: int
    epochs: float
    flops: float
    """Of the whole run."""
    train_s: float | None
    """Predicted (tuning/speed.py); None where the device's FLOP/s are not known."""
    remedies: tuple[str, ...]
    """What would make it fit; empty where it does."""
    reasons: tuple[str, ...]
    ranks: int = 1
    """Processes, a device each; bytes are those of each of them."""
    sharded: bool = False
    """Whether each rank holds a part of every frozen layer."""
    schema: int = SCHEMA

    @property
    def peak_bytes(self) -> int:
        """The most the device ever holds."""
        return self.terms.peak_bytes

    @property
    def lacks_host_memory(self) -> bool:
        """Whether it does not fit for the host alone."""
        return not self.fits and self.peak_bytes <= self.usable_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `tune --dry-run --json` prints them."""
        plain = asdict(self)
        plain["base"] = self.base.as_dict()
        plain["peak_bytes"] = self.peak_bytes
        return plain

    def to_json(self, *, indent: int | None = 2) -> str:
        """The plan as JSON, schema 1."""
        return json.dumps(self.as_dict(), indent=indent)


def length_histogram(lengths: Sequence[int], longest: int) -> tuple[tuple[int, int], ...]:
    """(tokens, samples) in powers of two, the last one the longest itself."""
    counts: dict[int, int] = {}
    for length in lengths:
        bucket = min(longest, max(64, 1 << (int(length) - 1).bit_length()))
        counts[bucket] = counts.get(bucket, 0) + 1
    return tuple(sorted(counts.items()))


def as_terms(base: Plan, found: Mapping[str, int], library_bytes: int) -> TrainingTerms:
    """The terms of a device: of loading from its plan, of training from what was computed."""
    [device] = base.devices
    loading = {
        "cuda_context": device.terms.cuda_context,
        "weights": device.terms.weights,
        "staging": device.terms.staging,
        "margin": device.terms.margin,
        "library": library_bytes,
    }
    return TrainingTerms(**{**loading, **found})
