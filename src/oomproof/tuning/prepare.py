"""From options and data to a plan: what `--dry-run` prints, and what a run executes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults
from oomproof.errors import InputError
from oomproof.memory.peft import chunks_loss
from oomproof.models.checkpoint import TOKENIZER_FILES
from oomproof.models.spec import ModelSpec
from oomproof.tuning.batches import width
from oomproof.tuning.cache import TokenCache, build_cache, cache_key, digest_of_data, open_cache
from oomproof.tuning.options import TuningSettings
from oomproof.tuning.packing import Numbers, Rows, Split, pack, single_rows, split
from oomproof.tuning.plan import TrainingData, TrainingPlan, length_histogram
from oomproof.tuning.planner import TrainingPlanner
from oomproof.tuning.records import TEXT_SUFFIXES

DEFAULT_CONTEXT = 2048

Told = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Data as it will be trained on."""

    cache: TokenCache
    split: Split
    rows: Rows
    """Sequences that are learned from."""
    validation: Rows | None
    context: int
    longest: int
    """Tokens of the longest sequence, as it is padded."""
    pad_token: int
    data: TrainingData


def context_of(settings: TuningSettings, spec: ModelSpec) -> int:
    """Tokens of a sequence.

    Raises:
        InputError: More than the model was made for.
    """
    limit = spec.max_position_embeddings
    if settings.context is None:
        return min(DEFAULT_CONTEXT, limit)
    if settings.context > limit:
        raise InputError(
            f"context {settings.context:,} is beyond what {spec.id} was made for",
            remedy=f"ask for at most {limit:,} tokens",
        )
    return settings.context


def prepare(
    data: Path,
    tokenizer_folder: Path,
    cache_folder: Path,
    spec: ModelSpec,
    settings: TuningSettings,
    *,
    told: Told | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    """Tokenises the data, or finds that done, splits and packs it.

    Args:
        data: The file.
        tokenizer_folder: Where the model's tokenizer is.
        cache_folder: Where tokens are kept.
        spec: The model.
        settings: What is asked.
        told: Told of bytes ("tokenize").
        trust_remote_code: Lets transformers run code that the model's folder ships.

    Raises:
        DataError: A line of the data cannot be used.
        CheckpointError: The tokenizer cannot be read, or the disk is full.
    """
    context = context_of(settings, spec)
    tokenizer = TransformersTokenizer(
        tokenizer_folder,
        defaults=read_generation_defaults(tokenizer_folder),
        trust_remote_code=trust_remote_code,
    )
    sha256, _ = digest_of_data(data, None if told is None else lambda a, b: told("read", a, b))
    key = cache_key(sha256, digest_of_tokenizer(tokenizer_folder), context, settings.long_samples)
    cache = open_cache(cache_folder, key)
    if cache is None:
        cache = build_cache(
            data,
            tokenizer,
            cache_folder,
            key=key,
            sha256=sha256,
            context=context,
            long_samples=settings.long_samples,
            told=None if told is None else lambda a, b: told("tokenize", a, b),
        )
    lengths, facts = cache.lengths, cache.facts
    parts = split(lengths, settings.validation, settings.seed)
    rows = _rows(parts.training, lengths, context, settings)
    validation = _rows(parts.validation, lengths, context, settings)
    widest = max(int(rows.lengths.max()), int(validation.lengths.max(initial=0)))
    longest = width(widest, context)
    pad = tokenizer.eos_token_id
    return Prepared(
        cache=cache,
        split=parts,
        rows=rows,
        validation=validation if len(validation) else None,
        context=context,
        longest=longest,
        pad_token=0 if pad is None else pad,
        data=TrainingData(
            name=facts.name,
            samples=facts.samples,
            tokens=facts.tokens,
            learned_tokens=facts.learned_tokens,
            longest=facts.longest,
            longest_line=facts.longest_line,
            truncated=facts.truncated,
            dropped=facts.dropped,
            validation_samples=len(parts.validation),
            rows=len(rows),
            filled=float(rows.lengths.sum()) / (len(rows) * longest),
            lengths=length_histogram([int(one) for one in lengths], facts.longest),
            documents=max(rows.most_samples, validation.most_samples),
            is_cut=data.suffix.lower() in TEXT_SUFFIXES,
        ),
    )


def digest_of_tokenizer(folder: Path) -> str:
    """Of the files that decide what a text's tokens are."""
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_FILES):
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()


def make_training_plan(
    planner: TrainingPlanner, prepared: Prepared, spec: ModelSpec
) -> TrainingPlan:
    """The plan for prepared data."""
    return planner.plan(
        prepared.data,
        context=prepared.context,
        longest=prepared.longest,
        chunked_loss=chunks_loss(spec),
    )


def settle(settings: TuningSettings, chosen: Mapping[str, Any]) -> TuningSettings:
    """Options with what an earlier run of the same folder had chosen where they leave it open."""
    kept: dict[str, Any] = {}
    if settings.optimizer == "auto" and "optimizer" in chosen:
        kept["optimizer"] = chosen["optimizer"]
    if settings.checkpointing == "auto" and "checkpointing" in chosen:
        kept["checkpointing"] = chosen["checkpointing"]
    if settings.micro_batch is None and "micro_batch" in chosen:
        kept["micro_batch"] = min(chosen["micro_batch"], settings.batch_size)
    return replace(settings, **kept)


def _rows(samples: Numbers, lengths: Numbers, context: int, settings: TuningSettings) -> Rows:
    if not settings.packing or not len(samples):
        return single_rows(samples, lengths)
    return pack(samples, lengths, context, settings.seed)
