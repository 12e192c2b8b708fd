"""Sequences hold every sample once, none is too long, and a seed decides all of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.tuning import packing
from oomproof.tuning.packing import evaluation_steps, pack, schedule, single_rows, split

lengths_of = st.lists(st.integers(2, 64), min_size=1, max_size=200)


@settings(deadline=None, max_examples=50)
@given(lengths_of, st.integers(0, 5))
def test_every_sample_is_in_one_sequence_that_has_room(found: list[int], seed: int) -> None:
    lengths = np.array(found, np.int64)
    rows = pack(np.arange(len(lengths)), lengths, 64, seed)
    assert sorted(rows.samples) == list(range(len(lengths)))
    for number in range(len(rows)):
        assert lengths[rows.row(number)].sum() == rows.lengths[number] <= 64
    # Best-fit decreasing is never worse than 11/9 of the best there is, and a bit.
    least = -(-int(lengths.sum()) // 64)
    assert len(rows) <= 11 / 9 * max(least, sum(n > 32 for n in found)) + 4 + len(found) / 3


def test_packing_is_the_same_for_a_seed_and_another_for_another() -> None:
    lengths = np.random.default_rng(0).integers(2, 64, 500)
    first, second, other = (pack(np.arange(500), lengths, 64, seed) for seed in (1, 1, 2))
    assert (first.samples == second.samples).all()
    assert not (first.samples == other.samples).all()


def test_samples_are_packed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "GROUP", 7)
    lengths = np.full(20, 16, np.int64)
    rows = pack(np.arange(20), lengths, 32, 0)
    assert sorted(rows.samples) == list(range(20))
    assert len(rows) == 4 + 4 + 3


def test_full_sequences_are_left_alone() -> None:
    rows = pack(np.arange(3), np.full(3, 32, np.int64), 32, 0)
    assert len(rows) == 3
    assert len(single_rows(np.arange(3), np.full(3, 32, np.int64))) == 3


@pytest.mark.parametrize(
    ("count", "share", "held_out"), [(1, 0.5, 0), (2, 0.01, 1), (100, 0.05, 5), (100, 0.0, 0)]
)
def test_a_share_of_the_samples_is_held_out(count: int, share: float, held_out: int) -> None:
    parts = split(np.full(count, 10, np.int64), share, 0)
    assert len(parts.validation) == held_out
    assert sorted([*parts.training, *parts.validation]) == list(range(count))


def test_what_is_held_out_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_VALIDATION_TOKENS", 25)
    assert len(split(np.full(100, 10, np.int64), 0.5, 0).validation) == 2


def test_every_epoch_meets_every_sequence_in_an_order_of_its_own() -> None:
    plan = schedule(10, batch_size=4, micro_batch=3, epochs=2.0, max_steps=None, seed=0)
    assert (plan.steps, plan.micro_batches_per_step, len(plan)) == (5, 2, 10)
    batches = [plan.micro_batch_at(number) for number in range(len(plan))]
    assert [len(one) for one in batches] == [3, 1] * 5
    met = [row for one in batches for row in one]
    assert sorted(met[:10]) == sorted(met[10:]) == list(range(10))
    assert met[:10] != met[10:]


def test_a_micro_batch_does_not_depend_on_what_was_asked_before() -> None:
    plan = schedule(7, batch_size=5, micro_batch=2, epochs=9.0, max_steps=None, seed=3)
    forwards = [plan.micro_batch_at(number) for number in range(len(plan))]
    again = schedule(7, batch_size=5, micro_batch=2, epochs=9.0, max_steps=None, seed=3)
    backwards = [again.micro_batch_at(number) for number in reversed(range(len(plan)))]
    assert forwards == backwards[::-1]


def test_the_order_of_steps_does_not_depend_on_how_many_are_computed_at_once() -> None:
    def rows(micro: int) -> list[int]:
        plan = schedule(7, batch_size=4, micro_batch=micro, epochs=3.0, max_steps=None, seed=3)
        return [row for n in range(len(plan)) for row in plan.micro_batch_at(n)]

    assert rows(1) == rows(3) == rows(4)


def test_evaluations_are_even_and_the_last_is_at_the_end() -> None:
    assert evaluation_steps(100, 4) == [25, 50, 75, 100]
    assert evaluation_steps(3, 10) == [1, 2, 3]
    assert evaluation_steps(1, 1) == [1]
