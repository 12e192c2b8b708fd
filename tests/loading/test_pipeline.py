"""A load as a whole: every value in its place, or one error and nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import CheckpointError, LoadError
from oomproof.loading.pipeline import (
    Limits,
    Target,
    load_checkpoint,
)
from tests.loading.loads import (
    CPU,
    SMALL,
    Places,
    Receiver,
    check_damage_is_refused,
    keep_nothing,
    mixed_values,
    never_stored,
    reader_threads,
    same_bits,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert reader_threads() == []


@pytest.mark.parametrize("limits", [SMALL, Limits(piece_bytes=64, slice_bytes=64), Limits()])
@pytest.mark.parametrize("threads", [1, 5, None])
def test_stored_values_come_back_bit_for_bit(
    limits: Limits, threads: int | None, tmp_path: Path
) -> None:
    values = mixed_values()
    checkpoint = write_checkpoint(tmp_path, values, {"second": torch.randn(77, 3)})
    values |= {"second": torch.empty(77, 3)}
    receiver = Receiver(values)
    report = load_checkpoint(tmp_path, checkpoint, receiver.targets, threads=threads, limits=limits)
    del values["second"]
    receiver.check(values | {"second": receiver.found["second"]})
    assert receiver.found["second"].any()
    assert report.tensors == len(values) + 1
    assert report.bytes == sum(tensor.size_bytes for tensor in checkpoint.tensors)
    assert report.bytes_per_s > 0
    assert (report.pinned_bytes, report.device_staging_bytes) == (0, {})


@pytest.mark.parametrize("limits", [SMALL, Limits()])
def test_values_that_need_no_conversion_are_read_into_their_places(
    limits: Limits, tmp_path: Path
) -> None:
    values = mixed_values()
    checkpoint = write_checkpoint(tmp_path, values)
    places = Places(values)
    load_checkpoint(tmp_path, checkpoint, places.targets, threads=3, limits=limits)
    assert all(same_bits(places.found[name], expected) for name, expected in values.items())


def test_a_place_of_another_dtype_than_the_checkpoint_is_filled_by_its_store(
    tmp_path: Path,
) -> None:
    checkpoint = write_checkpoint(tmp_path, {"a": torch.arange(12.0).reshape(6, 2)})
    place = torch.zeros(6, 2, dtype=torch.bfloat16)

    def store(values: torch.Tensor, row: int) -> None:
        place[row : row + len(values)].copy_(values)

    target = Target(name="a", shape=(6, 2), device=CPU, store=store, place=place)
    load_checkpoint(tmp_path, checkpoint, [target])
    assert place.tolist() == torch.arange(12.0).reshape(6, 2).tolist()


@pytest.mark.parametrize("shape", [(2, 6), (6, 2)])
def test_a_place_that_bytes_cannot_be_read_into_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path, {"a": torch.ones(6, 2)})
    place = torch.zeros(2, 6).t() if shape == (6, 2) else torch.zeros(shape)
    target = Target(name="a", shape=(6, 2), device=CPU, store=never_stored, place=place)
    with pytest.raises(ValueError, match="place of a"):
        load_checkpoint(tmp_path, checkpoint, [target])


def test_slices_of_no_rows_are_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, {"a": torch.ones(6, 2)})
    target = Target(name="a", shape=(6, 2), device=CPU, store=never_stored, rows_multiple=0)
    with pytest.raises(ValueError, match="rows_multiple of a is 0, below 1"):
        load_checkpoint(tmp_path, checkpoint, [target])


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 60), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5
    ),
    multiple=st.integers(1, 9),
    piece=st.integers(8, 2000),
    threads=st.integers(1, 4),
)
def test_slices_come_once_in_order_of_rows_and_begin_where_they_may(
    shapes: list[tuple[int, ...]], multiple: int, piece: int, threads: int
) -> None:
    values = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    receiver = Receiver(values, multiple=multiple)
    with TemporaryDirectory() as folder:
        load_checkpoint(
            Path(folder),
            write_checkpoint(Path(folder), values),
            receiver.targets,
            threads=threads,
            limits=Limits(piece_bytes=piece, slice_bytes=2 * piece),
        )
    receiver.check(values)
    for name, slices in receiver.slices.items():
        covered = [row for first, rows in slices for row in range(first, first + rows)]
        assert covered == list(range(len(values[name])))
        assert all(first % multiple == 0 for first, _ in slices)


def test_progress_grows_to_the_total_on_the_calling_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oomproof.loading.targets._TICK_S", 0.0)
    values = {str(i): torch.randn(100) for i in range(50)}
    told: list[tuple[int, int, str]] = []
    load_checkpoint(
        tmp_path,
        write_checkpoint(tmp_path, values),
        Receiver(values).targets,
        progress=lambda done, total: told.append((done, total, threading.current_thread().name)),
    )
    done = [entry[0] for entry in told]
    assert done == sorted(done)
    assert len(done) == 50
    assert done[-1] == 50 * 400
    assert {entry[1:] for entry in told} == {(50 * 400, threading.current_thread().name)}


def test_progress_is_told_20_times_a_second_at_most(tmp_path: Path) -> None:
    values = {str(i): torch.randn(100) for i in range(40)}
    told: list[float] = []
    targets = [
        Target(name=n, shape=(100,), device=CPU, store=lambda *_: time.sleep(0.005)) for n in values
    ]
    load_checkpoint(
        tmp_path,
        write_checkpoint(tmp_path, values),
        targets,
        progress=lambda *_: told.append(time.monotonic()),
    )
    gaps = [after - before for before, after in pairwise(told)]
    assert len(told) >= 3
    assert min(gaps[:-1]) >= 0.05


Change = Callable[[list[Target]], list[Target]]


def _target(name: str, *shape: int) -> Target:
    return Target(name=name, shape=shape, device=CPU, store=keep_nothing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda targets: [*targets, *(_target(f"x{i}", 3) for i in range(5))],
            "5 missing parameters: x0, x1, x2 and 2 more: the checkpoint does not belong",
        ),
        (lambda targets: targets[:-2], "2 unexpected parameters: a8, a9: the checkpoint"),
        (
            lambda targets: [_target("a0", 4, 3), *targets[1:]],
            r"1 mis-shaped parameters: a0 \[3, 4\] instead of \[4, 3\]: the checkpoint",
        ),
        (
            lambda targets: [*targets, targets[3]],
            "1 parameters have more than one target: a3: this is a bug",
        ),
    ],
)
def test_tensors_and_targets_that_differ_are_refused_before_anything_is_read(
    change: Change, message: str, tmp_path: Path
) -> None:
    names = [f"a{i}" for i in range(10)]
    checkpoint = write_checkpoint(tmp_path, {name: torch.ones(3, 4) for name in names})
    targets = change([_target(name, 3, 4) for name in names])
    with pytest.raises(LoadError, match=message):
        load_checkpoint(tmp_path / "gone", checkpoint, targets)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.int64])
def test_whole_numbers_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, {"a": torch.ones(3), "q": torch.ones(3).to(dtype)})
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"1 parameters are not .*: q \({name}\)"):
        load_checkpoint(tmp_path, checkpoint, [_target("a", 3), _target("q", 3)])


def test_tensors_that_are_ignored_need_no_target_and_are_not_read(tmp_path: Path) -> None:
    values = {
        "layers.0.rotary_emb.inv_freq": torch.full((4,), float("nan")),
        "lm_head.weight": torch.ones(3, 4),
        "a": torch.randn(9),
    }
    checkpoint = write_checkpoint(tmp_path, values)
    receiver = Receiver({"a": values["a"]})
    with pytest.raises(LoadError, match=r"1 unexpected parameters: lm_head\.weight"):
        load_checkpoint(tmp_path, checkpoint, receiver.targets)
    report = load_checkpoint(
        tmp_path,
        checkpoint,
        receiver.targets,
        ignored=lambda name: name.endswith("inv_freq") or name == "lm_head.weight",
    )
    assert (report.tensors, report.bytes) == (1, 36)
    assert same_bits(receiver.found["a"], values["a"])


def test_a_tensor_that_would_be_ignored_is_loaded_where_it_has_a_target(tmp_path: Path) -> None:
    values = {"lm_head.weight": torch.randn(3, 4)}
    receiver = Receiver(values)
    checkpoint = write_checkpoint(tmp_path, values)
    load_checkpoint(tmp_path, checkpoint, receiver.targets, ignored=lambda _: True)
    receiver.check(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [Receiver, Places])
def test_a_value_that_is_not_finite_is_refused_by_tensor_and_file(
    kind: type[Receiver | Places], dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    check_damage_is_refused(tmp_path, kind, dtype, value, CPU)


@pytest.mark.parametrize("kind", [Receiver, Places])
def test_a_file_that_shrank_is_refused_by_the_tensor_it_ends_in(
    kind: type[Receiver | Places], tmp_path: Path
) -> None:
    values = {"a": torch.ones(1000), "b": torch.ones(1000)}
    checkpoint = write_checkpoint(tmp_path, values)
    path = tmp_path / "model-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends inside tensor 'b': the file changed since"):
        load_checkpoint(tmp_path, checkpoint, kind(values).targets, limits=SMALL)


def test_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    values = {"a": torch.ones(1000)}
    checkpoint = write_checkpoint(tmp_path, values)
    (tmp_path / "model-00000.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"00000\.safetensors: cannot be read: No such file or directory"
    ):
        load_checkpoint(tmp_path, checkpoint, Receiver(values).targets)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()])
def test_an_error_of_a_store_goes_through_and_no_thread_stays(
    error: BaseException, tmp_path: Path
) -> None:
    def store(values: torch.Tensor, row: int) -> None:
        if row > 100:
            raise error

    checkpoint = write_checkpoint(tmp_path, {"a": torch.ones(5000, 4)})
    target = Target(name="a", shape=(5000, 4), device=CPU, store=store)
    with pytest.raises(type(error)) as raised:
        load_checkpoint(tmp_path, checkpoint, [target], limits=SMALL, threads=4)
    assert raised.value is error
    assert reader_threads() == []


def test_an_interrupt_while_the_storage_is_slow_ends_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"a": torch.ones(5000)}
    checkpoint = write_checkpoint(tmp_path, values)
    preadv, reads = os.preadv, []

    def slowly(fd: int, views: Sequence[memoryview], offset: int) -> int:
        reads.append(offset)
        if len(reads) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", slowly)
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(tmp_path, checkpoint, Receiver(values).targets, limits=SMALL, threads=2)
    # What two threads had begun, of the many reads that such small buffers take.
    assert 1 <= len(reads) <= 4
    assert reader_threads() == []
