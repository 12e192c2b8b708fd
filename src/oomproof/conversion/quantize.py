"""`oomproof quantize`: a model's checkpoint → a folder that holds it in 4 bits.

A GPU quantizes where there is one; conversion/writing.py brings the folder about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from oomproof.conversion.devices import choose_device
from oomproof.conversion.encode import ShardEncoder, host_bytes
from oomproof.conversion.layout import (
    DEFAULT_SHARD_BYTES,
    Output,
    OutputShard,
    choose_dtype,
    lay_out,
)
from oomproof.conversion.small_files import small_files
from oomproof.conversion.work import place_of_output, refuse_inside
from oomproof.conversion.writing import (
    FolderJob,
    FolderReport,
    ShardFile,
    Told,
    fingerprint,
    source_for,
    write,
)
from oomproof.errors import CheckpointError
from oomproof.loading.targets import Target
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec

_LAYOUT = "2"
"""Of what decides bytes and is in no option: finished work of another is not taken up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeReport(FolderReport):
    """What was written."""

    format: str
    block_scales: str
    """How they were chosen: "searched" or "absmax"."""
    source_bytes: int
    """Of the tensors that were read, in this run and in those before it."""
    was_there: bool
    """Whether all was written before, and nothing now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeJob(FolderJob):
    """What is to be written, known to the byte before a weight is read."""

    act: ClassVar[str] = "quantize"

    output: Output

    @property
    def host_bytes(self) -> int:
        """A bound of the host memory that it takes beside the process's libraries."""
        return host_bytes(self.output)

    def targets(self, shard: OutputShard, file: ShardFile) -> Sequence[Target]:
        """Quantized, or cast, and written."""
        return ShardEncoder(self.output, shard, file, self.device).targets()

    def check(self, folder: Path) -> None:
        """Reads the output's config and headers as a user's next command will."""
        own = resolve(str(folder)).checkpoint_quantization
        if own is None or own.format is not self.output.format:
            raise CheckpointError(
                str(folder), "does not read as it was written", remedy="report this as a bug"
            )


def prepare(
    spec: ModelSpec,
    out: Path,
    *,
    format_name: str,
    dtype: str = "auto",
    device: str = "auto",
    search: bool | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    told: Told | None = None,
) -> QuantizeJob:
    """Reads everything but weights.

    Args:
        spec: The model, with the headers of its checkpoint.
        out: The folder to make.
        format_name: One of layout.QUANTIZE_FORMATS.
        dtype: Of what is not quantized: "auto" for the checkpoint's own.
        device: "auto", "cpu", "cuda" or "cuda:1".
        search: Whether block scales are searched; None where the format has some.
        shard_bytes: The most that a shard has.
        told: Told of progress.

    Raises:
        InputError: Anything of this cannot be done.
        CheckpointError: The source is damaged.
    """
    out = place_of_output(out)
    if spec.source.kind == "folder":
        refuse_inside(out, Path(spec.source.path))
    output = lay_out(
        spec, format_name, choose_dtype(spec, dtype), search=search, shard_bytes=shard_bytes
    )
    assert spec.checkpoint is not None
    source = source_for(spec, out, told)
    small = small_files(source, output)
    options = f"{output.format.name} {output.dtype} {output.block_scales}"
    return QuantizeJob(
        checkpoint=spec.checkpoint,
        source=source,
        shards=output.shards,
        out=out,
        device=choose_device(device, output),
        small_files=small,
        made_from={
            "made_by": _made_by(),
            "model": spec.id,
            "revision": spec.source.revision,
            "format": output.format.name,
            "dtype": output.dtype.value,
            "block_scales": output.block_scales,
        },
        job=fingerprint(_LAYOUT, options, spec, output.shards, small),
        output=output,
    )


def run(job: QuantizeJob, told: Told | None = None) -> QuantizeReport:
    """Writes the output, or what is left of it to write.

    Args:
        job: What `prepare` returned.
        told: Told of progress.

    Raises:
        InputError: The place of the output is taken.
        CheckpointError: The source is damaged, or the disk is full: what is finished is kept.
    """
    written = write(job, told)
    return QuantizeReport(
        folder=str(job.out),
        format=job.output.format.name,
        dtype=job.output.dtype.value,
        block_scales=job.output.block_scales,
        source_bytes=job.source_bytes,
        output_bytes=job.output_bytes,
        files=job.num_files,
        resumed_files=written.resumed_files,
        device=str(job.device),
        was_there=written.was_there,
        seconds=written.seconds,
    )


def _made_by() -> str:
    try:
        return f"oomproof {version('oomproof')}"
    except PackageNotFoundError:  # run from its sources
        return "oomproof"
