"""The bundled model on a processor, watched from its first step to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, time
import oomproof
from oomproof.monitoring.status_files import read_running, status_folder
from oomproof.monitoring.spikes import excesses

events = []
with oomproof.load("tiny", engine=sys.argv[1], format="bf16", context=256, concurrency=2,
                   on_event=events.append) as model:
    began = time.time()
    while time.time() - began < 3.5:
        model.generate_all(["It was", "a dark night"], max_new_tokens=12, temperature=0)
    sampler = model._engine.inner.sampler
    sampler.sample()
    [status] = read_running(status_folder()).statuses
    over = [excess.message for excess in excesses(model.plan, model.measured_terms())]
    print(json.dumps({
        "events": [event.message for event in events], "over": over,
        "looks": len(sampler.samples), "status": status.as_dict(),
        "requests": [sample.requests for sample in sampler.samples],
    }))
assert read_running(status_folder()).statuses == ()
"""


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_the_bundled_model_runs_within_its_plan_and_without_an_event(
    engine: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, engine],
        env=os.environ | {"OOMPROOF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["events"], found["over"]) == ([], [])
    assert 2 <= found["looks"] <= 6
    assert found["requests"] == sorted(found["requests"])
    assert found["requests"][-1] >= 2
    status = found["status"]
    assert (status["model"], status["engine"], status["concurrency"]) == ("tiny", engine, 2)
    [device] = status["devices"]
    assert device["is_within_plan"]
    for term in ("weights", "kv_cache"):
        assert 0.95 * device["planned"][term] <= device["measured"][term] <= device["planned"][term]
    assert status["steps"] > status["requests"] > 0


def test_a_home_that_takes_nothing_does_not_keep_a_model_from_answering(tmp_path: Path) -> None:
    (tmp_path / "running").write_text("a file where a folder should be")
    script = (
        "import oomproof\n"
        "with oomproof.load('tiny', engine='native', format='bf16', context=128) as model:\n"
        "    print(len(model.generate('It was', max_new_tokens=3, temperature=0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"OOMPROOF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    assert done.stderr.count("oomproof top") == 1
