"""The table of docs/measured.md, held against what is planned today: none above, none far below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.decode import made_up_adapter

from oomproof.session import plan
from oomproof.units import MIB

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = [
    json.loads(line)
    for name, _ in (("rehearsals-native-h200", "H200"), ("rehearsals-native-2xh200", "2xH200"))
    for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()
]

NOT_REPEATED = {"native-70b-nf4-dq-2k-4", "native-70b-nf4-8k-1", "native-fp8-kv", "native-offload"}
"""Rows that were timed before prompts were recorded as graphs."""


@pytest.mark.parametrize("row", ROWS, ids=[row["row"] for row in ROWS])
def test_what_was_measured_is_within_todays_plan(row: dict[str, Any]) -> None:
    made = plan(
        row["model"],
        gpus="2xH200" if row["max_memory"] else "H200",
        format=row["format"],
        context=row["context"],
        concurrency=row["concurrency"],
        cap=row["cap"],
        max_memory={int(size[0]): size[2:] for size in row["max_memory"]},
        kv_format="fp8" if "fp8-kv" in row["row"] else "auto",
        offload="cpu" if "offload" in row["row"] else "none",
        engine=row["engine"],
    )
    assert made.fits
    for device, found in zip(made.devices_in_use, row["devices"], strict=True):
        assert list(device.layers or ()) == found["layers"]
        promised = device.peak_bytes - device.terms.margin
        measured = found["measured_peak_bytes"]
        assert measured <= promised
        assert promised - measured <= max(0.02 * promised, 200 * MIB)
        assert device.terms.weights == found["measured"]["weights"]
        assert device.terms.kv_cache == found["measured"]["kv_cache"]


def test_streaming_is_as_fast_as_predicted() -> None:
    row = next(row for row in ROWS if row["row"] == "native-offload")
    made = plan(
        row["model"],
        gpus="H200",
        format=row["format"],
        context=row["context"],
        cap=row["cap"],
        offload="cpu",
        engine="native",
    )
    timed = [rung["tokens_per_second"] for rung in row["rungs"]]
    assert made.tokens_per_second.decode == pytest.approx(timed[-1], rel=0.2)


def test_speeds_are_predicted_within_a_tenth() -> None:
    """Of decode.py's rows: tokens of all requests together, or of a prompt."""
    lines = (RESULTS / "decode-h200.jsonl").read_text().splitlines()
    adapter = made_up_adapter("llama-3.1-8b", 16)
    for row in map(json.loads, lines):
        tokens = row["prompt_tokens"] + row["new_tokens"]
        made = plan(
            row["model"],
            gpus=f"{row['gpus']}xH200",
            format=row["format"],
            # Decoding is predicted with half of the context used.
            context=row["prompt_tokens"] if row["kind"] == "prefill" else 2 * tokens,
            concurrency=row["requests"],
            cap=row["cap"],
            engine="native",
            adapter=adapter if row.get("rank") else None,
        ).tokens_per_second
        predicted = made.prefill if row["kind"] == "prefill" else made.decode_total
        assert predicted == pytest.approx(row["ours"]["tokens_per_second"], rel=0.1), row["row"]


def test_prompts_are_predicted_within_a_tenth_whatever_the_format() -> None:
    for row in ROWS:
        if row["row"] in NOT_REPEATED or "two" in row["row"]:
            continue
        rung = [rung for rung in row["rungs"] if rung["requests"] == 1][-1]
        made = plan(
            row["model"],
            gpus="H200",
            format=row["format"],
            context=row["context"],
            concurrency=row["concurrency"],
            cap=row["cap"],
            engine="native",
        ).tokens_per_second
        assert made.prefill == pytest.approx(rung["prefill_tokens_per_second"], rel=0.1), row["row"]
