"""Snapshots as plain values: size classes, and JSON of a bounded size."""

from __future__ import annotations

import json
from typing import Any

from oomproof.monitoring.blocks import (
    block_facts,
    has_history,
    read_snapshot,
    snapshot_as_json,
)
from oomproof.units import KIB, MIB

FRAME = {"filename": "/home/somebody/model.py", "line": 7, "name": "forward"}


def block(size: int, state: str = "active_allocated", frames: int = 1) -> dict[str, Any]:
    stack = [FRAME | {"line": number} for number in range(frames)]
    return {"size": size, "requested_size": size - 1, "state": state, "frames": stack}


def snapshot(blocks: int = 3, events: int = 0, device: int = 0) -> dict[str, Any]:
    segment = {
        "device": device,
        "address": 4096,
        "total_size": blocks * MIB,
        "allocated_size": MIB,
        "segment_type": "large",
        "segment_pool_id": (0, 1),
        "stream": 0,
        "blocks": [block(MIB, frames=number % 40) for number in range(blocks)],
    }
    event = {"action": "alloc", "size": 512, "addr": 1, "frames": [FRAME] * 3, "stream": 0}
    return {"segments": [segment], "device_traces": [[event] * events, []]}


def test_live_blocks_are_grouped_by_powers_of_two_the_heaviest_first() -> None:
    raw = snapshot(0)
    raw["segments"][0]["blocks"] = [
        *[block(512)] * 100,
        *[block(3 * MIB)] * 2,
        block(2 * MIB),
        block(MIB, state="active_awaiting_free"),
        block(5 * MIB, state="inactive"),
        block(64 * KIB, state="inactive"),
    ]
    facts = block_facts(raw, 0)
    assert [(one.at_least_bytes, one.blocks, one.total_bytes) for one in facts.classes] == [
        (2 * MIB, 3, 8 * MIB),
        (MIB, 1, MIB),
        (512, 100, 100 * 512),
    ]
    assert facts.largest_free_bytes == 5 * MIB
    assert facts.free_bytes == 5 * MIB + 64 * KIB


def test_another_devices_blocks_are_not_counted() -> None:
    facts = block_facts(snapshot(device=1), 0)
    assert (facts.classes, facts.largest_free_bytes) == ((), 0)


def test_the_json_has_every_block_and_stacks_once() -> None:
    found = json.loads(snapshot_as_json(snapshot(blocks=80, events=10)))
    assert found["left_out"] == {"blocks": 0, "events": 0}
    [segment] = found["segments"]
    assert len(segment["blocks"]) == 80
    assert segment["pool"] == [0, 1]
    size, requested, state, stack = segment["blocks"][1]
    assert (size, requested, state) == (MIB, MIB - 1, "active_allocated")
    assert found["frames"][found["stacks"][stack][0]] == ["/home/somebody/model.py", 0, "forward"]
    assert segment["blocks"][0][3] == -1
    assert max(len(stack) for stack in found["stacks"]) == 16
    assert len(found["events"]) == 10


def test_the_json_is_bounded_and_says_what_it_left_out() -> None:
    raw = snapshot(blocks=1000, events=30_000)
    raw["segments"] = raw["segments"] * 40
    data = snapshot_as_json(raw, most_bytes=100_000)
    assert len(data) <= 100_000
    left_out = json.loads(data)["left_out"]
    assert left_out["blocks"] > 0
    assert left_out["events"] > 20_000


def test_history_shows_in_the_traces() -> None:
    assert not has_history(snapshot())
    assert not has_history({})
    assert has_history(snapshot(events=1))


def test_what_a_version_leaves_out_is_no_failure() -> None:
    assert json.loads(snapshot_as_json({"segments": [{}], "device_traces": [[{}]]}))["segments"]
    assert block_facts({"segments": [{"blocks": [{}]}]}, 0).classes == ()


def test_without_cuda_there_is_no_snapshot() -> None:
    assert read_snapshot() is None
