"""The loader's way to a GPU: page-locked buffers, staging, two streams."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oomproof.loading.pipeline import Limits, Target, load_checkpoint
from oomproof.units import MIB
from tests.loading.loads import (
    CPU,
    SMALL,
    Places,
    Receiver,
    check_damage_is_refused,
    mixed_values,
    never_stored,
    random_weights,
    same_bits,
    write_checkpoint,
)

pytestmark = pytest.mark.gpu


def _gpus(count: int = 1) -> list[torch.device]:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    return [torch.device("cuda", index) for index in range(count)]


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


def test_pinned_host_memory_is_filled_directly_and_through_a_gpu(tmp_path: Path) -> None:
    (gpu,) = _gpus()
    shape = (700, 31)
    values = {name: torch.randn(shape).bfloat16() for name in ("direct", "through")}
    found = {name: torch.zeros_like(value, pin_memory=True) for name, value in values.items()}

    def store(values: torch.Tensor, row: int) -> None:
        assert values.device == gpu
        found["through"][row : row + len(values)].copy_(values, non_blocking=True)

    targets = [
        Target(
            name="direct", shape=(700, 31), device=CPU, store=never_stored, place=found["direct"]
        ),
        Target(name="through", shape=(700, 31), device=gpu, store=store),
    ]
    load_checkpoint(tmp_path, write_checkpoint(tmp_path, values), targets, limits=SMALL)
    assert all(same_bits(found[name], expected) for name, expected in values.items())


@pytest.mark.parametrize("kind", [Receiver, Places])
def test_memory_on_the_way_is_bounded_and_given_back(
    kind: type[Receiver | Places], tmp_path: Path
) -> None:
    (gpu,) = _gpus()
    values = {str(i): torch.randn(8, 1 << 20) for i in range(12)}
    checkpoint = write_checkpoint(tmp_path, values)
    receiver = kind(values, device=gpu)
    gc.collect()  # What earlier tests left would be given back on the way.
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
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [Receiver, Places])
def test_a_value_that_is_not_finite_is_found_on_the_gpu(
    kind: type[Receiver | Places], dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    check_damage_is_refused(tmp_path, kind, dtype, value, *_gpus())


@pytest.mark.parametrize("kind", [Receiver, Places])
def test_random_weights_on_a_gpu_do_not_depend_on_how_they_are_cut(
    kind: type[Receiver | Places], monkeypatch: pytest.MonkeyPatch
) -> None:
    (gpu,) = _gpus()
    monkeypatch.setattr("oomproof.loading.random_weights._BLOCK", 1000)
    whole, report = random_weights(device=gpu)
    assert 0 < report.device_staging_bytes[gpu] < MIB
    for slice_bytes in (100, 5000):
        limits = Limits(piece_bytes=slice_bytes, slice_bytes=slice_bytes)
        cut, _ = random_weights(kind=kind, device=gpu, limits=limits)
        assert all(same_bits(whole[name], cut[name]) for name in whole)
    assert whole["norm.weight"].eq(1).all()
    assert float(whole["embed.weight"].float().std()) == pytest.approx(0.02, rel=0.1)
