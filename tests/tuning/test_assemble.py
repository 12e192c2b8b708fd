"""The device of a fine-tuning: as free as planned, and held to the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oomproof.errors import PlanDoesNotFitError
from oomproof.hardware.describe import describe
from oomproof.models.resolve import resolve
from oomproof.planning.plan import DevicePlan
from oomproof.planning.request import PlanRequest
from oomproof.tuning import assemble
from oomproof.tuning.options import AdapterSettings, TuningSettings
from oomproof.tuning.plan import TrainingPlan
from oomproof.tuning.planner import TrainingPlanner
from oomproof.tuning.rehearsal import made_up_data
from oomproof.units import GIB

HELD = 3 * GIB


def planned(engine: str, cap: int | None = None) -> TrainingPlan:
    planner = TrainingPlanner(
        resolve("llama-3.2-1b"),
        describe("24GiB"),
        PlanRequest(format="nf4-dq", cap_bytes=cap),
        TuningSettings(adapter=AdapterSettings()),
        engine=engine,
    )
    return planner.plan(made_up_data(2048), context=2048, longest=2048)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []

    def limit(device: DevicePlan, limit_bytes: int) -> None:
        assert device.kind == "cuda"
        found.append(limit_bytes)

    monkeypatch.setattr(assemble, "limit_device", limit)
    monkeypatch.setattr(assemble, "prepare_devices", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: HELD)
    return found


@pytest.mark.parametrize("cap", [None, 8 * GIB])
def test_torch_may_take_what_our_engines_plan_says_beside_what_is_held_already(
    cap: int | None, limits: list[int]
) -> None:
    plan = planned("native", cap)
    assert assemble.open_device(plan, describe("24GiB")) == torch.device("cuda", 0)
    assert limits == [plan.peak_bytes + HELD]
    assert cap is None or plan.peak_bytes <= cap


def test_bounds_that_were_never_measured_are_no_limit(limits: list[int]) -> None:
    assemble.open_device(planned("transformers"), describe("24GiB"))
    assert limits == []


def test_a_device_that_was_filled_since_is_refused(limits: list[int]) -> None:
    machine = describe("24GiB")
    [device] = machine.devices
    less = replace(machine, devices=(replace(device, free_bytes=GIB),))
    with pytest.raises(PlanDoesNotFitError, match=r"has 1\.00 GiB free now, training needs"):
        assemble.open_device(planned("native"), less)
    assert limits == []
