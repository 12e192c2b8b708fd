"""What is measured on the CPU, under the names of the plan's terms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from oomproof.compat.measure import MemoryMeter
from oomproof.engine.model import Model
from oomproof.hardware.probe import probe
from oomproof.session import load, plan
from oomproof.units import MIB


@pytest.fixture(scope="module")
def tiny() -> Iterator[Model]:
    with load("tiny", engine="transformers", format="bf16", context=512, concurrency=2) as model:
        yield model


def test_every_device_in_use_is_measured(tiny: Model) -> None:
    assert list(tiny.measured_terms()) == [device.index for device in tiny.plan.devices_in_use]


def test_weights_and_cache_are_counted_to_the_byte(tiny: Model) -> None:
    terms = tiny.measured_terms()[0]
    assert terms.weights == 2 * tiny.plan.num_parameters
    layers, heads, head_dim = 5, 2, 32
    assert terms.kv_cache == 2 * layers * heads * head_dim * 512 * 2 * tiny.plan.concurrency


def test_a_cpu_has_neither_a_context_nor_graphs_nor_a_margin(tiny: Model) -> None:
    terms = tiny.measured_terms()[0]
    assert (terms.cuda_context, terms.graphs, terms.comm, terms.margin) == (0, 0, 0, 0)


def test_the_workspace_only_grows_and_is_at_least_what_was_held_for_a_moment(
    tiny: Model,
) -> None:
    tiny.generate("hello", max_new_tokens=4, seed=0)
    before = tiny.measured_terms()[0].workspace
    large = torch.ones(256 * MIB, dtype=torch.uint8)
    during = tiny.measured_terms()[0].workspace
    del large
    assert during >= before + 100 * MIB
    assert tiny.measured_terms()[0].workspace >= during


def test_weights_that_are_repacked_at_the_first_forward_are_counted_as_they_are_then() -> None:
    with load("tiny", engine="transformers", format="nf4-dq", context=256) as model:
        loaded = model.measured_terms()[0].weights
        model.generate("hello", max_new_tokens=2, seed=0)
        assert model.measured_terms()[0].weights >= loaded
        assert model.measured_terms()[0].weights <= model.plan.devices[0].terms.weights


def test_a_meter_that_has_seen_nothing_measures_nothing() -> None:
    made = plan("tiny", engine="transformers", format="bf16")
    terms = MemoryMeter(made, probe()).terms()[0]
    assert (terms.weights, terms.kv_cache, terms.staging) == (0, 0, 0)
