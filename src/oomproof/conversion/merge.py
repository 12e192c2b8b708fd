"""`oomproof merge`: a model and a LoRA adapter → a folder with both in 16 bits.

W' = W + scale × B A: what the adapter adds to a slice of rows is computed in float32 and added
before the one rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from oomproof.conversion.devices import named_device
from oomproof.conversion.files import digest_of
from oomproof.conversion.layout import (
    MIN_SHARD_BYTES,
    Conversion,
    OutputShard,
    choose_dtype,
    lay_out_plain,
)
from oomproof.conversion.small_files import plain_files
from oomproof.conversion.work import place_of_output
from oomproof.conversion.writing import (
    FolderJob,
    FolderReport,
    ShardFile,
    Told,
    fingerprint,
    source_for,
    write,
)
from oomproof.errors import CheckpointError, InputError
from oomproof.formats import DType
from oomproof.loading.adapter import read_values
from oomproof.loading.targets import Target
from oomproof.models.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterSpec, read_adapter
from oomproof.models.spec import ModelSpec
from oomproof.units import format_bytes

_LAYOUT = "merge 1"
"""Of what decides bytes and is in no option: finished work of another is not taken up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport(FolderReport):
    """What was written."""

    adapter: str
    merged: int
    """Weights that the adapter changed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """What one weight gets added."""

    down: torch.Tensor
    """A: [rank, in]."""
    up: torch.Tensor
    """B: [out, rank]."""
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeJob(FolderJob):
    """What is to be written, known to the byte before a weight is read."""

    act: ClassVar[str] = "merge"

    adapter: AdapterSpec
    pairs: Mapping[str, Pair]
    """Weight's name → what it gets added, in host memory."""
    dtype: DType

    def targets(self, shard: OutputShard, file: ShardFile) -> Sequence[Target]:
        """The adapter's part added, cast, written."""
        return [self._target(one, file) for one in shard.conversions]

    def _target(self, one: Conversion, file: ShardFile) -> Target:
        dtype: torch.dtype = getattr(torch, self.dtype.value)
        pair = self.pairs.get(one.source.name)
        device = torch.device("cpu") if pair is None else self.device

        def store(values: torch.Tensor, first_row: int) -> None:
            if pair is not None:
                values = merged(values, pair, first_row)
            cast = values.to(dtype)
            if not bool(torch.isfinite(cast).all()) and bool(torch.isfinite(values).all()):
                raise CheckpointError(
                    one.source.file,
                    f"{one.source.name!r} holds {float(values.abs().amax()):g} merged, beyond "
                    f"{self.dtype.value}",
                    remedy="use --dtype bfloat16",
                )
            file.write_rows(one, cast, first_row)

        return Target(name=one.source.name, shape=one.source.shape, device=device, store=store)


def prepare(
    spec: ModelSpec,
    adapter_folder: Path,
    out: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    shard_bytes: int,
    told: Told | None = None,
) -> MergeJob:
    """Reads everything but the model's weights.

    Args:
        spec: The base, with the headers of its checkpoint.
        adapter_folder: As peft keeps it.
        out: The folder to make.
        dtype: Of every weight: "auto" for the checkpoint's own.
        device: "auto", "cpu", "cuda" or "cuda:1".
        shard_bytes: The most that a shard has.
        told: Told of progress.

    Raises:
        InputError: Anything of this cannot be done.
        CheckpointError: Base or adapter is damaged.
    """
    assert spec.checkpoint is not None
    out = place_of_output(out)
    if shard_bytes < MIN_SHARD_BYTES:
        raise InputError(
            f"shard {shard_bytes:,} is less than {format_bytes(MIN_SHARD_BYTES)}",
            remedy="leave --shard out",
        )
    if spec.checkpoint_quantization is not None:
        raise InputError(
            f"{spec.id} is quantized ({spec.checkpoint_quantization.method})",
            remedy="merge into the 16-bit checkpoint it was made from",
        )
    adapter = read_adapter(adapter_folder, spec)
    _refuse_other_names(spec, adapter)
    folder = Path(adapter.path)
    weights, config = (digest_of(folder / name).sha256 for name in (WEIGHTS_FILE, CONFIG_FILE))
    chosen = choose_dtype(spec, dtype)
    shards = lay_out_plain(spec.checkpoint, chosen, shard_bytes=shard_bytes)
    source = source_for(spec, out, told)
    small = plain_files(source, shards, chosen)
    return MergeJob(
        checkpoint=spec.checkpoint,
        source=source,
        shards=shards,
        out=out,
        device=named_device(device),
        small_files=small,
        made_from={
            "model": spec.id,
            "revision": spec.source.revision,
            "adapter": weights,
            "dtype": chosen.value,
        },
        job=fingerprint(_LAYOUT, weights + config, spec, shards, small),
        adapter=adapter,
        pairs=_pairs(adapter),
        dtype=chosen,
    )


def run(job: MergeJob, told: Told | None = None) -> MergeReport:
    """Writes the output, or what is left of it to write.

    Args:
        job: What `prepare` returned.
        told: Told of progress.

    Raises:
        InputError: The place of the output is taken.
        CheckpointError: The source is damaged, or the disk is full: what is finished is kept.
    """
    written = write(job, told)
    return MergeReport(
        folder=str(job.out),
        adapter=job.adapter.path,
        dtype=job.dtype.value,
        merged=len(job.pairs),
        output_bytes=job.output_bytes,
        files=job.num_files,
        resumed_files=written.resumed_files,
        device=str(job.device),
        seconds=written.seconds,
    )


def merged(values: torch.Tensor, pair: Pair, first_row: int) -> torch.Tensor:
    """Rows of a weight with the adapter's part added, in float32: [rows, in]."""
    up = pair.up[first_row : first_row + values.shape[0]].to(values.device, torch.float32)
    down = pair.down.to(values.device, torch.float32)
    return values.float() + pair.scale * (up @ down)


def _pairs(adapter: AdapterSpec) -> dict[str, Pair]:
    values = read_values(adapter)
    return {
        one.weight: Pair(down=values[one.a.name], up=values[one.b.name], scale=one.scale)
        for one in adapter.weights
    }


def _refuse_other_names(spec: ModelSpec, adapter: AdapterSpec) -> None:
    """Some models are published under other names than they are computed with."""
    assert spec.checkpoint is not None
    shapes = {tensor.name: tensor.shape for tensor in spec.checkpoint.tensors}
    for one in adapter.weights:
        if shapes.get(one.weight) != one.shape:
            raise InputError(
                f"{spec.id} is published without {one.weight} of {list(one.shape)}, which the "
                "adapter changes",
                remedy="merge it with peft (merge_and_unload)",
            )
