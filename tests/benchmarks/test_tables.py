"""Results as tables, and their place in the document."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.products import Shape, record
from benchmarks.tables import decode_table, measured_with, place, products_table

from benchmarks import tables

MEASURED = Path(__file__).parents[2] / "docs" / "measured.md"
WHERE = {
    "device": "a GPU",
    "date": "2026-01-02",
    "versions": {"torch": "2.11.0", "bitsandbytes": None},
}


def product(tokens: int, **us: float) -> dict[str, Any]:
    shape = Shape(name="o", rows=(4096,), columns=4096)
    row = record(shape, tokens, us, copies=2, relative_error=None)
    return {"benchmark": "products", "model": "llama-3.1-8b", **WHERE, **row}


def pair(name: str, ours: float, theirs: float | None, **fields: Any) -> dict[str, Any]:
    sides = {"ours": {"tokens_per_second": ours, "first_token_s": 0.064}}
    if theirs is not None:
        sides["theirs"] = {"tokens_per_second": theirs, "first_token_s": 0.097}
    return {
        "benchmark": "decode",
        "row": name,
        "model": "llama-3.1-8b",
        "format": "nf4-dq",
        "gpus": 1,
        "requests": 1,
        "prompt_tokens": 128,
        "new_tokens": 48,
        "share": 0.5,
        "ratio": None if theirs is None else ours / theirs,
        **WHERE,
        **sides,
        **fields,
    }


def test_products_stand_beside_the_better_peer() -> None:
    rows = [product(1, ours=5.0, bitsandbytes=10.0, bitsandbytes_stacked=8.0), product(8, ours=6.0)]
    [_, _, line] = products_table(rows)
    gigabytes = rows[0]["weight_bytes"] / 1e6
    assert line == (
        f"| 3.1-8b o | 4,096 × 4,096 | 5.0 ({gigabytes / 5:.2f}) / 8.0 ({gigabytes / 8:.2f}) | "
        f"6.0 ({gigabytes / 6:.2f}) |"
    )


def test_pairs_have_a_line_a_row_and_the_latest_run_counts() -> None:
    rows = [
        pair("8b-1", 1.0, 1.0),
        pair("8b-1", 600.0, 40.0),
        pair("405b-four", 18.04, None, gpus=4),
        {**pair("70b-1", 1.0, 1.0), "failed": True},
    ]
    del rows[-1]["ours"]
    _, _, first, second, third = decode_table(rows)
    assert first == ("| 3.1-8b | nf4-dq | 1 × 128 | decode | 600.0 | 50% | 40.0 | 15.0 | 64 / 97 |")
    assert "| 3.1-8b over 4 GPUs |" in second
    assert second.endswith("| 18.0 | 50% | not run | – | 64 |")
    assert third.endswith("| failed | – | – | – | – |")


def test_a_row_with_an_adapter_says_so() -> None:
    line = decode_table([{**pair("8b-1-adapter", 289.3, None), "rank": 16}])[-1]
    assert line.startswith("| 3.1-8b, adapter of rank 16 | nf4-dq |")


def test_prompts_in_4_bits_stand_beside_our_own_in_16() -> None:
    rows = [
        pair("8b-prompt", 30_000.0, 20_000.0, new_tokens=1),
        pair("8b-prompt-bf16", 40_000.0, 30_000.0, new_tokens=1, format="bf16"),
    ]
    assert decode_table(rows)[-1] == "Our own prompt in nf4-dq runs at 75% of our own in bf16."


def test_a_table_says_what_it_was_measured_with() -> None:
    other = {**WHERE, "date": "2026-01-03"}
    assert measured_with([WHERE, WHERE]) == "a GPU, 2026-01-02, torch 2.11.0."
    assert measured_with([WHERE, other]).count("torch 2.11.0") == 2


def test_a_table_replaces_what_stands_between_its_marks() -> None:
    text = "a\n<!-- products -->\nold\n<!-- end of products -->\nb\n"
    placed = place(text, "products", ["new"])
    assert placed == "a\n<!-- products -->\nnew\n<!-- end of products -->\nb\n"
    assert place(placed, "products", ["new"]) == placed
    with pytest.raises(ValueError, match="no lines <!-- decode -->"):
        place(text, "decode", ["new"])


@pytest.mark.parametrize(
    "row", [product(1, ours=5.0), pair("8b-1", 600.0, 40.0)], ids=["products", "decode"]
)
def test_the_document_has_a_place_for_each_table(
    row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, document = tmp_path / "results.jsonl", tmp_path / "measured.md"
    results.write_text(json.dumps(row) + "\n")
    document.write_text(MEASURED.read_text())
    monkeypatch.setattr(sys, "argv", ["tables.py", str(results), "--into", str(document)])
    tables.main()
    written = document.read_text()
    assert f"<!-- {row['benchmark']} -->\na GPU, 2026-01-02, torch 2.11.0.\n\n|" in written
    assert written.partition("<!--")[0] == MEASURED.read_text().partition("<!--")[0]
