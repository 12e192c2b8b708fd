"""Every loaded parameter is compared with the plan: device, dtype, bytes, presence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oomproof.compat.model import load_model
from oomproof.compat.verify import parameter_bytes, parameter_tensors, verify_parameters
from oomproof.errors import PlanMismatchError
from oomproof.formats import get_format
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.plan import Plan
from oomproof.session import plan
from tests.compat.checkpoints import random_checkpoint

DOWN = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return resolve("tiny")


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan("tiny", engine="transformers", format="nf4-dq")


@pytest.fixture(scope="module")
def tiny(planned: Plan, spec: ModelSpec) -> Any:
    return load_model(planned, spec, bundled_folder())


@contextmanager
def swapped(model: Any, name: str, module: torch.nn.Module) -> Iterator[None]:
    """The model with another module under that name."""
    original = model.get_submodule(name)
    model.set_submodule(name, module)
    yield
    model.set_submodule(name, original)


def differences(model: Any, planned: Plan, spec: ModelSpec) -> tuple[str, ...]:
    with pytest.raises(PlanMismatchError) as refused:
        verify_parameters(model, planned, spec)
    return refused.value.differences


def test_what_was_loaded_by_the_plan_agrees_with_it(
    tiny: Any, planned: Plan, spec: ModelSpec
) -> None:
    verify_parameters(tiny, planned, spec)


def test_a_bf16_layer_where_4_bits_were_planned_is_found(
    tiny: Any, planned: Plan, spec: ModelSpec
) -> None:
    with swapped(tiny, DOWN, torch.nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)):
        [found] = differences(tiny, planned, spec)
    bytes_16 = 2 * 512 * 256
    assert found.startswith(f"{DOWN}.weight: planned ")
    assert found.endswith(f"bytes of uint8 on cpu, found {bytes_16:,} bytes of bfloat16 on cpu")


def test_a_norm_in_another_dtype_is_found(tiny: Any, planned: Plan, spec: ModelSpec) -> None:
    norm = tiny.model.norm
    original = norm.weight
    norm.weight = torch.nn.Parameter(original.data.float())
    try:
        [found] = differences(tiny, planned, spec)
    finally:
        norm.weight = original
    assert found == (
        "model.norm.weight: planned 512 bytes of bfloat16 on cpu, "
        "found 1,024 bytes of float32 on cpu"
    )


def test_a_parameter_on_another_device_is_found(tiny: Any, planned: Plan, spec: ModelSpec) -> None:
    elsewhere = torch.nn.Linear(256, 2048, bias=False, dtype=torch.bfloat16, device="meta")
    with swapped(tiny, "lm_head", elsewhere):
        [found] = differences(tiny, planned, spec)
    assert found.endswith("bfloat16 on cpu, found 1,048,576 bytes of bfloat16 on meta")


def test_a_parameter_too_many_and_one_too_few_are_found(
    tiny: Any, planned: Plan, spec: ModelSpec
) -> None:
    with swapped(tiny, "model.norm", torch.nn.Linear(1, 1)):
        found = differences(tiny, planned, spec)
    assert "model.norm.bias: loaded, not planned" in found
    with swapped(tiny, "model.norm", torch.nn.Identity()):
        found = differences(tiny, planned, spec)
    assert found == ("model.norm.weight: planned, not loaded",)


def test_scales_that_were_not_quantized_again_are_found(spec: ModelSpec, tiny: Any) -> None:
    without = plan("tiny", engine="transformers", format="nf4")
    found = differences(tiny, without, spec)
    quantized = sum(tensor.role is Role.LINEAR for tensor in spec.tensors)
    assert len(found) == quantized


def test_layers_on_other_devices_than_planned_are_found(tiny: Any, spec: ModelSpec) -> None:
    for_gpus = plan("tiny", engine="transformers", format="nf4-dq", gpus="1x24GiB")
    found = differences(tiny, for_gpus, spec)
    assert len(found) == len(spec.tensors)
    assert all("on cuda:0, found" in difference for difference in found)


def test_each_layer_belongs_to_the_device_of_its_range(tiny: Any, spec: ModelSpec) -> None:
    made = plan("tiny", engine="transformers", format="nf4-dq", gpus="2x24GiB")
    first, second = made.devices
    split = replace(
        made,
        devices=(
            replace(first, layers=(0, 1), holds_embedding=True, holds_head=False),
            replace(second, layers=(2, 4), holds_embedding=False, holds_head=True),
        ),
    )
    places = {
        difference.partition(":")[0]: difference.partition(" on ")[2].partition(",")[0]
        for difference in differences(tiny, split, spec)
    }
    assert places["model.embed_tokens.weight"] == "cuda:0"
    assert places["model.layers.1.mlp.up_proj.weight"] == "cuda:0"
    assert places["model.layers.2.mlp.up_proj.weight"] == "cuda:1"
    assert places["model.norm.weight"] == places["lm_head.weight"] == "cuda:1"


def test_the_error_counts_the_differences_and_shows_three(tiny: Any, spec: ModelSpec) -> None:
    for_gpus = plan("tiny", engine="transformers", format="nf4-dq", gpus="1x24GiB")
    with pytest.raises(PlanMismatchError, match=rf"^{len(spec.tensors)} loaded .*\(and \d+ more\)"):
        verify_parameters(tiny, for_gpus, spec)


@pytest.mark.parametrize("weight_format", ["nf4", "nf4-dq", "fp4", "fp4-dq", "llm-int8"])
def test_a_quantized_parameter_takes_the_bytes_that_its_format_states(
    weight_format: str, spec: ModelSpec
) -> None:
    made = plan("tiny", engine="transformers", format=weight_format)
    model = load_model(made, spec, bundled_folder())
    parameter = model.get_parameter(f"{DOWN}.weight")
    components = get_format(weight_format).components(256, 512)
    tensors = parameter_tensors(parameter)
    assert sorted(t.nbytes for t in tensors) == sorted(c.size_bytes for c in components)
    assert parameter_bytes(parameter) == sum(c.size_bytes for c in components)
    assert parameter_bytes(parameter, 512) % 512 == 0


@pytest.mark.parametrize("weight_format", ["bf16", "nf4", "nf4-dq", "llm-int8"])
def test_the_experts_of_a_mixtral_stay_in_16_bits_in_plan_and_memory(
    weight_format: str, tmp_path: Path
) -> None:
    folder = random_checkpoint(tmp_path, "mixtral")
    made, spec = plan(folder, engine="transformers", format=weight_format), resolve(str(folder))
    model = load_model(made, spec, folder)
    experts = [t for t in spec.tensors if t.role is Role.EXPERTS]
    assert len(experts) == 2 * spec.num_hidden_layers
    for tensor in experts:
        assert len(tensor.shape) == 3
        assert model.get_parameter(tensor.name).dtype is torch.bfloat16
    assert made.devices[0].terms.weights >= sum(2 * tensor.numel for tensor in experts)
