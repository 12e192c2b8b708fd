"""The tuning benchmark: what it is about to run, and that failures do not end it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.tuning import (
    FOLLOWING,
    LESSONS,
    ROWS,
    ROWS_70B,
    WORDS,
    Rows,
    check,
    compare,
    fresh,
    positions_of,
    repeated,
    shape_for,
    spec_of,
)

from benchmarks import tuning_ranks
from oomproof.memory.training import training_memory

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "tuning-h200.jsonl"


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
    compare({("fresh", "ours"): [3.0, 2.0], ("fresh", "the peer"): [3.5, 2.0]})
    [row] = printed(capsys)
    assert row["row"] == "curve, fresh: ours and the peer"
    assert (row["largest_difference"], row["mean_difference"]) == (0.5, 0.25)
    assert row["mean_signed_difference"] == -0.25
    assert row["within_noise"] is None  # nothing says what noise is


@pytest.mark.parametrize(("theirs", "within"), [(3.3, True), (3.5, False)])
def test_a_difference_is_noise_up_to_twice_what_two_runs_differ_by(
    theirs: float, within: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {"ours": 3.0, "ours again": 3.0, "the peer": theirs, "the peer again": theirs - 0.2}
    compare({("repeated", who): [loss, 1.0] for who, loss in losses.items()})
    rows = {row["row"]: row for row in printed(capsys)}
    assert rows["curve, repeated: ours and the peer"]["within_noise"] is within
    assert rows["curve, repeated: ours and ours again"]["within_noise"] is None


def test_lessons_are_the_same_each_time_and_have_something_to_learn() -> None:
    for lesson in LESSONS.values():
        made, again = lesson.batches(2, 64), lesson.batches(2, 64)
        assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))
        assert all(one.shape == (2, 64) and int(one.min()) >= 5 for one in made)
        assert max(int(one.max()) for one in made) < WORDS
    assert torch.equal(repeated(2, 8)[0], repeated(2, 8)[5])
    text = torch.stack(fresh(2, 512))
    assert len(text) == 40
    assert not torch.equal(text[0], text[5])
    pairs = torch.stack((text[..., :-1], text[..., 1:]), dim=-1).view(-1, 2)
    words, together = len(pairs[:, 0].unique()), len(pairs.unique(dim=0))
    assert together < FOLLOWING * words


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


def test_what_was_measured_are_the_plans_of_today() -> None:
    rows = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    ours = [row for row in rows if row.get("side") == "ours"]
    assert len(ours) >= 12
    for found in ours:
        row, spec = {**ROWS, **ROWS_70B}[found["row"]], spec_of(found["model"])
        terms = asdict(training_memory(spec, shape_for(spec, row), optimizer=row.optimizer))
        assert {name: terms[name] for name in found["terms"]} == found["terms"], found["row"]
