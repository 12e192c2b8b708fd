"""A folder of weights that appears when it is whole, whatever its weights are made by.

Shard after shard: what a shard is made of is read in slices, changed, written to a file whose bytes
are all laid out before, synced, read back for its digest, and noted. Then come the small files and
the manifest, and the folder gets its name. The same command goes on with what is finished.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch

from oomproof.conversion.files import FileDigest, PartFile, explained, write_whole
from oomproof.conversion.layout import Conversion, OutputShard
from oomproof.conversion.manifest import MANIFEST_FILE, Manifest, read_manifest
from oomproof.conversion.sources import Source, source_of
from oomproof.conversion.work import WorkFolder, locked, refuse_used, work_folder_of
from oomproof.errors import CheckpointError, InputError
from oomproof.loading.pipeline import load_checkpoint
from oomproof.loading.slices import Limits
from oomproof.loading.targets import Target
from oomproof.memory.native import PINNED_BYTES
from oomproof.models.headers import shorten
from oomproof.models.resolve import resolve
from oomproof.models.spec import CheckpointSpec, ModelSpec
from oomproof.units import MIB, format_bytes

Told = Callable[[str, int, int], None]
"""Called with ("download" or the job's act, bytes done, bytes in all)."""

LIMITS = Limits(piece_bytes=4 * MIB, slice_bytes=16 * MIB, pinned_bytes=PINNED_BYTES // 2)
"""Smaller than where a model is loaded: the disk is the slower part."""
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderReport:
    """What was written."""

    folder: str
    dtype: str
    output_bytes: int
    """Of every file."""
    files: int
    resumed_files: int
    """Shards that an earlier run had finished."""
    device: str
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a run did."""

    resumed_files: int
    """Shards that an earlier run had finished."""
    was_there: bool
    """Whether all was written before, and nothing now."""
    seconds: float


class ShardFile:
    """One shard on its way to the disk: tensors are brought to their places by name.

    Args:
        shard: What it will hold.
        file: Where it grows.
    """

    def __init__(self, shard: OutputShard, file: PartFile) -> None:
        self._file = file
        self._places = {tensor.name: tensor for tensor in shard.tensors}
        file.write(shard.header, 0)

    def write(self, name: str, values: torch.Tensor, first_byte: int = 0) -> None:
        """Brings values to their place, beginning at a byte of it."""
        place = self._places[name]
        raw = values.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        if first_byte + raw.numel() > place.size_bytes:
            raise ValueError(f"{name} has {place.size_bytes} bytes, {raw.numel()} more were made")
        content = memoryview(raw.numpy())  # type: ignore[arg-type]
        self._file.write(content, place.offset_bytes + first_byte)

    def write_all(self, name: str, values: torch.Tensor) -> None:
        """The same for a tensor's every byte."""
        if values.nbytes != self._places[name].size_bytes:
            raise ValueError(f"{name} is not as long as it was laid out")
        self.write(name, values)

    def write_rows(self, one: Conversion, values: torch.Tensor, first_row: int) -> None:
        """The same for some rows of a tensor that keeps name and shape."""
        numel = values[0].numel() if one.source.shape else 1
        self.write(one.source.name, values, first_row * numel * values.itemsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderJob(ABC):
    """What is to be written, known to the byte before a weight is read."""

    act: ClassVar[str]
    """A verb, for progress and errors."""

    checkpoint: CheckpointSpec
    """What is read."""
    source: Source
    shards: tuple[OutputShard, ...]
    out: Path
    device: torch.device
    small_files: Mapping[str, bytes]
    """Every file but shards and manifest."""
    made_from: Mapping[str, object]
    """For the manifest."""
    job: str
    """Digest of all that the output depends on."""

    @abstractmethod
    def targets(self, shard: OutputShard, file: ShardFile) -> Sequence[Target]:
        """Where the tensors of a shard's source go: one for each, which writes to the file."""

    def check(self, folder: Path) -> None:
        """Reads the output's config and headers as a user's next command will."""
        resolve(str(folder))

    @property
    def source_bytes(self) -> int:
        """Of the tensors that are read."""
        return sum(shard.source_bytes for shard in self.shards)

    @property
    def output_bytes(self) -> int:
        """Of every file of the output."""
        small = sum(len(content) for content in self.small_files.values())
        shards = sum(shard.size_bytes for shard in self.shards)
        return small + shards + len(self.manifest({}).as_bytes())

    @property
    def num_files(self) -> int:
        """Of the output."""
        return len(self.small_files) + len(self.shards) + 1

    def manifest(self, digests: Mapping[str, FileDigest]) -> Manifest:
        """With zeros for digests that are not known yet."""
        sizes = {shard.file: shard.size_bytes for shard in self.shards}
        sizes |= {name: len(content) for name, content in self.small_files.items()}
        return Manifest(
            job=self.job,
            made_from=self.made_from,
            files=tuple(
                digests.get(name) or FileDigest(file=name, size_bytes=size, sha256=_NO_DIGEST)
                for name, size in sorted(sizes.items())
            ),
        )


def source_for(spec: ModelSpec, out: Path, told: Told | None) -> Source:
    """Where shards are read from; those that are downloaded lie in the work folder."""
    total = 0 if spec.download_bytes is None else spec.download_bytes - spec.cached_bytes

    def fetched(done_bytes: int) -> None:
        if told is not None:
            told("download", min(done_bytes, total), total)

    return source_of(spec, work_folder_of(out) / ".source", fetched)


def fingerprint(
    layout: str,
    options: str,
    spec: ModelSpec,
    shards: Sequence[OutputShard],
    small_files: Mapping[str, bytes],
) -> str:
    """Digest of what decides the output's bytes, and of what tells that the source changed.

    Args:
        layout: The version of what decides bytes and is in no option.
        options: What else decides them.
        spec: The model that is read.
        shards: What is written of it.
        small_files: What is written beside them.
    """
    assert spec.checkpoint is not None
    digest = hashlib.sha256(f"{layout} {spec.source.kind} {spec.source.revision}".encode())
    digest.update(options.encode())
    for shard in shards:
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


def write(job: FolderJob, told: Told | None = None) -> Written:
    """Writes the output, or what is left of it to write.

    Raises:
        InputError: The place of the output is taken.
        CheckpointError: The source is damaged, or the disk is full: what is finished is kept.
    """
    begin_s = time.perf_counter()
    found = read_manifest(job.out)
    was_there = found is not None and _is_there(job, found)
    resumed = len(job.shards)
    if not was_there:
        refuse_used(job.out, None if found is None else _what(found))
        resumed = _write(job, told)
    return Written(
        resumed_files=resumed, was_there=was_there, seconds=time.perf_counter() - begin_s
    )


def _write(job: FolderJob, told: Told | None) -> int:
    """Returns the shards that an earlier run had finished."""
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
        job.check(work.path)
        work.publish()
    return resumed


def _write_shards(job: FolderJob, work: WorkFolder, told: Told | None) -> None:
    done, total = 0, job.source_bytes
    for number, shard in enumerate(job.shards):
        if shard.file not in work.finished:
            folder = job.source.fetch(shard.source_file)
            progress = _from(told, job.act, done, total)
            work.record(_write_shard(job, shard, folder, work.path, progress))
        done += shard.source_bytes
        if told is not None:
            told(job.act, done, total)
        following = job.shards[number + 1 :]
        if not following or following[0].source_file != shard.source_file:
            job.source.release(shard.source_file)


def _write_shard(
    job: FolderJob,
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
            files=tuple(one for one in job.checkpoint.files if one[0] == shard.source_file),
        )
        with explained(path):
            targets = job.targets(shard, ShardFile(shard, file))
            load_checkpoint(folder, checkpoint, targets, progress=told, limits=LIMITS, threads=2)
    except torch.OutOfMemoryError as error:
        file.abandon()
        raise InputError(
            f"{job.device} has too little free memory to {job.act} {shard.file}",
            remedy="use --device cpu",
        ) from error
    except BaseException:
        file.abandon()
        raise
    with explained(path):
        return file.finish()


def _from(
    told: Told | None, act: str, before: int, total: int
) -> Callable[[int, int], None] | None:
    if told is None:
        return None
    return lambda done, _of: told(act, before + done, total)


def _is_there(job: FolderJob, manifest: Manifest) -> bool:
    """Whether this very output is there already, whole by its manifest."""
    return manifest.job == job.job and all(
        (job.out / one.file).is_file() and (job.out / one.file).stat().st_size == one.size_bytes
        for one in manifest.files
    )


def _what(manifest: Manifest) -> str:
    made_from = manifest.made_from
    model, weight_format, dtype, scales = (
        shorten(made_from.get(name, "unknown")).strip("'")
        for name in ("model", "format", "dtype", "block_scales")
    )
    if "adapter" in made_from:
        return f"{model} with an adapter merged, in {dtype}"
    return f"{model} in {weight_format} and {dtype}, block scales {scales}"


def _refuse_small_disk(job: FolderJob, work: WorkFolder) -> None:
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
