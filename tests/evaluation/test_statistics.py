"""Intervals: as wide as theory says, wider where neighbours resemble each other."""

from __future__ import annotations

import math

import pytest
import torch

from oomproof.evaluation.statistics import Bootstrap, position_bins


def test_of_independent_figures_it_is_the_normal_interval() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    found = Bootstrap(len(values)).mean(values)
    assert found.value == pytest.approx(float(values.double().mean()))
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(4096), rel=0.2)


def test_of_figures_that_come_in_runs_it_is_wider() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    runs = values[:256].repeat_interleave(16)
    alone, together = (Bootstrap(4096).mean(one) for one in (values, runs))
    assert together.high - together.low > 2.5 * (alone.high - alone.low)


def test_it_is_repeatable_and_of_one_figure_has_no_width() -> None:
    values = torch.arange(100.0)
    assert Bootstrap(100, seed=3).mean(values) == Bootstrap(100, seed=3).mean(values)
    assert Bootstrap(100, seed=3).mean(values) != Bootstrap(100, seed=4).mean(values)
    one = Bootstrap(1).mean(torch.tensor([2.5]))
    assert (one.low, one.value, one.high) == (2.5, 2.5, 2.5)


def test_perplexity_is_the_exponential_of_all_three() -> None:
    found = Bootstrap(100).mean(torch.linspace(0, 1, 100)).exponential()
    assert found.value == pytest.approx(math.exp(0.5))
    assert found.low < found.value < found.high


@pytest.mark.parametrize("scored", [1, 2, 15, 16, 17, 100, 2048])
def test_bins_cover_every_position_once(scored: int) -> None:
    bins = position_bins(scored)
    assert [n for first, end in bins for n in range(first, end)] == list(range(scored))


def test_a_perplexity_beyond_floats_is_infinite_and_null_in_json() -> None:
    found = Bootstrap(1).mean(torch.tensor([1e4])).exponential()
    assert found.value == math.inf
    assert set(found.as_dict().values()) == {None}
