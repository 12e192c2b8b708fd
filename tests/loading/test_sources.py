"""What is read, in which pieces, by which threads, into how much memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import CheckpointError, LoadError
from oomproof.loading import sources
from oomproof.loading.slices import (
    DEFAULT_LIMITS,
    Batch,
    Limits,
    Piece,
    Way,
    cut_pieces,
    cut_rows,
    plan_batches,
)
from oomproof.loading.sources import Buffers, default_threads, reading
from oomproof.loading.targets import Pair, Target, pair_with_checkpoint
from oomproof.memory.native import DEVICE_STAGING_BYTES, TILING_BYTES
from oomproof.models.spec import CheckpointSpec
from tests.loading.loads import keep_nothing, reader_threads, write_checkpoint

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
SHAPES = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    st.tuples(st.integers(1, 400), st.integers(1, 40)),
)


def pairs_for(
    folder: Path, checkpoint: CheckpointSpec, device: torch.device, *, multiple: int = 1
) -> list[Pair]:
    """Pairs whose slices would go to the device."""
    targets = [
        Target(
            name=tensor.name,
            shape=tensor.shape,
            device=device,
            store=keep_nothing,
            rows_multiple=multiple,
        )
        for tensor in checkpoint.tensors
    ]
    return pair_with_checkpoint(folder, checkpoint, targets, lambda _: False)


def pieces_of(batches: Sequence[Batch], limits: Limits) -> list[Piece]:
    return [piece for batch in batches for piece in cut_pieces(batch, limits)]


def plain_buffers(pieces: Sequence[Piece], limit: int) -> Buffers:
    size = max(piece.end_bytes - piece.begin_bytes for piece in pieces)
    return Buffers(size_bytes=size, limit=limit, pinned=False)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert reader_threads() == []


@given(
    shape=SHAPES,
    itemsize=st.sampled_from([1, 2, 4, 8]),
    multiple=st.integers(1, 70),
    limit=st.integers(1, 5000),
)
def test_slices_cover_the_rows_once_in_order_and_begin_where_they_may(
    shape: tuple[int, ...], itemsize: int, multiple: int, limit: int
) -> None:
    found = list(cut_rows(shape, itemsize, rows_multiple=multiple, limit_bytes=limit))
    rows = shape[0] if shape else 1
    if not prod(shape):
        assert found == []
        return
    assert [row for first, count in found for row in range(first, first + count)] == list(
        range(rows)
    )
    assert all(first % multiple == 0 and count > 0 for first, count in found)
    row_bytes = prod(shape[1:]) * itemsize
    assert all(
        count * row_bytes <= limit or count <= multiple  # less than that cannot be cut off
        for _, count in found
    )


@given(rows=st.integers(1, 10_000), limit=st.integers(1, 10_000))
def test_slices_are_of_about_equal_size(rows: int, limit: int) -> None:
    counts = [count for _, count in cut_rows((rows, 3), 2, rows_multiple=1, limit_bytes=limit)]
    assert len(counts) <= -(-rows // max(1, limit // 6))
    assert max(counts[:-1], default=0) == min(counts[:-1], default=0)
    assert counts[-1] <= counts[0]


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.lists(SHAPES, min_size=1, max_size=6), min_size=1, max_size=3),
    piece=st.integers(30, 3000),
    extra=st.integers(0, 5000),
    multiple=st.integers(1, 5),
    threads=st.integers(1, 5),
)
def test_batches_for_a_gpu_arrive_complete_and_in_order_whatever_the_sizes(
    shards: list[list[tuple[int, ...]]], piece: int, extra: int, multiple: int, threads: int
) -> None:
    values = [
        {f"{s}.{i}": torch.randn(shape).bfloat16() for i, shape in enumerate(shapes)}
        for s, shapes in enumerate(shards)
    ]
    limits = Limits(piece_bytes=piece, slice_bytes=piece + extra)
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder, *values)
        pairs = pairs_for(folder, checkpoint, GPU, multiple=multiple)
        batches = plan_batches(pairs, limits)
        pieces = pieces_of(batches, limits)
        if not pieces:
            return
        received = _receive(folder, pieces, plain_buffers(pieces, threads + 1), threads)
    whole = {n: v.reshape(-1).view(torch.uint8) for part in values for n, v in part.items()}
    position = dict.fromkeys(whole, 0)
    for batch, memory in zip(batches, received, strict=True):
        assert len(batch.slices) == 1 or batch.size_bytes <= limits.slice_bytes
        for one in batch.slices:
            tensor = one.pair.target.name
            assert one.begin_bytes == position[tensor]
            assert one.offset_bytes % 256 == 0
            arrived = memory[one.offset_bytes : one.offset_bytes + one.size_bytes]
            assert arrived.equal(whole[tensor][one.begin_bytes :][: one.size_bytes])
            position[tensor] += one.size_bytes
            assert one.is_last == (position[tensor] == len(whole[tensor]))
    assert position == {tensor: len(memory) for tensor, memory in whole.items()}


def _receive(
    folder: Path, pieces: Sequence[Piece], buffers: Buffers, threads: int
) -> list[torch.Tensor]:
    """Every batch as it lies in staging memory: what a lane does, without a GPU."""
    received: list[torch.Tensor] = []
    with reading(folder, pieces, buffers, threads=threads) as arrivals:
        for piece, buffer in arrivals:
            assert buffer is not None
            if piece.is_first:
                received.append(torch.empty(piece.batch.size_bytes, dtype=torch.uint8))
            begin, end = piece.begin_bytes, piece.end_bytes
            received[-1][begin:end].copy_(buffer.memory[: end - begin])
            buffer.memory.fill_(255)
            buffers.give_back(buffer)
    return received


def test_small_neighbours_share_a_batch_and_a_read_and_large_tensors_are_cut(
    tmp_path: Path,
) -> None:
    small = {f"a{i}": torch.ones(100) for i in range(10)}
    checkpoint = write_checkpoint(tmp_path, small | {"b": torch.ones(1000, 10)})
    limits = Limits(piece_bytes=8192, slice_bytes=16384)
    batches = plan_batches(pairs_for(tmp_path, checkpoint, GPU), limits)
    assert [len(batch.slices) for batch in batches] == [10, 1, 1, 1]
    assert [len(cut_pieces(batch, limits)) for batch in batches] == [1, 2, 2, 2]


def test_a_batch_fits_the_staging_memory_where_that_is_less_than_a_slice(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, {str(i): torch.ones(100) for i in range(10)})
    pairs = pairs_for(tmp_path, checkpoint, GPU)
    batches = plan_batches(pairs, Limits(slice_bytes=10_000, staging_bytes=1000))
    assert [len(batch.slices) for batch in batches] == [2] * 5


def test_tensors_for_different_devices_share_no_batch(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, {f"{i}": torch.ones(10) for i in range(4)})
    pairs = pairs_for(tmp_path, checkpoint, GPU)[:2] + pairs_for(tmp_path, checkpoint, CPU)[2:3]
    pairs += pairs_for(tmp_path, checkpoint, torch.device("cuda", 1))[3:]
    batches = plan_batches(pairs, Limits())
    assert [(batch.way, batch.device.index, len(batch.slices)) for batch in batches] == [
        (Way.STAGED, 0, 2),
        (Way.HOST, None, 1),
        (Way.STAGED, 1, 1),
    ]


@pytest.mark.parametrize(("device", "name"), [(GPU, "staging_bytes"), (CPU, "pinned_bytes")])
def test_rows_that_belong_together_and_exceed_what_is_staged_are_refused(
    device: torch.device, name: str, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path, {"experts": torch.ones(4, 1000)})
    pairs = pairs_for(tmp_path, checkpoint, device, multiple=2)
    fits = Limits(slice_bytes=100, piece_bytes=100, **{name: 8000})
    assert len(plan_batches(pairs, fits)) == 2
    with pytest.raises(LoadError, match=r"experts: 2 of its rows .* take 7\.81 KiB, at most"):
        plan_batches(pairs, Limits(slice_bytes=100, piece_bytes=100, **{name: 7999}))


def test_no_more_buffers_are_made_than_allowed_and_no_more_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    plain = sources.Buffer

    def count(size_bytes: int, *, pinned: bool) -> sources.Buffer:
        made.append(size_bytes)
        return plain(size_bytes, pinned=pinned)

    monkeypatch.setattr("oomproof.loading.sources.Buffer", count)
    checkpoint = write_checkpoint(tmp_path, {str(i): torch.ones(250) for i in range(50)})
    limits = Limits(piece_bytes=1000, slice_bytes=1000)
    pieces = pieces_of(plan_batches(pairs_for(tmp_path, checkpoint, GPU), limits), limits)
    _receive(tmp_path, pieces, plain_buffers(pieces, 3), 8)
    assert len(made) <= 3
    made.clear()
    _receive(tmp_path, pieces[:1], plain_buffers(pieces, 3), 8)
    assert made == [1000]


def test_files_are_open_from_their_first_piece_to_their_last(tmp_path: Path) -> None:
    shards = [{f"{s}.{i}": torch.ones(250) for i in range(4)} for s in range(20)]
    checkpoint = write_checkpoint(tmp_path, *shards)
    limits = Limits(piece_bytes=1000, slice_bytes=1000)
    pieces = pieces_of(plan_batches(pairs_for(tmp_path, checkpoint, GPU), limits), limits)
    buffers = plain_buffers(pieces, 1)
    before = open_files()
    with reading(tmp_path, pieces, buffers, threads=2) as arrivals:
        for _, buffer in arrivals:
            assert open_files() <= before + 2
            assert buffer is not None
            buffers.give_back(buffer)
    assert open_files() == before


@pytest.mark.parametrize("limit", [1, 100])
def test_threads_end_and_files_close_when_the_reading_is_left_early(
    limit: int, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path, {str(i): torch.ones(250) for i in range(50)})
    limits = Limits(piece_bytes=1000, slice_bytes=1000)
    pieces = pieces_of(plan_batches(pairs_for(tmp_path, checkpoint, GPU), limits), limits)
    before = open_files()

    def leave() -> None:
        with reading(tmp_path, pieces, plain_buffers(pieces, limit), threads=6) as arrivals:
            next(arrivals)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert reader_threads() == []
    assert open_files() == before


def test_reads_that_bring_less_than_was_asked_for_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {str(i): torch.randn(77, 3) for i in range(9)}
    checkpoint = write_checkpoint(tmp_path, values)
    preadv = os.preadv

    def at_most_100(fd: int, views: Sequence[memoryview], offset: int) -> int:
        return preadv(fd, [views[0][:100]], offset)

    monkeypatch.setattr(os, "preadv", at_most_100)
    _compare(tmp_path, checkpoint, values)


def test_systems_without_positional_reads_and_advice_load_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {str(i): torch.randn(77, 3) for i in range(9)}
    checkpoint = write_checkpoint(tmp_path, values)
    for name in ("preadv", "posix_fadvise", "sched_getaffinity"):
        monkeypatch.delattr(os, name)
    assert default_threads() >= 1
    _compare(tmp_path, checkpoint, values)


def _compare(folder: Path, checkpoint: CheckpointSpec, values: dict[str, torch.Tensor]) -> None:
    limits = Limits(piece_bytes=2000, slice_bytes=8000)
    batches = plan_batches(pairs_for(folder, checkpoint, GPU), limits)
    pieces = pieces_of(batches, limits)
    received = _receive(folder, pieces, plain_buffers(pieces, 4), 3)
    for batch, memory in zip(batches, received, strict=True):
        for one in batch.slices:
            arrived = memory[one.offset_bytes : one.offset_bytes + one.size_bytes]
            expected = values[one.pair.target.name][one.first_row : one.first_row + one.shape[0]]
            assert arrived.view(torch.float32).view(one.shape).equal(expected)


def test_the_tensor_inside_which_a_file_ends_is_named(tmp_path: Path) -> None:
    values = {name: torch.ones(100) for name in "abc"}
    checkpoint = write_checkpoint(tmp_path, values)
    path = tmp_path / "model-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-500])
    pieces = pieces_of(plan_batches(pairs_for(tmp_path, checkpoint, GPU), Limits()), Limits())
    assert len(pieces) == 1
    with pytest.raises(CheckpointError, match=r"00000\.safetensors: ends inside tensor 'b'"):
        _receive(tmp_path, pieces, plain_buffers(pieces, 1), 1)


def test_an_error_of_the_storage_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path, {str(i): torch.ones(250) for i in range(50)})
    limits = Limits(piece_bytes=1000, slice_bytes=1000)
    pieces = pieces_of(plan_batches(pairs_for(tmp_path, checkpoint, GPU), limits), limits)
    preadv, calls = os.preadv, iter(range(100))

    def fail_late(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if next(calls) == 20:
            raise OSError(5, "Input/output error")
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", fail_late)
    with pytest.raises(CheckpointError, match=r"cannot be read: Input/output error"):
        _receive(tmp_path, pieces, plain_buffers(pieces, 3), 4)


def test_slices_on_their_way_leave_room_for_what_tiles_are_made_of() -> None:
    assert DEFAULT_LIMITS.staging_bytes + TILING_BYTES == DEVICE_STAGING_BYTES
