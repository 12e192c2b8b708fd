"""Training is as fast as predicted, by what was measured (benchmarks/tuning.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oomproof.hardware.describe import describe
from oomproof.memory.training_shape import Kept
from oomproof.models.resolve import resolve
from oomproof.tuning.speed import EFFICIENCIES, seconds_of, work_of

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
RESULTS = FOLDER / "tuning-h200.jsonl"
PEFT_RESULTS = FOLDER / "tuning-peft-h200.jsonl"
NOT_PREDICTED = ("8-bit", "packed", "flash", "scratch", "curve", "profile", "64 tokens")
"""Rows in which something else is varied, or launches take longer than the arithmetic."""


def predicted(
    engine: str,
    model: str,
    batch: int,
    sequence: int,
    kept: tuple[int, ...] | None,
    *,
    recompute: bool = True,
) -> float | None:
    spec, [device] = resolve(model), describe("H200").devices
    work = work_of(
        spec,
        tokens=batch * sequence,
        document=sequence,
        kept=None if kept is None else Kept(**dict(zip(Kept.__slots__, kept, strict=True))),
        recompute=recompute,
    )
    return seconds_of(spec, device, engine, work, micro_batches=1)


def test_the_time_of_our_steps_is_predicted() -> None:
    compared = 0
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("side") != "ours" or any(word in row["row"] for word in NOT_PREDICTED):
            continue
        kept = tuple(row["kept"].values())
        found = predicted("native", row["model"], row["batch"], row["sequence"], kept)
        assert found == pytest.approx(row["s_per_step"], rel=0.06), row["row"]
        compared += 1
    assert compared >= 11


def rows_of_peft() -> list[dict[str, Any]]:
    lines = PEFT_RESULTS.read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "model" in row]


def test_the_time_of_pefts_steps_is_predicted_roughly() -> None:
    """Within a factor of two; within a tenth where the host is not what it waits for."""
    compared = 0
    for row in rows_of_peft():
        options = row["options"]
        batch, sequence = options["micro_batch"], options.get("context", 2048)
        found = predicted(
            "transformers",
            row["model"],
            batch,
            sequence,
            None,
            recompute=options["checkpointing"] != "none",
        )
        assert found is not None
        share = found * row["tokens_per_second"] / (batch * sequence)
        assert 0.5 < share < 2, row["row"]
        if row["model"] == "llama-3.1-8b" and batch * sequence > 2048:
            assert share == pytest.approx(1, rel=0.1), row["row"]
        compared += 1
    assert compared >= 12


def test_no_step_took_more_memory_than_was_planned() -> None:
    """In any row, and at most 5 % less."""
    rows = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    shares = [row["planned_over_measured"] for row in rows if "planned_over_measured" in row]
    assert len(shares) >= 12
    assert all(1 <= share <= 1.05 for share in shares)


def test_keeping_more_and_longer_micro_batches_take_less_time() -> None:
    def took(batch: int, kept: tuple[int, ...]) -> float:
        seconds = predicted("native", "llama-3.1-8b", batch, 2048, kept)
        assert seconds is not None
        return seconds / batch

    assert took(1, (32, 32, 32, 32)) < took(1, (32, 32, 0, 0)) < took(1, (0, 0, 0, 0))
    assert took(4, (0, 0, 0, 0)) < took(1, (0, 0, 0, 0))


def test_where_flops_are_not_known_no_time_is_told() -> None:
    spec, [device] = resolve("tiny"), describe("24GiB").devices
    work = work_of(spec, tokens=64, document=64, kept=None, recompute=False)
    assert seconds_of(spec, device, "native", work, micro_batches=1) is None
    assert all("-h200.jsonl" in one.measured for one in EFFICIENCIES.values())
