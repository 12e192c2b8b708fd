"""The table of docs/measured.md, held against what is planned today: none above, none far below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oomproof.session import plan
from oomproof.units import MIB

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = [
    json.loads(line)
    for name, _ in (("rehearsals-native-h200", "H200"), ("rehearsals-native-2xh200", "2xH200"))
    for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()
]


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
