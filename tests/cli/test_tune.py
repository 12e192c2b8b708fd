"""`oomproof tune`: a plan before anything, one line for every mistake, and a result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.cli.invoke import invoke
from tests.tuning.books import small_book, write_lines

QUICK = (
    "--engine=transformers",
    "--context=64",
    "--batch-size=4",
    "--max-steps=2",
    "--epochs=9",
    "--rank=2",
    "--evaluations=1",
)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    book = small_book(tmp_path)
    done = invoke("tune", "tiny", "--data", str(book), "--dry-run", "--context", "64")
    assert done.code == 0, done.err
    assert "book.txt: " in done.out
    assert re.search(r"fits: .* on cpu, with adamw", done.out)
    for word in ("weights", "activations", "optimizer states", "peak", "most at once"):
        assert word in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_a_plan_for_another_machine_exits_with_3_where_it_does_not_fit(tmp_path: Path) -> None:
    lines = [{"text": "It was a dark night. " * 30}] * 4
    path = write_lines(tmp_path / "a.jsonl", *lines)
    arguments = ("tune", "tiny", "--data", str(path), "--dry-run", "--gpus", "1GiB", "--json")
    found = invoke(*arguments, "--engine", "transformers")
    plan = json.loads(found.out)
    assert (found.code, plan["fits"]) == (3, False)
    assert plan["shortfall_bytes"] > 0
    assert plan["remedies"]
    large = invoke(*arguments[:-2], "24GiB", "--json")
    assert (large.code, json.loads(large.out)["fits"]) == (0, True)


def test_a_run_says_its_plan_and_prints_its_result(tmp_path: Path) -> None:
    book, out = small_book(tmp_path), tmp_path / "out"
    done = invoke("tune", "tiny", "--data", str(book), "--out", str(out), *QUICK)
    assert done.code == 0, done.err
    assert f"{out}: the adapter of step 2 of 2" in done.out
    assert re.search(r"perplexity of held-out samples \d+\.\d\d → \d+\.\d\d \([+-]\d", done.out)
    assert "fits: " in done.err
    assert "step 2 of 2: loss " in done.err
    again = invoke(
        "tune", "tiny", "--data", str(book), "--out", str(out), *QUICK, "--resume", "--json"
    )
    assert json.loads(again.out)["finished"] is True


def test_an_interrupt_is_exit_code_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    from oomproof.tuning.trainer import Watch

    whole = Watch.on_step_begin

    def stops(self: Any, *arguments: Any, **options: Any) -> None:
        self.stop_asked = True
        whole(self, *arguments, **options)

    book, out = small_book(tmp_path), tmp_path / "out"
    with patch.object(Watch, "on_step_begin", stops):
        done = invoke("tune", "tiny", "--data", str(book), "--out", str(out), *QUICK)
    assert (done.code, done.out) == (130, "")
    assert "stopped after step 1 of 2, and saved: the same command with --resume" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{data}"], "--out is missing: give the folder to make: --out DIR"),
        (["--data", "{data}", "--out", "{out}", "--gpus", "24GiB"], "--gpus describes a machine"),
        (["--data", "nowhere.jsonl", "--out", "{out}"], "data 'nowhere.jsonl' is no file here"),
        (["--data", "{bad}", "--out", "{out}"], "bad.jsonl, line 2: is not JSON at column 1"),
        (["--data", "{data}", "--out", "/"], "--out / names no folder to make"),
        (["--data", "{data}", "--out", "{used}"], "exists and holds something else"),
        (["--data", "{data}", "--out", "{out}", "--rank", "0"], "rank 0 must be from 1 to 1024"),
        (["--data", "{data}", "--out", "{out}", "--context", "9k"], "context 9,216 is beyond"),
        (["--data", "{data}", "--out", "{out}", "--context", "auto"], "'auto' has no meaning"),
        (["--data", "{data}", "--out", "{out}", "--optimizer", "sgd"], "unknown optimizer 'sgd'"),
        (["--data", "{data}", "--out", "{out}", "--engine", "jax"], "unknown engine 'jax'"),
        (
            ["--data", "{data}", "--out", "{out}", "--engine=transformers", "--target-modules=x"],
            "target module 'x' is no linear layer of the decoder",
        ),
        (["--data", "org/name", "--out", "{out}"], "HF_HUB_OFFLINE is set"),
        (["--data", "{long}", "--out", "{out}", "--context", "16"], "line 1: has "),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine", encoding="utf-8")
    places = {
        "data": write_lines(tmp_path / "data.jsonl", {"text": "a b"}, {"text": "c d"}),
        "bad": write_lines(tmp_path / "bad.jsonl", {"text": "a b"}, "nothing"),
        "long": write_lines(tmp_path / "long.jsonl", {"text": "It was night. " * 20}),
        "out": tmp_path / "out",
        "used": tmp_path / "used",
    }
    done = invoke("tune", "tiny", *(one.format(**places) for one in arguments))
    assert (done.code, done.out) == (1, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in done.err


def test_without_peft_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import oomproof.adapting

    monkeypatch.setattr(oomproof.adapting, "find_spec", lambda _: None)
    error = invoke("tune", "tiny", "--data", "x.jsonl", "--dry-run").error
    assert error == "error: peft is not installed: run: pip install 'oomproof[run,tune]'\n"
