"""`oomproof merge`: a model and a LoRA adapter → a folder with both in 16 bits.

Shard after shard, as `quantize` does: slices of a weight are read, what the adapter adds to those
rows is computed in float32 and added before the one rounding, and the file is written, synced and
digested. The folder gets its name when every file is there.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from oomproof.conversion.adapter import Adapter, Pair, read_adapter
from oomproof.conversion.devices import named_device
from oomproof.conversion.files import FileDigest, PartFile, explained, write_whole
from oomproof.conversion.layout import (
    MIN_SHARD_BYTES,
    Conversion,
    OutputShard,
    choose_dtype,
    lay_out_plain,
)
from oomproof.conversion.manifest import MANIFEST_FILE, Manifest, read_manifest
from oomproof.conversion.small_files import plain_files
from oomproof.conversion.sources import Source, source_of
from oomproof.conversion.work import (
    WorkFolder,
    locked,
    place_of_output,
    refuse_used,
    work_folder_of,
)
from oomproof.errors import CheckpointError, InputError
from oomproof.formats import DType
from oomproof.loading.pipeline import load_checkpoint
from oomproof.loading.slices import Limits
from oomproof.loading.targets import Target
from oomproof.memory.native import PINNED_BYTES
from oomproof.models.resolve import resolve
from oomproof.models.spec import CheckpointSpec, ModelSpec
from oomproof.units import MIB, format_bytes

Told = Callable[[str, int, int], None]
"""Called with ("download" or "merge", bytes done, bytes in all)."""

LIMITS = Limits(piece_bytes=4 * MIB, slice_bytes=16 * MIB, pinned_bytes=PINNED_BYTES // 2)
_NO_DIGEST = "0" * 64
_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What was written."""

    folder: str
    adapter: str
    dtype: str
    merged: int
    """Weights that the adapter changed."""
    output_bytes: int
    files: int
    resumed_files: int
    """Shards that an earlier run had finished."""
    device: str
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeJob:
    """What is to be written, known to the byte before a weight is read."""

    spec: ModelSpec
    checkpoint: CheckpointSpec
    adapter: Adapter
    source: Source
    shards: tuple[OutputShard, ...]
    dtype: DType
    out: Path
    device: torch.device
    small_files: Mapping[str, bytes]
    job: str
    """Digest of all that the output depends on."""

    @property
    def output_bytes(self) -> int:
        """Of every file but the manifest."""
        small = sum(len(content) for content in self.small_files.values())
        return small + sum(shard.size_bytes for shard in self.shards)

    def manifest(self, digests: Mapping[str, FileDigest]) -> Manifest:
        """With zeros for digests that are not known yet."""
        sizes = {shard.file: shard.size_bytes for shard in self.shards}
        sizes |= {name: len(content) for name, content in self.small_files.items()}
        return Manifest(
            job=self.job,
            made_from={
                "model": self.spec.id,
                "revision": self.spec.source.revision,
                "adapter": self.adapter.digest[:64],
                "dtype": self.dtype.value,
            },
            files=tuple(
                digests.get(name) or FileDigest(file=name, size_bytes=size, sha256=_NO_DIGEST)
                for name, size in sorted(sizes.items())
            ),
        )


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
    """Reads everything but weights.

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
    adapter = read_adapter(adapter_folder)
    _check_pairs(spec, adapter)
    chosen = choose_dtype(spec, dtype)
    shards = lay_out_plain(spec.checkpoint, chosen, shard_bytes=shard_bytes)
    total = 0 if spec.download_bytes is None else spec.download_bytes - spec.cached_bytes

    def fetched(done_bytes: int) -> None:
        if told is not None:
            told("download", min(done_bytes, total), total)

    source = source_of(spec, work_folder_of(out) / ".source", fetched)
    small = plain_files(source, shards, chosen)
    return MergeJob(
        spec=spec,
        checkpoint=spec.checkpoint,
        adapter=adapter,
        source=source,
        shards=shards,
        dtype=chosen,
        out=out,
        device=named_device(device),
        small_files=small,
        job=_fingerprint(spec, spec.checkpoint, adapter, shards, small),
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
    begin_s = time.perf_counter()
    if _is_there(job):
        return _report(job, len(job.shards), begin_s)
    refuse_used(job.out)
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
        resolve(str(work.path))  # as a user's next command will
        work.publish()
    return _report(job, resumed, begin_s)


def _write_shards(job: MergeJob, work: WorkFolder, told: Told | None) -> None:
    total = sum(shard.source_bytes for shard in job.shards)
    done = 0
    for number, shard in enumerate(job.shards):
        if shard.file not in work.finished:
            folder = job.source.fetch(shard.source_file)
            work.record(_write_shard(job, shard, folder, work.path))
        done += shard.source_bytes
        if told is not None:
            told("merge", done, total)
        following = job.shards[number + 1 :]
        if not following or following[0].source_file != shard.source_file:
            job.source.release(shard.source_file)


def _write_shard(job: MergeJob, shard: OutputShard, folder: Path, work_folder: Path) -> FileDigest:
    path = work_folder / shard.file
    with explained(path):
        file = PartFile(path, shard.size_bytes)
    try:
        checkpoint = CheckpointSpec(
            tensors=tuple(one.source for one in shard.conversions),
            files=tuple(one for one in job.checkpoint.files if one[0] == shard.source_file),
        )
        with explained(path):
            file.write(shard.header, 0)
            places = {tensor.name: tensor.offset_bytes for tensor in shard.tensors}
            targets = [
                _target(job, one, file, places[one.source.name]) for one in shard.conversions
            ]
            load_checkpoint(folder, checkpoint, targets, limits=LIMITS, threads=2)
    except torch.OutOfMemoryError as error:
        file.abandon()
        raise InputError(
            f"{job.device} has too little free memory to merge {shard.file}",
            remedy="use --device cpu",
        ) from error
    except BaseException:
        file.abandon()
        raise
    with explained(path):
        return file.finish()


def _target(job: MergeJob, one: Conversion, file: PartFile, offset_bytes: int) -> Target:
    """Where a weight's slices go: the adapter's part added, cast, written."""
    dtype: torch.dtype = getattr(torch, job.dtype.value)
    pair = job.adapter.pairs.get(one.source.name)
    device = torch.device("cpu") if pair is None else job.device

    def store(values: torch.Tensor, first_row: int) -> None:
        if pair is not None:
            values = merged(values, pair, first_row)
        cast = values.to(dtype)
        if not bool(torch.isfinite(cast).all()) and bool(torch.isfinite(values).all()):
            raise CheckpointError(
                one.source.file,
                f"{one.source.name!r} holds {float(values.abs().amax()):g} merged, beyond "
                f"{job.dtype.value}",
                remedy="use --dtype bfloat16",
            )
        row = values[0].numel() if one.source.shape else 1
        raw = cast.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        begin = offset_bytes + first_row * row * cast.itemsize
        file.write(memoryview(raw.numpy()), begin)  # type: ignore[arg-type]

    return Target(name=one.source.name, shape=one.source.shape, device=device, store=store)


def merged(values: torch.Tensor, pair: Pair, first_row: int) -> torch.Tensor:
    """Rows of a weight with the adapter's part added, in float32: [rows, in]."""
    up = pair.up[first_row : first_row + values.shape[0]].to(values.device, torch.float32)
    down = pair.down.to(values.device, torch.float32)
    return values.float() + pair.scale * (up @ down)


def _check_pairs(spec: ModelSpec, adapter: Adapter) -> None:
    assert spec.checkpoint is not None
    shapes = {tensor.name: tensor.shape for tensor in spec.checkpoint.tensors}
    for name, pair in adapter.pairs.items():
        shape = (pair.up.shape[0], pair.down.shape[1])
        if shapes.get(name) != shape:
            has = "no such weight" if name not in shapes else f"{name} of {shapes[name]}"
            raise InputError(
                f"adapter {adapter.folder} is for {name} of {shape}, {spec.id} has {has}",
                remedy=f"merge it into the model it was made for: {adapter.base or 'unknown'}",
            )


def _fingerprint(
    spec: ModelSpec,
    checkpoint: CheckpointSpec,
    adapter: Adapter,
    shards: tuple[OutputShard, ...],
    small_files: Mapping[str, bytes],
) -> str:
    source = spec.source
    digest = hashlib.sha256(f"merge {_VERSION} {source.kind} {source.revision}".encode())
    digest.update(adapter.digest.encode())
    for shard in shards:
        digest.update(f"{shard.file} {shard.source_file}".encode() + shard.header)
    for tensor in checkpoint.tensors:
        digest.update(repr(tensor).encode())
    if source.kind == "folder":
        for file, size in checkpoint.files:
            changed = (Path(source.path) / file).stat().st_mtime_ns
            digest.update(f"{Path(source.path).absolute()} {file} {size} {changed}".encode())
    for name, content in sorted(small_files.items()):
        digest.update(name.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _is_there(job: MergeJob) -> bool:
    """Whether this very output is there already, whole by its manifest."""
    if not (job.out / MANIFEST_FILE).is_file():
        return False
    manifest = read_manifest(job.out)
    return (
        manifest is not None
        and manifest.job == job.job
        and all(
            (job.out / one.file).is_file() and (job.out / one.file).stat().st_size == one.size_bytes
            for one in manifest.files
        )
    )


def _refuse_small_disk(job: MergeJob, work: WorkFolder) -> None:
    done = sum(one.size_bytes for one in work.finished.values())
    needed = job.output_bytes - done + job.source.download_bytes
    free = shutil.disk_usage(work.path).free
    if needed > free:
        raise CheckpointError(
            str(job.out),
            f"needs {format_bytes(needed)} more, the disk has {format_bytes(free)} free",
            remedy="free some space, or give an --out on a larger disk",
        )


def _report(job: MergeJob, resumed: int, begin_s: float) -> MergeReport:
    return MergeReport(
        folder=str(job.out),
        adapter=str(job.adapter.folder),
        dtype=job.dtype.value,
        merged=len(job.adapter.pairs),
        output_bytes=job.output_bytes + len(job.manifest({}).as_bytes()),
        files=len(job.small_files) + len(job.shards) + 1,
        resumed_files=resumed,
        device=str(job.device),
        seconds=time.perf_counter() - begin_s,
    )
