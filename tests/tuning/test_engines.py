"""What peft trains is what was planned, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from oomproof.errors import NotRunnableError
from oomproof.hardware.describe import describe
from oomproof.planning.request import PlanRequest
from oomproof.tuning.engines import build_with_peft
from oomproof.tuning.options import AdapterSettings, TuningSettings
from oomproof.tuning.planner import TrainingPlanner
from oomproof.tuning.rehearsal import made_up_data
from tests.memory.test_peft import build


def built(name: str, *targets: str, **sizes: object) -> Any:
    import torch

    _, spec = build(name, torch.float32, **sizes)
    adapter = AdapterSettings(rank=4, target_modules=targets or ("all-linear",))
    settings = TuningSettings(adapter=adapter, batch_size=1, packing=False)
    request = PlanRequest(format="bf16")
    planner = TrainingPlanner(spec, describe("cpu"), request, settings)
    plan = planner.plan(made_up_data(64), context=64, longest=64)
    return plan, build_with_peft(plan, spec, None, settings, base_id=name)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_stay_as_they_are(name: str) -> None:
    plan, model = built(name)
    trained = {key: one for key, one in model.named_parameters() if one.requires_grad}
    assert 4 * sum(one.numel() for one in trained.values()) == plan.terms.adapters
    assert not any("experts" in key or ".gate." in key for key in trained)


def test_linears_that_share_names_with_experts_are_refused() -> None:
    dense = {"mlp_only_layers": [0]}
    with pytest.raises(NotRunnableError, match=r"peft trains .* planned were") as raised:
        built("qwen3_moe", **dense)
    assert "--target-modules" in str(raised.value.remedy)
    _, model = built("qwen3_moe", "q_proj", "o_proj", **dense)
    assert sum(one.requires_grad for one in model.parameters()) == 3 * 2 * 2
