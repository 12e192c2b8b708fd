"""What is told of a rung, and the command that would have fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oomproof.errors import LadderExhaustedError
from oomproof.guarding.ladder import Ladder, command_of, event_of
from oomproof.units import GIB
from tests.guarding.test_rungs import situation


def test_the_command_has_the_limits_that_the_plan_was_made_with() -> None:
    where = situation(cap_bytes=22 * GIB, reserve_bytes=GIB, max_memory={0: 20 * GIB})
    assert command_of(where.target.plan) == (
        f"oomproof run {where.target.plan.model} --format bf16 --kv-format bf16 --context 8192 "
        f"--cap {22 * GIB} --reserve {GIB} --max-memory 0={20 * GIB}"
    )


def test_each_rung_is_taken_once_and_free_ones_again_after_a_rest() -> None:
    ladder, where = Ladder(("kv8", "format")), situation()
    assert [ladder.next(where)[0].name for _ in range(4)] == ["free", "queue", "kv8", "format"]
    with pytest.raises(LadderExhaustedError, match="--fallback kv8,format,context would go on"):
        ladder.next(where)
    ladder.rest()
    assert [ladder.next(where)[0].name for _ in range(2)] == ["free", "queue"]
    with pytest.raises(LadderExhaustedError) as refused:
        ladder.next(where)
    assert refused.value.tried[0] == "free: taken, and it failed again"
    assert ladder.counts == {"free": 2, "queue": 2, "kv8": 1, "format": 1}


def test_what_is_told_has_the_failure_the_rung_its_bytes_its_price_and_the_new_plan() -> None:
    ladder, where = Ladder(("kv8",)), situation()
    rung, proposal = [ladder.next(where) for _ in range(3)][-1]
    event = event_of(rung, proposal, where)
    assert event.plan == proposal.target.plan
    for words in (
        "out of memory, 0.29 GiB missing; going on with kv8: frees",
        "costs precision: keys and values in 8 bits",
        "KV fp8, context 8,192, 4 at once",
    ):
        assert words in event.message


def test_who_holds_the_memory_is_named_where_nothing_else_helps() -> None:
    from tests.guarding.test_engine import HELD

    where = situation(20 * GIB, ram_bytes=2 * GIB)
    where = replace(where, holders=(HELD,))
    ladder = Ladder()
    assert [ladder.next(where)[0].name for _ in range(2)] == ["free", "queue"]
    with pytest.raises(LadderExhaustedError, match="pid 4321"):
        ladder.next(where)
