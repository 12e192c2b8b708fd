"""`oomproof quantize`: a model's checkpoint → a folder that holds it in 4 bits.

Shard after shard: what a shard of the output is made of is read in slices, quantized on a GPU where
there is one, written to a file whose bytes are all laid out before, synced, read back for its
digest, and noted. The folder gets its name when every file is there.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from oomproof.conversion.devices import choose_device
from oomproof.conversion.encode import LIMITS, ShardEncoder, host_bytes
from oomproof.conversion.files import (
    FileDigest,
    PartFile,
    explained,
    write_whole,
)
from oomproof.conversion.layout import (
    DEFAULT_SHARD_BYTES,
    Output,
    OutputShard,
    choose_dtype,
    lay_out,
)
from oomproof.conversion.manifest import MANIFEST_FILE, Manifest, read_manifest
from oomproof.conversion.small_files import small_files
from oomproof.conversion.sources import Source, source_of
from oomproof.conversion.work import (
    WorkFolder,
    locked,
    place_of_output,
    refuse_inside,
    refuse_used,
    work_folder_of,
)
from oomproof.errors import CheckpointError, InputError
from oomproof.loading.pipeline import load_checkpoint
from oomproof.models.headers import shorten
from oomproof.models.resolve import resolve
from oomproof.models.spec import CheckpointSpec, ModelSpec
from oomproof.units import format_bytes

Told = Callable[[str, int, int], None]
"""Called with ("download" or "quantize", bytes done, bytes in all)."""

_NO_DIGEST = "0" * 64
_LAYOUT_VERSION = 2
"""Of what decides bytes and is in no option: finished work of another is not taken up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeReport:
    """What was written."""

    folder: str
    format: str
    dtype: str
    block_scales: str
    """How they were chosen: "searched" or "absmax"."""
    source_bytes: int
    """Of the tensors that were read, in this run and in those before it."""
    output_bytes: int
    """Of every file."""
    files: int
    resumed_files: int
    """Shards that an earlier run had finished."""
    device: str
    was_there: bool
    """Whether all was written before, and nothing now."""
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeJob:
    """What is to be written, known to the byte before a weight is read."""

    spec: ModelSpec
    source: Source
    output: Output
    out: Path
    device: torch.device
    small_files: Mapping[str, bytes]
    """Every file but shards and manifest."""
    job: str
    """Digest of all that the output depends on."""

    @property
    def output_bytes(self) -> int:
        """Of every file of the output."""
        small = sum(len(content) for content in self.small_files.values())
        shards = sum(shard.size_bytes for shard in self.output.shards)
        return small + shards + len(self.manifest({}).as_bytes())

    @property
    def host_bytes(self) -> int:
        """A bound of the host memory that it takes beside the process's libraries."""
        return host_bytes(self.output)

    def manifest(self, digests: Mapping[str, FileDigest]) -> Manifest:
        """With zeros for digests that are not known yet."""
        sizes = {shard.file: shard.size_bytes for shard in self.output.shards}
        sizes |= {name: len(content) for name, content in self.small_files.items()}
        return Manifest(
            job=self.job,
            made_from={
                "made_by": _made_by(),
                "model": self.spec.id,
                "revision": self.spec.source.revision,
                "format": self.output.format.name,
                "dtype": self.output.dtype.value,
                "block_scales": self.output.block_scales,
            },
            files=tuple(
                digests.get(name) or FileDigest(file=name, size_bytes=size, sha256=_NO_DIGEST)
                for name, size in sorted(sizes.items())
            ),
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
    total = 0 if spec.download_bytes is None else spec.download_bytes - spec.cached_bytes

    def fetched(done_bytes: int) -> None:
        if told is not None:
            told("download", min(done_bytes, total), total)

    source = source_of(spec, work_folder_of(out) / ".source", fetched)
    small = small_files(source, output)
    return QuantizeJob(
        spec=spec,
        source=source,
        output=output,
        out=out,
        device=choose_device(device, output),
        small_files=small,
        job=_fingerprint(spec, output, small),
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
    begin_s = time.perf_counter()
    found = read_manifest(job.out)
    if found is not None and _is_there(job, found):
        return _report(job, len(job.output.shards), begin_s, was_there=True)
    refuse_used(job.out, None if found is None else _what(found))
    work = WorkFolder(job.out, job.job)
    with explained(job.out.parent):
        job.out.parent.mkdir(parents=True, exist_ok=True)
    work.make()
    with locked(work.path):
        work.begin()
        resumed = len(work.finished)
        _refuse_small_disk(job, work)
        _write_shards(job, work, told)
        digests = dict(work.finished)
        with explained(work.path):
            for name, content in job.small_files.items():
                digests[name] = write_whole(work.path / name, content)
            write_whole(work.path / MANIFEST_FILE, job.manifest(digests).as_bytes())
        _check(work.path, job)
        work.publish()
    return _report(job, resumed, begin_s)


def _write_shards(job: QuantizeJob, work: WorkFolder, told: Told | None) -> None:
    total = sum(shard.source_bytes for shard in job.output.shards)
    done = 0
    shards = job.output.shards
    for number, shard in enumerate(shards):
        if shard.file not in work.finished:
            folder = job.source.fetch(shard.source_file)
            work.record(_write_shard(job, shard, folder, work.path, _from(told, done, total)))
        done += shard.source_bytes
        if told is not None:
            told("quantize", done, total)
        is_last = number + 1 == len(shards) or shards[number + 1].source_file != shard.source_file
        if is_last:
            job.source.release(shard.source_file)


def _write_shard(
    job: QuantizeJob,
    shard: OutputShard,
    folder: Path,
    work_folder: Path,
    told: Callable[[int, int], None] | None,
) -> FileDigest:
    path = work_folder / shard.file
    with explained(path):
        file = PartFile(path, shard.size_bytes)
    try:
        checkpoint = CheckpointSpec(
            tensors=tuple(one.source for one in shard.conversions),
            files=tuple(one for one in _checkpoint(job).files if one[0] == shard.source_file),
        )
        encoder = ShardEncoder(job.output, shard, file, job.device)
        with explained(path):
            file.write(shard.header, 0)
            load_checkpoint(
                folder, checkpoint, encoder.targets(), progress=told, limits=LIMITS, threads=2
            )
    except torch.OutOfMemoryError as error:
        file.abandon()
        raise InputError(
            f"{job.device} has too little free memory to quantize {shard.file}",
            remedy="use --device cpu",
        ) from error
    except BaseException:
        file.abandon()
        raise
    with explained(path):
        return file.finish()


def _from(told: Told | None, before: int, total: int) -> Callable[[int, int], None] | None:
    if told is None:
        return None
    return lambda done, _of: told("quantize", before + done, total)


def _checkpoint(job: QuantizeJob) -> CheckpointSpec:
    assert job.spec.checkpoint is not None
    return job.spec.checkpoint


def _fingerprint(spec: ModelSpec, output: Output, small_files: Mapping[str, bytes]) -> str:
    """Digest of what decides the output's bytes, and of what tells that the source changed."""
    assert spec.checkpoint is not None
    digest = hashlib.sha256(f"{_LAYOUT_VERSION} {spec.source.kind} {spec.source.revision}".encode())
    digest.update(f"{output.format.name} {output.dtype} {output.block_scales}".encode())
    for shard in output.shards:
        digest.update(f"{shard.file} {shard.source_file}".encode())
        digest.update(shard.header)
    for tensor in spec.checkpoint.tensors:
        digest.update(repr(tensor).encode())
    if spec.source.kind == "folder":
        for file, size in spec.checkpoint.files:
            changed = (Path(spec.source.path) / file).stat().st_mtime_ns
            digest.update(f"{Path(spec.source.path).absolute()} {file} {size} {changed}".encode())
    for name, content in sorted(small_files.items()):
        digest.update(name.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _is_there(job: QuantizeJob, manifest: Manifest) -> bool:
    """Whether this very output is there already, whole by its manifest."""
    return manifest.job == job.job and all(
        (job.out / one.file).is_file() and (job.out / one.file).stat().st_size == one.size_bytes
        for one in manifest.files
    )


def _what(manifest: Manifest) -> str:
    model, weight_format, dtype, scales = (
        shorten(manifest.made_from.get(name, "unknown")).strip("'")
        for name in ("model", "format", "dtype", "block_scales")
    )
    return f"{model} in {weight_format} and {dtype}, block scales {scales}"


def _refuse_small_disk(job: QuantizeJob, work: WorkFolder) -> None:
    done = sum(one.size_bytes for one in work.finished.values())
    here = sum(path.stat().st_size for path in work.source_folder.rglob("*") if path.is_file())
    needed = job.output_bytes - done + max(0, job.source.download_bytes - here)
    free = shutil.disk_usage(work.path).free
    if needed > free:
        beside = f", {format_bytes(job.source.download_bytes)} of it for a shard on its way"
        raise CheckpointError(
            str(job.out),
            f"needs {format_bytes(needed)} more{beside if job.source.download_bytes else ''}, "
            f"the disk has {format_bytes(free)} free",
            remedy="free some space, or give an --out on a larger disk",
        )


def _check(folder: Path, job: QuantizeJob) -> None:
    """Reads the output's config and headers as a user's next command will."""
    spec = resolve(str(folder))
    own = spec.checkpoint_quantization
    if own is None or own.format is not job.output.format:
        raise CheckpointError(
            str(folder), "does not read as it was written", remedy="report this as a bug"
        )


def _made_by() -> str:
    try:
        return f"oomproof {version('oomproof')}"
    except PackageNotFoundError:  # run from its sources
        return "oomproof"


def _report(
    job: QuantizeJob, resumed: int, begin_s: float, *, was_there: bool = False
) -> QuantizeReport:
    return QuantizeReport(
        folder=str(job.out),
        format=job.output.format.name,
        dtype=job.output.dtype.value,
        block_scales=job.output.block_scales,
        source_bytes=sum(shard.source_bytes for shard in job.output.shards),
        output_bytes=job.output_bytes,
        files=len(job.manifest({}).files) + 1,
        resumed_files=resumed,
        device=str(job.device),
        was_there=was_there,
        seconds=time.perf_counter() - begin_s,
    )
