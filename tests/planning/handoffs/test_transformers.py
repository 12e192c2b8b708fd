"""A plan in transformers' words: every tensor where the plan counted it, in plain values."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from oomproof.errors import InputError
from oomproof.formats import FORMATS, DType
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import Hardware, HostSpec
from oomproof.memory.model import Demand, MemoryModel, WeightCosts, unit_of
from oomproof.memory.profiles import engine_profile
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.handoffs.transformers import (
    device_map,
    quantization_settings,
    to_transformers,
)
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.units import GIB
from tests.models.configs import SMALL_CONFIGS, small, spec_of

HOST = HostSpec(
    total_ram_bytes=64 * GIB, available_ram_bytes=60 * GIB, free_disk_bytes=None, cpu_count=8
)


@cache
def planned(name: str, gpus: str, **options: Any) -> Plan:
    request = PlanRequest(**{"engine": "transformers", **options})
    return make_plan(resolve(name), describe(gpus, host=HOST), request)


def split_plan(spec: ModelSpec, *cuts: int, context: int = 1) -> Plan:
    """A plan for GPUs whose free memory is, to the byte, what the ranges between cuts need."""
    hardware = describe(f"{len(cuts) + 1}x24GiB", host=HOST)
    profile = engine_profile("transformers", hardware.devices[0], HOST)
    costs = WeightCosts(spec, FORMATS["bf16"], profile, DType.BFLOAT16)
    model = MemoryModel(costs, Demand(context=context, concurrency=1, kv_dtype=DType.BFLOAT16))
    bounds = pairwise((0, *cuts, model.num_units))
    devices = tuple(
        replace(device, free_bytes=model.terms(first, end).peak_bytes)
        for device, (first, end) in zip(hardware.devices, bounds, strict=True)
    )
    machine = Hardware(devices=devices, host=HOST, source="described")
    request = PlanRequest(format="bf16", context=context, engine="transformers")
    return make_plan(spec, machine, request)


def wordy(config: str, **fields: object) -> ModelSpec:
    """A small model whose embedding and layers are large enough to be worth splitting."""
    return spec_of(SMALL_CONFIGS[config] | {"vocab_size": 50_000} | fields)


def module_of(tensor: str, placed: dict[str, int | str]) -> str:
    """The one entry of a device map that holds a tensor."""
    [found] = [name for name in placed if tensor.startswith(name + ".")]
    return found


def test_one_gpu_holds_the_whole_model() -> None:
    assert device_map(planned("llama-3.1-8b", "24GiB", format="nf4-dq")) == {"": 0}
    assert device_map(planned("llama-3.1-8b", "8x24GiB", format="nf4-dq")) == {"": 0}


def test_the_gpu_in_use_is_named_by_its_own_index() -> None:
    plan = planned("llama-3.1-8b", "1x4GiB,1x24GiB", format="nf4-dq")
    assert device_map(plan) == {"": 1}


def test_a_processor_is_named_as_transformers_names_it() -> None:
    assert device_map(planned("llama-3.2-1b", "cpu", format="bf16")) == {"": "cpu"}


def test_several_gpus_share_the_layers_in_order() -> None:
    plan = planned("llama-3.1-405b", "3x80GiB", format="nf4-dq")
    placed = device_map(plan)
    assert len(placed) == 126 + 4
    in_order: list[int | str] = [device.index for device in plan.devices_in_use]
    order = [placed[f"model.layers.{layer}"] for layer in range(126)]
    assert order == sorted(order, key=in_order.index)
    assert set(order) == {0, 1, 2}
    assert placed["model.embed_tokens"] == placed["model.rotary_emb"] == order[0]
    assert placed["model.norm"] == placed["lm_head"] == order[-1]


def test_a_tied_head_stays_with_the_embedding() -> None:
    plan = planned("llama-3.2-3b", "1x4GiB,1x5GiB", format="bf16", context=1024)
    placed = device_map(plan)
    assert plan.pipeline == 2
    assert placed["lm_head"] == placed["model.embed_tokens"] == placed["model.layers.0"]
    assert placed["model.norm"] == placed["model.layers.27"] != placed["lm_head"]
    [holder] = [device for device in plan.devices if device.holds_head]
    assert holder.holds_embedding


def test_a_multimodal_model_keeps_its_prefix_and_its_vision_tower() -> None:
    plan = planned("gemma-3-27b", "3x24GiB", format="bf16", context=1024)
    assert plan.pipeline == 3
    placed = device_map(plan)
    first = placed["model.language_model.embed_tokens"]
    assert placed["model.vision_tower"] == placed["model.multi_modal_projector"] == first
    assert {f"model.language_model.layers.{layer}" for layer in range(62)} <= placed.keys()
    assert placed["lm_head"] == first
    assert not [name for name in placed if name.startswith("model.layers")]


@pytest.mark.parametrize("config", SMALL_CONFIGS)
def test_every_tensor_is_mapped_to_the_device_that_the_plan_counted_it_on(config: str) -> None:
    spec = wordy(config)
    plan = split_plan(spec, 3)
    placed = device_map(plan)
    assert plan.fits
    assert plan.pipeline == 2
    holder: dict[int, int] = {}
    for device in plan.devices_in_use:
        if device.holds_embedding:
            holder[0] = device.index
        for layer in range(*(device.layers[0], device.layers[1] + 1) if device.layers else (0,)):
            holder[layer + 1] = device.index
    holder[spec.num_hidden_layers + 1] = plan.devices_in_use[-1].index
    for tensor in spec.tensors:
        module = module_of(tensor.name, placed)
        assert placed[module] == holder[unit_of(tensor, spec)], tensor.name
    assert placed["lm_head"] == (
        holder[0] if spec.tie_word_embeddings else holder[spec.num_hidden_layers + 1]
    )


def test_the_mapped_bytes_of_each_device_are_those_of_the_plan() -> None:
    spec = resolve("llama-3.1-70b")
    plan = planned("llama-3.1-70b", "2xA100-80GB", format="bf16")
    placed = device_map(plan)
    assert plan.pipeline == 2
    mapped = {device.index: 0 for device in plan.devices}
    for tensor in spec.tensors:
        index = placed[module_of(tensor.name, placed)]
        assert isinstance(index, int)
        mapped[index] += -(-2 * tensor.numel // 512) * 512
    buffers = 16 * 1024
    assert sum(mapped.values()) + buffers == sum(d.terms.weights for d in plan.devices)
    for device in plan.devices:
        assert device.terms.weights - mapped[device.index] in (0, buffers)


def only_the_norm_is_left() -> Plan:
    """Two GPUs, the first of which holds all of a tied model but its final norm."""
    spec = spec_of(
        small(
            "LlamaForCausalLM",
            "llama",
            vocab_size=300_000,
            tie_word_embeddings=True,
            torch_dtype="float32",
        )
    )
    return split_plan(spec, spec.num_hidden_layers + 1)


def test_a_device_that_holds_only_the_norm_of_a_tied_model_is_in_use() -> None:
    plan = only_the_norm_is_left()
    assert plan.fits
    assert plan.pipeline == 2
    assert all(device.terms.weights for device in plan.devices)
    assert [device.index for device in plan.devices_in_use] == [0, 1]


def test_the_norm_of_a_tied_model_is_mapped_to_the_device_that_was_planned_for_it() -> None:
    placed = device_map(only_the_norm_is_left())
    assert (placed.get("lm_head"), placed.get("model.norm")) == (0, 1)


@pytest.mark.parametrize(
    ("format_name", "settings"),
    [
        ("bf16", None),
        ("fp16", None),
        ("llm-int8", {"load_in_8bit": True, "llm_int8_threshold": 6.0}),
        *(
            (
                name,
                {
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": name[:3],
                    "bnb_4bit_use_double_quant": name.endswith("-dq"),
                    "bnb_4bit_compute_dtype": "bfloat16",
                },
            )
            for name in ("nf4", "nf4-dq", "fp4", "fp4-dq")
        ),
    ],
)
def test_quantization_settings_are_bitsandbytes_arguments(
    format_name: str, settings: dict[str, Any] | None
) -> None:
    plan = planned("llama-3.1-8b", "24GiB", format=format_name)
    assert quantization_settings(plan) == settings


def test_an_old_gpu_dequantizes_to_float16() -> None:
    plan = planned("llama-3.1-8b", "T4", format="nf4")
    settings = quantization_settings(plan)
    assert settings is not None
    assert settings["bnb_4bit_compute_dtype"] == plan.compute_dtype == "float16"


@pytest.mark.parametrize("format_name", ["bf16", "llm-int8", "nf4-dq"])
@pytest.mark.parametrize("gpus", ["24GiB", "2x12GiB", "cpu"])
def test_values_for_transformers_are_plain_json(format_name: str, gpus: str) -> None:
    values = to_transformers(planned("llama-3.1-8b", gpus, format=format_name))
    assert json.loads(json.dumps(values)) == values
    assert values.keys() == {
        "pretrained_model_name_or_path",
        "revision",
        "device_map",
        "dtype",
        "attn_implementation",
        "quantization_config",
        "use_safetensors",
        "trust_remote_code",
    }
    assert values["pretrained_model_name_or_path"] == "meta-llama/Llama-3.1-8B"
    assert (values["dtype"], values["attn_implementation"]) == ("bfloat16", "sdpa")
    assert values["use_safetensors"] is True
    assert values["trust_remote_code"] is False


def test_soft_capped_attention_is_handed_over_as_eager() -> None:
    plan = planned("gemma-2-9b", "24GiB", format="nf4")
    assert to_transformers(plan)["attn_implementation"] == "eager"


@pytest.mark.parametrize("engine", ["auto", "native"])
def test_a_plan_for_our_own_engine_is_not_handed_over(engine: str) -> None:
    plan = planned("llama-3.1-8b", "24GiB", format="nf4-dq", engine=engine)
    assert plan.engine == "native"
    said = r'llama-3.1-8b is planned for the native engine, .*: plan it with engine="transformers"'
    for hand_over in (to_transformers, Plan.to_transformers):
        with pytest.raises(InputError, match=said):
            hand_over(plan)


def test_a_tied_model_names_no_head_tensor_of_its_own() -> None:
    assert not [t for t in resolve("llama-3.2-3b").tensors if t.role is Role.HEAD]
