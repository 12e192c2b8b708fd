"""A checkpoint into final places that exist already, at the speed of the storage.

Threads read the files in order into a bounded ring of page-locked buffers; from there pieces travel
to the devices, where slices wait in bounded staging memory to be converted into their places. The
three overlap. A load takes, beside the final places, at most PINNED_BYTES of host memory and
DEVICE_STAGING_BYTES of each device (memory/native.py), and gives both back when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from oomproof.errors import CheckpointError
from oomproof.loading.lanes import CpuLane, CudaLane, Lane
from oomproof.loading.random_weights import load_random
from oomproof.loading.slices import (
    DEFAULT_LIMITS,
    Batch,
    Limits,
    Piece,
    cut_pieces,
    plan_batches,
)
from oomproof.loading.sources import Buffers, default_threads, reading
from oomproof.loading.targets import (
    LoadProgress,
    LoadReport,
    Pair,
    Target,
    Ticker,
    is_computed_buffer,
    pair_with_checkpoint,
)
from oomproof.models.spec import CheckpointSpec

__all__ = ["Limits", "LoadProgress", "LoadReport", "Target", "load_checkpoint", "load_random"]

_BUFFERS_BESIDE_READERS = 8
"""Buffers that travel, or wait for their turn, while every thread fills another."""


def load_checkpoint(
    folder: Path,
    checkpoint: CheckpointSpec,
    targets: Sequence[Target],
    *,
    progress: LoadProgress | None = None,
    ignored: Callable[[str], bool] = is_computed_buffer,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> LoadReport:
    """Reads every tensor of a checkpoint once, checks it, and brings it to its target.

    Args:
        folder: Where the shards are.
        checkpoint: Their headers.
        targets: One for each tensor that is not ignored.
        progress: Called at most 20 times a second, the last time with all bytes done.
        ignored: Names of tensors that need no target, and are not read where they have none.
        threads: That read; by default one a core, at most 16.
        limits: How large things may be on the way.

    Raises:
        LoadError: Tensors and targets do not belong together.
        CheckpointError: A shard cannot be read, is shorter than its header says, or holds a tensor
            of whole numbers or a value that is not finite.
    """
    begin_s = time.perf_counter()
    pairs = pair_with_checkpoint(folder, checkpoint, targets, ignored)
    batches = plan_batches(pairs, limits)
    pieces = [piece for batch in batches for piece in cut_pieces(batch, limits)]
    threads = default_threads() if threads is None else threads
    buffers = _buffers(pieces, threads, limits)
    total_bytes = sum(piece.payload_bytes for piece in pieces)
    ticker = Ticker(progress, total_bytes)
    with (
        torch.no_grad(),
        _released(buffers),
        _lanes(batches, len(pairs), limits) as lanes,
    ):
        _transfer(folder, pieces, buffers, threads, lanes, ticker)
        for pair in pairs:
            if pair.is_empty and pair.target.finish is not None:
                pair.target.finish()
        _refuse_damaged(folder, pairs, lanes)
        staging = {d: lane.staging_bytes for d, lane in lanes.items() if d.type == "cuda"}
    ticker.finish()
    return LoadReport(
        bytes=total_bytes,
        seconds=time.perf_counter() - begin_s,
        tensors=len(pairs),
        pinned_bytes=buffers.pinned_bytes,
        device_staging_bytes=staging,
    )


def _transfer(
    folder: Path,
    pieces: Sequence[Piece],
    buffers: Buffers,
    threads: int,
    lanes: Mapping[torch.device, Lane],
    ticker: Ticker,
) -> None:
    with reading(folder, pieces, buffers, threads=threads) as arrivals:
        for piece, buffer in arrivals:
            lanes[piece.batch.device].receive(piece, buffer)
            if buffer is not None:
                buffers.give_back(buffer)
            ticker.add(piece.payload_bytes)


def _buffers(pieces: Sequence[Piece], threads: int, limits: Limits) -> Buffers:
    buffered = [piece for piece in pieces if piece.is_buffered]
    size = max((piece.end_bytes - piece.begin_bytes for piece in buffered), default=1)
    pinned = any(piece.batch.device.type == "cuda" for piece in buffered)
    if pinned:  # torch takes a power of two from the system
        size = 1 << (size - 1).bit_length()
    limit = min(limits.pinned_bytes // size, threads + _BUFFERS_BESIDE_READERS)
    return Buffers(size_bytes=size, limit=max(1, limit), pinned=pinned)


@contextmanager
def _released(buffers: Buffers) -> Iterator[None]:
    """Gives memory back to the system, not only to torch's caches, when all is done."""
    try:
        yield
    finally:
        buffers.close()
        if buffers.pinned:
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # noqa: SLF001 - has a public name only in newer torch


@contextmanager
def _lanes(
    batches: Sequence[Batch], tensors: int, limits: Limits
) -> Iterator[dict[torch.device, Lane]]:
    """A lane for each device that something goes to."""
    with ExitStack() as stack:
        lanes: dict[torch.device, Lane] = {}
        for device in dict.fromkeys(batch.device for batch in batches):
            lane = _lane(device, batches, tensors, limits)
            stack.callback(lane.close)
            lanes[device] = lane
        yield lanes


def _lane(device: torch.device, batches: Sequence[Batch], tensors: int, limits: Limits) -> Lane:
    if device.type == "cpu":
        return CpuLane(tensors)
    if device.type == "cuda":
        return CudaLane(device, [b for b in batches if b.device == device], tensors, limits)
    raise ValueError(f"tensors are loaded to the CPU and to CUDA devices, not to {device}")


def _refuse_damaged(
    folder: Path, pairs: Sequence[Pair], lanes: Mapping[torch.device, Lane]
) -> None:
    numbers = sorted(number for lane in lanes.values() for number in lane.damaged())
    if numbers:
        pair = pairs[numbers[0]]
        file = folder / pair.source.file if pair.source else folder
        raise CheckpointError(
            str(file),
            f"tensor {pair.target.name!r} holds a value that is not finite",
            remedy="the checkpoint is damaged; download it again",
        )
