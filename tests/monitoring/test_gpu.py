"""On a GPU: the sampler's facts are the allocator's, a leak is found, a failure is explained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

WATCHED = """
import json, os, sys, time
import torch
import oomproof
from oomproof.monitoring.leaks import LeakRule
from oomproof.monitoring.record import record_out_of_memory
from oomproof.monitoring.sampler import Sampler
from oomproof.monitoring.view import watch_machine

with oomproof.load("tiny", engine="native", format="nf4-dq", context=512) as model:
    began = time.time()
    while time.time() - began < 3:
        model.generate("It was", max_new_tokens=32, temperature=0)
    sampler = model._engine.inner.sampler
    with watch_machine() as look:
        view = look()
    [engine] = view.engines
    facts = engine.status.devices[0].allocator
    own = [p for gpu in view.gpus for p in gpu.processes if p.pid == os.getpid()]
    found = {
        "events": [event.message for event in sampler.events],
        "allocated": [s.devices[0].allocator.allocated_bytes for s in sampler.samples],
        "torch_allocated": torch.cuda.memory_allocated(0),
        "fragmentation": facts.fragmentation_bytes,
        "within": engine.status.devices[0].is_within_plan,
        "nvml_bytes": own[0].used_bytes if own else None,
        "peak": engine.status.devices[0].measured.peak_bytes,
    }
    clock = [0.0]
    told, kept = [], []
    from oomproof.monitoring.sampler import Sources
    leaking = Sampler(model.plan, model.measured_terms, on_event=told.append,
                      sources=Sources(monotonic=lambda: clock[0]))
    for _ in range(1500):
        kept.append(torch.empty(4096, dtype=torch.uint8, device="cuda"))
        clock[0] += 61
        leaking.after_step(1)
    found["leaks"] = [(e.device, e.term, e.bytes_per_request) for e in told if e.kind == "leak"]
    kept.clear()
    torch.cuda.memory._record_memory_history(max_entries=1000)
    holder = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    try:
        torch.empty(1 << 46, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        record = record_out_of_memory(error, model.plan, sampler.samples)
    found["asked"] = record.summary.asked_bytes
    found["device"] = record.summary.device
    found["classes"] = [one.at_least_bytes for one in record.summary.blocks.classes]
    found["processes"] = len(record.summary.processes)
    found["text"] = record.file.read_text()
    [snapshot] = record.file.parent.glob("*.snapshot.json")
    found["snapshot_events"] = len(json.loads(snapshot.read_text())["events"])
    print(json.dumps(found))
"""


def test_a_watched_model_a_leak_and_a_failed_allocation(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        env=os.environ | {"OOMPROOF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["events"] == []
    assert found["within"]
    # After loading nothing grows, and what was sampled is what torch says.
    assert set(found["allocated"]) == {found["torch_allocated"]}
    assert found["fragmentation"] >= 0
    # Where the driver tells a process's bytes (not in every container), they hold the plan's sum.
    assert found["nvml_bytes"] is None or found["nvml_bytes"] > 0
    # The tensors' own objects may be told too, as host memory that grows.
    on_device = [leak for leak in found["leaks"] if leak[0] is not None]
    assert [leak[:2] for leak in on_device] == [[0, "allocated"]], found["leaks"]
    pace = on_device[0][2]
    assert 4096 <= pace < 4200
    assert (found["asked"], found["device"]) == (1 << 46, 0)
    assert 64 << 20 in found["classes"]
    assert found["snapshot_events"] > 0
    assert "65,536.0 GiB were asked for" in found["text"]
