"""Levels of formats, and how far weights lie from them."""

from __future__ import annotations

import pytest
import torch

from oomproof.evaluation.levels import BINS, HistogramCounter, levels_of
from oomproof.quantization.handlers import handler
from oomproof.quantization.tables import table_4bit


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_a_tables_levels_are_its_entries(name: str) -> None:
    table = sorted({round(value + 0.0, 4) for value in table_4bit(name[:3]).tolist()})
    assert levels_of(name) == pytest.approx(table, abs=1e-4)


def test_int4_has_fifteen_levels_at_equal_distances() -> None:
    assert levels_of("int4") == pytest.approx([n / 7 for n in range(-7, 8)], abs=1e-3)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_formats_with_many_levels_have_none_to_show(name: str) -> None:
    assert levels_of(name) == ()


def test_the_histogram_counts_weights_over_the_largest_of_their_block() -> None:
    weight = torch.full((2, 64), 0.25)
    weight[0, 0], weight[1, 5] = -1.0, 0.5
    counter = HistogramCounter(torch.device("cpu"))
    counter.add(weight)
    counts = counter.result(()).counts
    assert sum(counts) == 128
    assert counts[0] == 1
    assert counts[-1] == 1
    assert counts[BINS // 2 + BINS // 8] == 63
    assert counts[BINS // 2 + BINS // 4] == 63


def test_a_block_of_zeros_lies_at_zero() -> None:
    counter = HistogramCounter(torch.device("cpu"))
    counter.add(torch.zeros(1, 64))
    assert counter.result(()).counts[BINS // 2] == 64


def test_the_error_by_the_histogram_is_that_of_quantizing() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    counter = HistogramCounter(torch.device("cpu"))
    counter.add(weight)
    found = counter.result(("nf4", "fp4", "int4", "int8"))
    assert [one.format for one in found.formats] == ["nf4", "fp4", "int4"]
    blocks = weight.view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    for one in found.formats:
        codec = handler(one.format)
        there = codec.decode(codec.encode(weight), (256, 512), torch.float32)
        distance = ((there - weight).view(-1, 64) / largest).square().mean().sqrt()
        assert one.error == pytest.approx(float(distance), rel=0.03)
        assert sum(one.squared_errors) == pytest.approx(one.error**2)
        assert (one.inner_error**2 + one.outer_error**2) / 2 == pytest.approx(one.error**2)
    errors = {one.format: one.inner_error for one in found.formats}
    assert errors["nf4"] < min(errors["fp4"], errors["int4"])
