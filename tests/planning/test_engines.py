"""Which engine runs a model: ours where it can, transformers where not, and the reason in words."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from oomproof.errors import InputError
from oomproof.formats import FORMATS, held_format
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import DeviceKind, DeviceSpec, Hardware, HostSpec
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.engines import ENGINES, choose_engine, why_not_native
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.session import plan
from oomproof.units import GIB
from tests.models.configs import SMALL_CONFIGS, spec_of

HOST = HostSpec(
    total_ram_bytes=64 * GIB, available_ram_bytes=60 * GIB, free_disk_bytes=None, cpu_count=8
)
NATIVE = {"llama", "mistral", "ministral", "qwen2", "qwen3", "granite", "seed-oss"}
NO_DECODER = "the native engine has no decoder of this family yet"


@cache
def known(name: str) -> ModelSpec:
    return spec_of(SMALL_CONFIGS[name]) if name in SMALL_CONFIGS else resolve(name)


def device(
    kind: DeviceKind = "cuda", capability: tuple[int, int] | None = (9, 0), index: int = 0
) -> DeviceSpec:
    return DeviceSpec(
        index=index,
        name=f"card {index}",
        kind=kind,
        total_bytes=24 * GIB,
        free_bytes=24 * GIB,
        compute_capability=capability,
    )


def planned(spec: ModelSpec | str, *devices: DeviceSpec, **options: Any) -> Plan:
    machine = Hardware(devices=devices or (device(),), host=HOST, source="described")
    found = known(spec) if isinstance(spec, str) else spec
    return make_plan(found, machine, PlanRequest(**options))


# --- families


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_a_family_with_a_decoder_of_ours_is_run_by_it(name: str) -> None:
    spec = known(name)
    plan = planned(name, format="bf16")
    if spec.family in NATIVE:
        assert (plan.engine, plan.runnable, plan.attention) == ("native", True, "paged")
    else:
        assert plan.engine == "transformers"
        assert why_not_native(spec, FORMATS["bf16"], [device()]) == NO_DECODER


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_act": "gelu"}, "the native engine computes silu, not 'gelu'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "the native engine has no 'dynamic' rotary positions",
        ),
    ],
)
def test_a_model_that_computes_in_another_way_is_run_by_transformers(
    fields: dict[str, Any], reason: str
) -> None:
    spec = spec_of(SMALL_CONFIGS["llama"] | fields)
    assert why_not_native(spec, FORMATS["bf16"], [device()]) == reason
    assert planned(spec, format="bf16").engine == "transformers"
    forced = planned(spec, format="bf16", engine="native")
    assert (forced.engine, forced.runnable, forced.not_runnable) == ("native", False, reason)


# --- formats


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_our_own_engine_runs_every_format_but_bitsandbytes_llm_int8(
    kind: DeviceKind, format_name: str
) -> None:
    where = device(kind, (9, 0) if kind == "cuda" else None)
    plan = planned("llama", where, format=format_name)
    assert plan.engine == ("transformers" if format_name == "llm-int8" else "native")
    assert plan.runnable
    reason = why_not_native(known("llama"), FORMATS[format_name], [where])
    assert reason == (
        "the native engine does not hold llm-int8" if format_name == "llm-int8" else None
    )


@pytest.mark.parametrize("format_name", FORMATS)
def test_transformers_can_be_asked_for(format_name: str) -> None:
    plan = planned("llama", format=format_name, engine="transformers")
    assert plan.engine == "transformers"
    assert plan.runnable == (format_name not in ("fp32", "int8", "fp8", "int4", "nf4-g16"))


def test_auto_tries_bitsandbytes_8_bits_only_where_ours_are_not() -> None:
    def tried(name: str) -> list[str]:
        plan = planned(name)
        return [plan.format, *(other.format for other in plan.alternatives)]

    assert tried("llama") == ["bf16", "int8", "fp8", "nf4", "nf4-dq"]
    assert tried("gemma2") == ["bf16", "int8", "llm-int8", "fp8", "nf4", "nf4-dq"]


# --- devices


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (device("cuda", (8, 0)), None),
        (device("cuda", (8, 6)), None),
        (device("cuda", (8, 9)), None),
        (device("cuda", (12, 0)), None),
        (device("cuda", None), None),
        (device("cpu", None), None),
        (
            device("cuda", (7, 5)),
            "the native engine needs compute capability 8.0, card 0 has 7.5",
        ),
        (
            device("rocm", None),
            "the native engine runs on NVIDIA GPUs and on processors, not on rocm",
        ),
        (
            device("mps", None),
            "the native engine runs on NVIDIA GPUs and on processors, not on mps",
        ),
    ],
)
def test_our_own_engine_runs_on_nvidia_gpus_from_8_0_and_on_processors(
    where: DeviceSpec, reason: str | None
) -> None:
    assert why_not_native(known("llama"), FORMATS["nf4"], [where]) == reason
    assert planned("llama", where, format="fp16").engine == (
        "native" if reason is None else "transformers"
    )
    forced = planned("llama", where, format="fp16", engine="native")
    assert (forced.engine, forced.runnable) == ("native", reason is None)
    assert forced.not_runnable == reason


def test_one_device_that_ours_does_not_run_on_gives_all_of_them_to_transformers() -> None:
    new, old = device("cuda", (8, 6)), device("cuda", (7, 0), index=1)
    assert planned("llama", new, old, format="fp16").engine == "transformers"
    said = "the native engine needs compute capability 8.0, card 1 has 7.0"
    assert why_not_native(known("llama"), FORMATS["fp16"], [new, old]) == said


def test_old_cards_are_offered_what_transformers_runs_there() -> None:
    plan = make_plan(known("llama-3.1-8b"), describe("T4", host=HOST), PlanRequest())
    assert (plan.format, plan.engine, plan.runnable) == ("llm-int8", "transformers", True)
    forced = make_plan(
        known("llama-3.1-8b"), describe("T4", host=HOST), PlanRequest(engine="native")
    )
    assert not forced.runnable
    assert "the native engine needs compute capability 8.0, Tesla T4 has 7.5" in forced.reasons


# --- checkpoints that are quantized already


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
LLM_INT8: dict[str, object] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FBGEMM: dict[str, object] = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
BLOCK: dict[str, object] = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}


def compressed(
    strategy: str = "channel",
    inputs: object = "dynamic",
    kind: str = "float",
    group_size: int | None = None,
    **fields: object,
) -> dict[str, object]:
    scales: dict[str, object] = {"num_bits": 8, "type": kind, "strategy": strategy}
    scales |= {"symmetric": True, "group_size": group_size}
    dynamic = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": inputs == "dynamic"}
    group = {"weights": scales, "input_activations": None if inputs is None else dynamic}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "float" else "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **fields,
    }


def quantized(fields: dict[str, object], name: str = "llama") -> ModelSpec:
    return spec_of(SMALL_CONFIGS[name] | {"quantization_config": fields})


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (GPTQ, "gptq checkpoints in gptq-4bit-g32"),
        (BLOCK | {"weight_block_size": [64, 128]}, "fp8-block: blocks of 128 x 128 with dynamic"),
        (BLOCK | {"activation_scheme": "static"}, "blocks of 128 x 128 with dynamic"),
        (compressed(inputs=None), "fp8: its activations are in 16 bits, those of native fp8 in 8"),
        (compressed("group", group_size=32), "its scales are by group"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "it has scales of a KV cache"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "it has sparse weights"),
        (compressed(transform_config={"config_groups": {"u": {}}}), "it has transforms of its"),
    ],
)
def test_a_checkpoint_that_is_quantized_otherwise_is_not_ours(
    fields: dict[str, object], why: str
) -> None:
    spec = quantized(fields)
    own = spec.checkpoint_quantization
    assert own is not None
    assert own.format is not None
    said = why_not_native(spec, own.format, [device()])
    assert said is not None
    assert why in said
    plan = planned(spec)
    assert (plan.engine, plan.format, plan.runnable) == ("transformers", own.format.name, False)
    forced = planned(spec, engine="native")
    assert (forced.engine, forced.runnable, forced.not_runnable) == ("native", False, said)


@pytest.mark.parametrize(
    ("fields", "name", "note"),
    [
        (LLM_INT8, "int8", "activations stay in 16 bits, outliers or not"),
        (FBGEMM, "fp8", "activations are scaled token by token, and not bounded by input_scale_ub"),
        (BLOCK, "fp8-block", "activations stay in 16 bits"),
        (compressed(), "fp8", "held code for code as fp8"),
        (compressed("tensor"), "fp8", "held code for code as fp8"),
        (compressed("tensor", "static"), "fp8", "not by the checkpoint's static scales"),
        (compressed("block"), "fp8-block", "activations stay in 16 bits"),
        (compressed(kind="int"), "int8", "activations stay in 16 bits"),
        (compressed(sparsity_config={"format": "dense"}), "fp8", "held code for code as fp8"),
    ],
)
def test_a_checkpoint_of_8_bits_is_ours_in_a_format_that_has_its_codes(
    fields: dict[str, object], name: str, note: str
) -> None:
    spec = quantized(fields)
    plan = planned(spec)
    assert (plan.engine, plan.format, plan.runnable) == ("native", name, True)
    assert any(note in reason for reason in plan.reasons)
    linears = [tensor for tensor in spec.tensors if tensor.role is Role.LINEAR]
    weights = sum(held_format(name).stored_bytes(*tensor.shape) for tensor in linears)
    others = sum(2 * tensor.numel for tensor in spec.tensors if tensor.role is not Role.LINEAR)
    gaps = 256 * 3 * len(spec.tensors)
    assert 0 <= plan.devices[0].terms.weights - weights - others < gaps
    assert planned(spec, format=name) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.weight_format is held_format(name)


def test_fp8_with_a_scale_a_row_needs_the_hardware_and_blocks_do_not() -> None:
    old = device("cuda", (8, 0))
    for fields in (FBGEMM, compressed(), compressed("tensor", "static")):
        plan = planned(quantized(fields), old)
        assert (plan.format, plan.runnable) == ("fp8", False)
        assert plan.not_runnable == "fp8 needs compute capability 8.9, card 0 has 8.0"
    for fields in (BLOCK, compressed("block"), LLM_INT8):
        assert planned(quantized(fields), old).runnable
    turing = planned(quantized(BLOCK), device("cuda", (7, 5)))
    assert not turing.runnable


def test_what_the_native_engine_does_not_compute_stays_with_transformers() -> None:
    spec = quantized(LLM_INT8, "gemma2")
    plan = planned(spec)
    assert (plan.engine, plan.format, plan.runnable) == ("transformers", "llm-int8", True)
    with pytest.raises(InputError, match=r"its format is llm-int8, not int8"):
        planned(spec, format="int8")
    asked = planned(quantized(LLM_INT8), engine="transformers")
    assert (asked.format, asked.runnable) == ("llm-int8", True)


@pytest.mark.parametrize("fields", [compressed(kind="int"), LLM_INT8, BLOCK, FBGEMM])
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_hardware_is_looked_for_whatever_the_format_is_called_there(
    fields: dict[str, object], capability: tuple[int, int]
) -> None:
    spec = quantized(fields)
    plan = planned(spec, device("cuda", capability), what_would_it_take=True)
    assert plan.what_it_would_take


def test_nothing_is_quantized_into_a_format_that_only_checkpoints_come_in() -> None:
    with pytest.raises(InputError, match="unknown format 'fp8-block'"):
        planned("llama", format="fp8-block")


# --- what was asked for


@pytest.mark.parametrize(
    ("name", "format_name", "reason"),
    [
        ("gemma-2-9b", "nf4", NO_DECODER),
        ("mixtral-8x7b", "nf4-dq", NO_DECODER),
        ("llama-3.1-8b", "llm-int8", "the native engine does not hold llm-int8"),
    ],
)
def test_our_own_engine_asked_for_what_it_cannot_is_planned_and_not_run(
    name: str, format_name: str, reason: str
) -> None:
    machine = describe("2x80GiB", host=HOST)
    request = PlanRequest(format=format_name, engine="native", context=1024)
    plan = make_plan(known(name), machine, request)
    assert (plan.engine, plan.fits, plan.runnable) == ("native", True, False)
    assert plan.not_runnable == reason
    assert reason in plan.reasons
    assert all(device.terms.weights for device in plan.devices_in_use)
    auto = make_plan(known(name), machine, replace(request, engine="auto"))
    assert (auto.engine, auto.runnable) == ("transformers", True)


def test_latent_attention_is_run_by_neither() -> None:
    for engine in ("auto", *ENGINES):
        plan = planned("deepseek-v2", format="bf16", engine=engine)
        assert not plan.runnable
        assert "latent attention" in (plan.not_runnable or "")


@pytest.mark.parametrize("asked", ENGINES)
def test_the_engine_that_is_asked_for_is_taken(asked: str) -> None:
    for name in ("llama", "gemma2"):
        assert choose_engine(asked, known(name), FORMATS["bf16"], [device()]) == asked


@pytest.mark.parametrize("asked", ["", "vllm", "Native", "auto "])
def test_an_engine_that_there_is_not_is_refused_with_those_there_are(asked: str) -> None:
    with pytest.raises(InputError, match=rf"unknown engine '{asked}': use one of .*native, trans"):
        planned("llama", engine=asked)


def test_each_alternative_is_planned_for_the_engine_that_runs_it() -> None:
    """Of a family of ours on a card of ours all are; where one is old, none is."""
    for where, engine in ((device(), "native"), (device("cuda", (7, 5)), "transformers")):
        plan = planned("llama-3.1-8b", where)
        for other in plan.alternatives:
            alone = planned("llama-3.1-8b", where, format=other.format)
            assert (alone.engine, alone.runnable) == (engine, other.runnable)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_on_a_processor_bitsandbytes_takes_4_bits_unless_ours_is_needed(name: str) -> None:
    made = plan("tiny", gpus="cpu", format=name)
    assert made.engine == "transformers"
    assert any("--engine native asks for ours" in reason for reason in made.reasons)
    needed: tuple[dict[str, Any], ...] = (
        {"kv_format": "fp8"},
        {"compute_dtype": "float32"},
        {"engine": "native"},
    )
    for options in needed:
        assert plan("tiny", gpus="cpu", format=name, **options).engine == "native"
    assert plan("tiny", gpus="24GiB", format=name).engine == "native"
    assert plan("tiny", gpus="cpu", format="int8").engine == "native"


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_a_checkpoint_of_bitsandbytes_in_4_bits_is_ours(name: str) -> None:
    fields = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": name.removesuffix("-dq"),
        "bnb_4bit_use_double_quant": name.endswith("-dq"),
    }
    spec = spec_of(SMALL_CONFIGS["llama"] | {"quantization_config": fields})
    assert why_not_native(spec, FORMATS[name], [device()]) is None
    forced = planned(spec, engine="native")
    assert (forced.engine, forced.format, forced.runnable) == ("native", name, True)
