"""Random weights stand in for a checkpoint's: names, shapes, dtypes, and nothing else."""

from __future__ import annotations

import torch

from oomproof.loading.random_tensors import STANDARD_DEVIATION, RandomTensors
from oomproof.models.resolve import resolve
from oomproof.models.spec import Role

CPU = torch.device("cpu")
SPEC = resolve("tiny")


def test_every_tensor_of_the_model_is_there_with_its_shape_and_dtype() -> None:
    with RandomTensors(SPEC, lambda _: CPU).open() as tensors:
        assert list(tensors) == [tensor.name for tensor in SPEC.tensors]
        for tensor in SPEC.tensors:
            lazy = tensors[tensor.name]
            assert tuple(lazy.get_shape()) == tensor.shape
            assert lazy.get_dtype() == "BF16"
            made = lazy[...]
            assert made.shape == torch.Size(tensor.shape)
            assert made.dtype == torch.bfloat16
            assert bool(torch.isfinite(made).all())


def test_norms_are_one_and_weights_are_spread() -> None:
    with RandomTensors(SPEC, lambda _: CPU).open() as tensors:
        for tensor in SPEC.tensors:
            values = tensors[tensor.name][...].float()
            if tensor.role is Role.NORM:
                assert bool((values == 1).all())
            else:
                assert 0.9 < float(values.std()) / STANDARD_DEVIATION < 1.1


def test_a_seed_makes_the_weights_repeatable() -> None:
    name = SPEC.tensors[0].name

    def first(seed: int) -> torch.Tensor:
        with RandomTensors(SPEC, lambda _: CPU, seed=seed).open() as tensors:
            return tensors[name][...]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_progress_ends_at_the_bytes_of_all_weights() -> None:
    told: list[tuple[int, int]] = []
    with RandomTensors(SPEC, lambda _: CPU, lambda *of: told.append(of)).open() as tensors:
        for lazy in tensors.values():
            lazy[...]
    total = SPEC.num_parameters * 2
    assert told[-1] == (total, total)
    assert told == sorted(told)
