"""Made-up weights: repeatable, and the same however they are cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oomproof.errors import LoadError
from oomproof.loading.pipeline import Limits, load_random
from oomproof.loading.random_weights import in_turn
from tests.loading.loads import RANDOM_SPEC, Places, Receiver, random_weights, same_bits, tiny_spec


def test_random_weights_are_normal_and_norms_are_one() -> None:
    found, report = random_weights()
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
    whole, _ = random_weights()
    limits = Limits(piece_bytes=slice_bytes, slice_bytes=slice_bytes)
    cut, _ = random_weights(kind=kind, limits=limits)
    assert all(same_bits(whole[name], cut[name]) for name in whole)


def test_random_weights_are_the_same_for_a_seed_and_differ_for_another() -> None:
    (first, _), (again, _), (other, _) = random_weights(1), random_weights(1), random_weights(2)
    assert all(same_bits(first[name], again[name]) for name in first)
    assert not same_bits(first["q.weight"], other["q.weight"])
    assert not same_bits(first["embed.weight"][:97], first["q.weight"])


def test_random_weights_for_other_tensors_than_the_models_are_refused() -> None:
    with pytest.raises(LoadError, match="4 unexpected parameters: embed"):
        load_random(RANDOM_SPEC, [])


def test_a_load_of_nothing_is_told_of_too() -> None:
    told: list[tuple[int, int]] = []
    report = load_random(tiny_spec({}), [], progress=lambda *done: told.append(done))
    assert (report.bytes, report.tensors, told) == (0, 0, [(0, 0)])


def test_devices_take_turns_and_each_keeps_its_order() -> None:
    devices = [torch.device("cuda", index) for index in (0, 0, 0, 1, 2, 2)]
    work: list[Any] = [
        (SimpleNamespace(pair=SimpleNamespace(device=device)), number)
        for number, device in enumerate(devices)
    ]
    assert list(in_turn(work)) == [work[number] for number in (0, 3, 4, 1, 5, 2)]
    assert list(in_turn([])) == []
