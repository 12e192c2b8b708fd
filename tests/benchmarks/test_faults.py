"""The rows of true faults, with memory made up: each is right, and none can hang."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.fault_rungs import alike_until, rung_rows, steal_rows
from benchmarks.fault_world import MadeUpWorld, World
from benchmarks.faults import GROUPS, LIMITS_S, run_group

from benchmarks import fault_rungs, fault_world, faults
from tests.worker.workers import children


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    monkeypatch.setattr(fault_world, "SLOWNESS", 50)
    monkeypatch.setattr(fault_rungs, "_BACK_AFTER_S", 0.8)


Rows = Callable[[str, World], None]


@pytest.fixture
def rows(capsys: pytest.CaptureFixture[str]) -> Callable[[Rows], dict[str, dict[str, Any]]]:
    def run(group: Rows) -> dict[str, dict[str, Any]]:
        group("tiny", MadeUpWorld())
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return {row["row"]: row for row in found}

    return run


def test_every_rung_is_reached_and_takes_the_answers_on(rows: Any) -> None:
    found = rows(rung_rows)
    assert list(found) == [f"rung-{name}" for name in fault_rungs.RUNGS[:6]]
    assert all(row["ok"] for row in found.values()), found
    assert found["rung-kv8"]["plan"]["kv_format"] == "fp8"
    assert found["rung-context"]["same_tokens"]


def test_what_is_stolen_is_waited_for_or_refused_and_nothing_needs_more_after_loading(
    rows: Any,
) -> None:
    found = rows(steal_rows)
    assert all(row["ok"] for row in found.values()), found
    assert set(found["steal-plan-load-returns"]["rungs"]) == {"wait"}
    assert "the plan needs" in found["steal-plan-load-stays"]["refused"]
    assert found["steal-load-generate"]["rungs"] == []


@pytest.mark.parametrize("group", ["assert", "requests", "cycles"])
def test_the_other_groups_are_right_with_the_bundled_model(rows: Any, group: str) -> None:
    [row] = rows(GROUPS[group]).values()
    assert row["ok"], row


def test_a_group_that_hangs_is_killed_with_all_that_it_started(
    capsys: pytest.CaptureFixture[str],
) -> None:
    began, before = time.monotonic(), len(children())
    assert not run_group("cycles", "tiny", 0.4)
    assert time.monotonic() - began < 20
    [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["row"] == "cycles-all"
    assert row["error"] == "killed after 0.4 s"
    assert len(children()) == before


def test_a_row_that_raises_says_so_and_the_next_one_is_tried(
    rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(rung: str, _target: Any, _world: World) -> None:
        raise ValueError(rung)

    monkeypatch.setattr(fault_rungs, "_rung_row", fail)
    found = rows(rung_rows)
    assert found["rung-kv8"]["error"] == "ValueError: kv8"
    assert not any(row["ok"] for row in found.values())


def test_groups_have_limits_that_end_within_ten_minutes() -> None:
    assert set(LIMITS_S) == set(faults.GROUPS)
    assert sum(LIMITS_S.values()) <= 600


def test_answers_are_compared_up_to_where_they_part() -> None:
    assert alike_until([1, 2, 3], [1, 2, 4]) == 2
    assert alike_until([1, 2], [1, 2]) == 2
