"""The tuning benchmark: what it is about to run, and that failures do not end it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from benchmarks.tuning import ROWS, ROWS_70B, Rows, check, compare, positions_of

from benchmarks import tuning_ranks


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_row_is_planned_within_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    check()
    rows = {row["row"]: row for row in printed(capsys)}
    assert rows.keys() == {*ROWS, *ROWS_70B}
    for name, row in (ROWS | ROWS_70B).items():
        assert row.limit_gb is None or rows[name]["planned_gb"] <= row.limit_gb
        assert rows[name]["nothing_kept_gb"] <= rows[name]["planned_gb"]


def test_a_row_that_fails_is_reported_and_the_next_one_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.tuning.free", lambda: None)
    rows = Rows(budget_s=60)

    def fails() -> None:
        raise ValueError("no such thing")

    assert rows.run("one", fails) is None
    assert rows.run("two", lambda: 2) == 2
    assert Rows(budget_s=-1).run("three", fails) is None
    found = printed(capsys)
    assert [row["row"] for row in found] == ["one", "three"]
    assert found[0]["error"] == "ValueError: no such thing"
    assert found[1]["skipped"] == "no time left"


def test_curves_are_compared_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    compare("curves", [3.0, 2.0], [3.5, 2.0])
    [row] = printed(capsys)
    assert (row["largest_difference"], row["mean_difference"]) == (0.5, 0.25)


def test_packed_rows_begin_documents_at_zero() -> None:
    assert positions_of(ROWS["b1"]) is None
    found = positions_of(ROWS["b1 packed"])
    assert found is not None
    assert found.shape == (1, 2048)
    assert int((found == 0).sum()) == ROWS["b1 packed"].documents


def test_what_several_gpus_take_is_planned_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    tuning_ranks.check()
    rows = {row["row"]: row for row in printed(capsys)}
    assert list(rows) == [name for name, *_ in tuning_ranks.PLANNED]
    alone, together = rows["8b alone"], rows["8b data parallel"]
    assert alone["planned_gb"] == together["planned_gb"]
    assert alone["planned_comm_gb"] == 0
    assert together["planned_comm_gb"] == rows["8b sharded"]["planned_comm_gb"] > 0
    assert rows["8b sharded"]["planned_gb"] < alone["planned_gb"]
    assert rows["70b sharded"]["planned_gb"] < 35


def test_ranks_that_no_launcher_started_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(tuning_ranks, "outside_bytes", lambda: 0)
    assert tuning_ranks.main() == 1
    assert "torchrun" in printed(capsys)[0]["skipped"]
