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
from oomproof.formats import DType
from oomproof.loading.pipeline import (
    Limits,
    LoadReport,
    Target,
    load_checkpoint,
    load_random,
)
from oomproof.loading.slices import DEFAULT_LIMITS
from oomproof.models.spec import AttentionSpec, ModelSource, ModelSpec, Role, TensorSpec
from oomproof.units import MIB
from tests.loading.test_sources import keep_nothing, reader_threads, write_checkpoint

CPU = torch.device("cpu")
SMALL = Limits(piece_bytes=1000, slice_bytes=3000)


class Receiver:
    """Targets that put slices together again, and note in which order they came."""

    def __init__(
        self, values: dict[str, torch.Tensor], *, device: torch.device = CPU, multiple: int = 1
    ) -> None:
        self.slices: dict[str, list[tuple[int, int]]] = {name: [] for name in values}
        self.finished: list[str] = []
        self.found = {n: torch.zeros_like(v, device=device) for n, v in values.items()}
        self.targets = [self._target(name, device, multiple) for name in values]

    def _target(self, name: str, device: torch.device, multiple: int) -> Target:
        final = self.found[name]

        def store(values: torch.Tensor, row: int) -> None:
            assert name not in self.finished
            assert (values.dtype, values.device) == (final.dtype, final.device)
            if final.dim():
                assert values.shape[1:] == final.shape[1:]
                final[row : row + len(values)].copy_(values)
                self.slices[name].append((row, len(values)))
            else:
                final.copy_(values)
                self.slices[name].append((row, 1))

        return Target(
            name=name,
            shape=tuple(final.shape),
            device=device,
            store=store,
            finish=lambda: self.finished.append(name),
            rows_multiple=multiple,
        )

    def check(self, values: dict[str, torch.Tensor]) -> None:
        for name, expected in values.items():
            assert same_bits(self.found[name], expected)
        assert sorted(self.finished) == sorted(values)


class Places:
    """Targets whose final tensors need no conversion."""

    def __init__(self, values: dict[str, torch.Tensor], *, device: torch.device = CPU) -> None:
        self.found = {n: torch.zeros_like(v, device=device) for n, v in values.items()}
        self.targets = [
            Target(
                name=name,
                shape=tuple(place.shape),
                device=device,
                store=_never,
                place=torch.nn.Parameter(place),
            )
            for name, place in self.found.items()
        ]


def _never(values: torch.Tensor, row: int) -> None:
    pytest.fail("a tensor with a place of its dtype was stored")


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [tensor.cpu().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and bits[0].equal(bits[1])


def mixed_values() -> dict[str, torch.Tensor]:
    """Every type that a checkpoint of weights may have, of odd sizes."""
    return {
        "b16": torch.randn(331, 7).bfloat16(),
        "f8": torch.randn(13).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "f16": torch.randn(9, 5, 3).half(),
        "empty": torch.empty(0, 4),
        "f64": torch.randn(21, 11, dtype=torch.float64),
        "f8.e5": torch.randn(131, 3).to(torch.float8_e5m2),
        "f32": torch.randn(1000),
    }


def tiny_spec(shapes: dict[str, tuple[tuple[int, ...], Role]]) -> ModelSpec:
    return ModelSpec(
        id="tiny",
        source=ModelSource(kind="catalog", path="tiny"),
        architecture="LlamaForCausalLM",
        family="llama",
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=8,
        max_position_embeddings=8,
        tie_word_embeddings=False,
        dtype=DType.BFLOAT16,
        attention=(AttentionSpec(num_key_value_heads=1, key_head_dim=8, value_head_dim=8),),
        tensors=tuple(
            TensorSpec(name=name, shape=shape, role=role) for name, (shape, role) in shapes.items()
        ),
    )


RANDOM_SPEC = tiny_spec(
    {
        "embed.weight": ((501, 33), Role.EMBEDDING),
        "norm.weight": ((33,), Role.NORM),
        "q.weight": ((97, 33), Role.LINEAR),
        "q.bias": ((97,), Role.BIAS),
    }
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
    target = Target(name="a", shape=(6, 2), device=CPU, store=_never, place=place)
    with pytest.raises(ValueError, match="place of a"):
        load_checkpoint(tmp_path, checkpoint, [target])


def test_slices_of_no_rows_are_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, {"a": torch.ones(6, 2)})
    target = Target(name="a", shape=(6, 2), device=CPU, store=_never, rows_multiple=0)
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


def test_a_load_of_nothing_is_told_of_too() -> None:
    told: list[tuple[int, int]] = []
    report = load_random(tiny_spec({}), [], progress=lambda *done: told.append(done))
    assert (report.bytes, report.tensors, told) == (0, 0, [(0, 0)])


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
    _refuses_damage(tmp_path, kind, dtype, value, CPU)


def _refuses_damage(
    folder: Path,
    kind: type[Receiver | Places],
    dtype: torch.dtype,
    value: float,
    device: torch.device,
) -> None:
    largest = torch.finfo(dtype).max
    good = {"good": torch.tensor([largest, -largest], dtype=dtype)}
    bad = {"damaged": torch.randn(3001).to(dtype), "later": torch.full((3,), value, dtype=dtype)}
    bad["damaged"][3000] = value
    checkpoint = write_checkpoint(folder, good, bad)
    targets = kind(good | bad, device=device).targets
    with pytest.raises(
        CheckpointError, match=r"'damaged' holds a value that is not finite: the checkpoint is dam"
    ) as refused:
        load_checkpoint(folder, checkpoint, targets, limits=SMALL)
    assert refused.value.file == str(folder / "model-00001.safetensors")


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
    preadv = os.preadv

    def slowly(fd: int, views: Sequence[memoryview], offset: int) -> int:
        time.sleep(0.3)
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", slowly)
    begin = time.monotonic()
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(tmp_path, checkpoint, Receiver(values).targets, limits=SMALL, threads=2)
    assert time.monotonic() - begin < 2
    assert reader_threads() == []


def _random(
    seed: int = 0,
    *,
    kind: type[Receiver | Places] = Receiver,
    device: torch.device = CPU,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    empty = {t.name: torch.empty(t.shape, dtype=torch.bfloat16) for t in RANDOM_SPEC.tensors}
    receiver = kind(empty, device=device)
    report = load_random(RANDOM_SPEC, receiver.targets, seed=seed, limits=limits)
    return receiver.found, report


def test_random_weights_are_normal_and_norms_are_one() -> None:
    found, report = _random()
    assert (report.tensors, report.bytes) == (4, 2 * RANDOM_SPEC.num_parameters)
    assert found["norm.weight"].eq(1).all()
    for name in ("embed.weight", "q.weight", "q.bias"):
        assert float(found[name].float().std()) == pytest.approx(0.02, rel=0.15)
        assert abs(float(found[name].float().mean())) < 0.01


@pytest.mark.parametrize("block", [10, 1000, 4096])
@pytest.mark.parametrize("slice_bytes", [100, 700, 5000, 10**6])
@pytest.mark.parametrize("kind", [Receiver, Places])
def test_random_weights_do_not_depend_on_how_they_are_cut(
    kind: type[Receiver | Places],
    slice_bytes: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("oomproof.loading.random_weights._BLOCK", block)
    whole, _ = _random()
    limits = Limits(piece_bytes=slice_bytes, slice_bytes=slice_bytes)
    cut, _ = _random(kind=kind, limits=limits)
    assert all(same_bits(whole[name], cut[name]) for name in whole)


def test_random_weights_are_the_same_for_a_seed_and_differ_for_another() -> None:
    (first, _), (again, _), (other, _) = _random(1), _random(1), _random(2)
    assert all(same_bits(first[name], again[name]) for name in first)
    assert not same_bits(first["q.weight"], other["q.weight"])
    assert not same_bits(first["embed.weight"][:97], first["q.weight"])


def test_random_weights_for_other_tensors_than_the_models_are_refused() -> None:
    with pytest.raises(LoadError, match="4 unexpected parameters: embed"):
        load_random(RANDOM_SPEC, [])


def _gpus(count: int = 1) -> list[torch.device]:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    return [torch.device("cuda", index) for index in range(count)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Receiver, Places])
@pytest.mark.parametrize("limits", [SMALL, Limits(piece_bytes=64, slice_bytes=64), Limits()])
@pytest.mark.parametrize("threads", [1, 16])
def test_values_reach_a_gpu_bit_for_bit(
    kind: type[Receiver | Places], limits: Limits, threads: int, tmp_path: Path
) -> None:
    (gpu,) = _gpus()
    shards = [mixed_values(), {"second": torch.randn(777, 31)}]
    values = shards[0] | shards[1]
    checkpoint = write_checkpoint(tmp_path, *shards)
    receiver = kind(values, device=gpu)
    told: list[tuple[int, int]] = []
    report = load_checkpoint(
        tmp_path,
        checkpoint,
        receiver.targets,
        progress=lambda *done: told.append(done),
        threads=threads,
        limits=limits,
    )
    assert all(same_bits(receiver.found[name], expected) for name, expected in values.items())
    assert told[-1] == (report.bytes, report.bytes)
    if isinstance(receiver, Receiver):
        receiver.check(values)


@pytest.mark.gpu
def test_a_slow_conversion_is_not_overtaken_by_the_next_slices(tmp_path: Path) -> None:
    (gpu,) = _gpus()
    values = {str(i): torch.randn(1000, 500) for i in range(12)}
    found = {name: torch.zeros_like(value, device=gpu) for name, value in values.items()}

    def store_to(final: torch.Tensor) -> Callable[[torch.Tensor, int], None]:
        def store(values: torch.Tensor, row: int) -> None:
            torch.cuda._sleep(2_000_000)
            final[row : row + len(values)].copy_(values)

        return store

    targets = [
        Target(name=name, shape=(1000, 500), device=gpu, store=store_to(final))
        for name, final in found.items()
    ]
    limits = Limits(
        piece_bytes=100_000, slice_bytes=250_000, staging_bytes=500_000, pinned_bytes=500_000
    )
    load_checkpoint(tmp_path, write_checkpoint(tmp_path, values), targets, limits=limits)
    assert all(same_bits(found[name], expected) for name, expected in values.items())


@pytest.mark.gpu
def test_tensors_of_several_devices_are_read_in_one_pass(tmp_path: Path) -> None:
    devices = [*_gpus(min(2, max(1, torch.cuda.device_count()))), CPU]
    values = {f"{i:02}": torch.randn(100 + i, 33) for i in range(30)}
    checkpoint = write_checkpoint(tmp_path, values)
    parts = [
        kind({n: v for n, v in values.items() if int(n) % 6 == index}, device=device)
        for index, (kind, device) in enumerate(
            (kind, devices[i % len(devices)]) for kind in (Receiver, Places) for i in range(3)
        )
    ]
    targets = [target for part in parts for target in part.targets]
    load_checkpoint(tmp_path, checkpoint, targets, limits=SMALL)
    found = {name: tensor for part in parts for name, tensor in part.found.items()}
    assert all(same_bits(found[name], expected) for name, expected in values.items())


@pytest.mark.gpu
def test_pinned_host_memory_is_filled_directly_and_through_a_gpu(tmp_path: Path) -> None:
    (gpu,) = _gpus()
    values = {name: torch.randn(700, 31).bfloat16() for name in ("direct", "through")}
    found = {name: torch.zeros_like(value, pin_memory=True) for name, value in values.items()}

    def store(values: torch.Tensor, row: int) -> None:
        assert values.device == gpu
        found["through"][row : row + len(values)].copy_(values, non_blocking=True)

    targets = [
        Target(name="direct", shape=(700, 31), device=CPU, store=_never, place=found["direct"]),
        Target(name="through", shape=(700, 31), device=gpu, store=store),
    ]
    load_checkpoint(tmp_path, write_checkpoint(tmp_path, values), targets, limits=SMALL)
    assert all(same_bits(found[name], expected) for name, expected in values.items())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Receiver, Places])
def test_memory_on_the_way_is_bounded_and_given_back(
    kind: type[Receiver | Places], tmp_path: Path
) -> None:
    (gpu,) = _gpus()
    values = {str(i): torch.randn(8, 1 << 20) for i in range(12)}
    checkpoint = write_checkpoint(tmp_path, values)
    receiver = kind(values, device=gpu)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    limits = Limits(pinned_bytes=64 * MIB, staging_bytes=80 * MIB)
    report = load_checkpoint(tmp_path, checkpoint, receiver.targets, limits=limits)
    staging = report.device_staging_bytes[gpu]
    assert staging == (64 * MIB if kind is Receiver else 0)
    assert 0 < report.pinned_bytes <= 64 * MIB
    assert torch.cuda.max_memory_allocated() - before <= staging + 4096
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.memory_reserved() <= reserved
    assert all(same_bits(receiver.found[name], expected) for name, expected in values.items())


@pytest.mark.gpu
def test_staging_is_given_back_after_an_error_that_is_still_held(tmp_path: Path) -> None:
    (gpu,) = _gpus()

    def store(values: torch.Tensor, row: int) -> None:
        if row > 100:
            raise torch.OutOfMemoryError("full")

    checkpoint = write_checkpoint(tmp_path, {"a": torch.ones(5000, 4)})
    target = Target(name="a", shape=(5000, 4), device=gpu, store=store)
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError) as held:
        load_checkpoint(tmp_path, checkpoint, [target], limits=SMALL, threads=4)
    assert held.value is not None
    assert torch.cuda.memory_allocated() - before <= 512  # the flags


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [Receiver, Places])
def test_a_value_that_is_not_finite_is_found_on_the_gpu(
    kind: type[Receiver | Places], dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    _refuses_damage(tmp_path, kind, dtype, value, *_gpus())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Receiver, Places])
def test_random_weights_on_a_gpu_do_not_depend_on_how_they_are_cut(
    kind: type[Receiver | Places], monkeypatch: pytest.MonkeyPatch
) -> None:
    (gpu,) = _gpus()
    monkeypatch.setattr("oomproof.loading.random_weights._BLOCK", 1000)
    whole, report = _random(device=gpu)
    assert 0 < report.device_staging_bytes[gpu] < MIB
    for slice_bytes in (100, 5000):
        limits = Limits(piece_bytes=slice_bytes, slice_bytes=slice_bytes)
        cut, _ = _random(kind=kind, device=gpu, limits=limits)
        assert all(same_bits(whole[name], cut[name]) for name in whole)
    assert whole["norm.weight"].eq(1).all()
    assert float(whole["embed.weight"].float().std()) == pytest.approx(0.02, rel=0.1)
