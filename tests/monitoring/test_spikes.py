"""Which terms are above their plan."""

from __future__ import annotations

import json
from pathlib import Path

from oomproof.memory.terms import DeviceTerms
from oomproof.monitoring.spikes import terms_over

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PLANNED = DeviceTerms(cuda_context=800, weights=5000, kv_cache=1000, workspace=200, graphs=40)


def test_a_term_above_its_plan_is_named() -> None:
    measured = DeviceTerms(cuda_context=750, weights=5001, kv_cache=1000, workspace=300)
    assert terms_over("cuda", PLANNED, measured) == ("weights", "workspace")
    assert terms_over("cpu", PLANNED, measured) == ("weights",)


def test_graphs_count_with_the_context_that_kernels_are_planned_in() -> None:
    assert terms_over("cuda", PLANNED, DeviceTerms(cuda_context=690, graphs=70)) == ()
    assert terms_over("cuda", PLANNED, DeviceTerms(cuda_context=790, graphs=70)) == ("graphs",)


def test_no_term_of_what_was_measured_on_gpus_is_told() -> None:
    for name in ("rehearsals-native-h200", "rehearsals-native-2xh200"):
        for line in (RESULTS / f"{name}.jsonl").read_text().splitlines():
            for device in json.loads(line)["devices"]:
                planned, measured = (DeviceTerms(**device[k]) for k in ("predicted", "measured"))
                assert terms_over("cuda", planned, measured) == ()
