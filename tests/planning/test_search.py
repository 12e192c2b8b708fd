"""Which format, context and devices a plan chooses, why, and what it refuses to plan."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import InputError
from oomproof.formats import FORMATS, QUALITY_ORDER, DType
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import DeviceSpec, Hardware, HostSpec
from oomproof.memory.kv_cache import PAGE_TOKENS
from oomproof.memory.model import Demand, MemoryModel, WeightCosts
from oomproof.memory.profiles import engine_profile
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec
from oomproof.planning.explain import misfit, why_not_runnable
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.units import GIB, MIB, format_bytes
from tests.models.configs import SMALL_CONFIGS, spec_of

law = settings(derandomize=True, deadline=None, max_examples=40)
both = pytest.mark.parametrize("engine", ["native", "transformers"])
HOST = HostSpec(
    total_ram_bytes=64 * GIB, available_ram_bytes=60 * GIB, free_disk_bytes=None, cpu_count=8
)


@cache
def known(name: str) -> ModelSpec:
    return spec_of(SMALL_CONFIGS[name]) if name in SMALL_CONFIGS else resolve(name)


def planned(name: str, gpus: str, **options: Any) -> Plan:
    return make_plan(known(name), describe(gpus, host=HOST), PlanRequest(**options))


def machine(*free_bytes: int) -> Hardware:
    devices = describe(f"{len(free_bytes)}x24GiB", host=HOST).devices
    return Hardware(
        devices=tuple(
            replace(d, free_bytes=free) for d, free in zip(devices, free_bytes, strict=True)
        ),
        host=HOST,
        source="described",
    )


def least_shortfall(spec: ModelSpec, format_name: str, plan: Plan) -> int:
    """The fewest missing bytes on equal devices, by dynamic programming over terms()."""
    [usable] = {device.usable_bytes for device in plan.devices}
    device = describe("A100-80GB" if "A100" in plan.devices[0].name else "24GiB").devices[0]
    profile = engine_profile(plan.engine, device, HOST)
    costs = WeightCosts(spec, FORMATS[format_name], profile, DType.BFLOAT16)
    demand = Demand(context=plan.context, concurrency=1, kv_dtype=DType.BFLOAT16)
    model = MemoryModel(costs, demand)
    units = model.num_units
    excess = {
        (first, end): max(0, model.terms(first, end).peak_bytes - usable)
        for first in range(units + 1)
        for end in range(first, units + 1)
    }
    missing = [2**60] * units + [0]
    for _ in plan.devices:
        missing = [
            min(excess[first, end] + missing[end] for end in range(first, units + 1))
            for first in range(units + 1)
        ]
    return missing[0]


# --- the acid cases


@both
def test_405b_nf4_dq_fits_on_three_cards_of_80_gib(engine: str) -> None:
    plan = planned("llama-3.1-405b", "3x80GiB", format="nf4-dq", engine=engine)
    assert plan.fits
    weights = sum(device.terms.weights for device in plan.devices)
    assert weights / GIB == pytest.approx(200.8, abs=0.1)
    assert max(device.peak_bytes for device in plan.devices) < 75 * GIB
    assert plan.max_context >= 32_768
    assert planned("llama-3.1-405b", "3x80GiB", format="auto", engine=engine).format == "nf4"


@both
def test_70b_nf4_dq_fits_on_one_card_of_40_gib_with_a_short_context_only(engine: str) -> None:
    short = planned("llama-3.1-70b", "40GiB", format="nf4-dq", context=2048, engine=engine)
    assert short.fits
    assert short.devices[0].terms.weights / GIB == pytest.approx(36.8, abs=0.1)
    default = planned("llama-3.1-70b", "40GiB", format="nf4-dq", engine=engine)
    assert not default.fits
    assert 2048 <= default.max_context < 8192
    assert f"it would fit with --context {default.max_context}" in default.reasons


@both
def test_405b_nf4_dq_on_eight_cards_of_24_gib_misses_by_the_least_sum(engine: str) -> None:
    plan = planned("llama-3.1-405b", "8x24GiB", format="nf4-dq", engine=engine)
    assert (plan.fits, plan.max_context) == (False, 0)
    assert plan.shortfall_bytes == least_shortfall(known("llama-3.1-405b"), "nf4-dq", plan)


def test_8b_nf4_dq_leaves_seven_of_eight_cards_empty() -> None:
    plan = planned("llama-3.1-8b", "8x24GiB", format="nf4-dq")
    assert [device.index for device in plan.devices_in_use] == [0]
    assert {device.peak_bytes for device in plan.devices[1:]} == {0}
    assert {device.layers for device in plan.devices[1:]} == {None}


def test_405b_nf4_on_ten_cards_of_24_gib_does_not_fit_at_32k() -> None:
    plan = planned("llama-3.1-405b", "10x24GiB", format="nf4", context=32_768)
    assert not plan.fits
    assert max(device.terms.weights for device in plan.devices) / GIB <= 22.4
    assert sum(device.terms.weights for device in plan.devices) / GIB == pytest.approx(218.2, 0.001)


@both
def test_405b_bf16_on_eight_a100_misses_by_the_least_sum(engine: str) -> None:
    plan = planned("llama-3.1-405b", "8xA100-80GB", format="bf16", engine=engine)
    assert not plan.fits
    assert plan.shortfall_bytes == least_shortfall(known("llama-3.1-405b"), "bf16", plan)
    # 811.7 GB of weights alone are more than the cards have.
    usable = sum(device.usable_bytes for device in plan.devices)
    assert plan.shortfall_bytes > 811_700_000_000 - usable > 100 * GIB
    missing = format_bytes(plan.shortfall_bytes)
    said = f"bf16 does not fit: {missing} missing over 8 devices, "
    assert any(reason.startswith(said) for reason in plan.reasons)


def test_405b_nf4_dq_fits_on_four_a100() -> None:
    plan = planned("llama-3.1-405b", "4xA100-80GB", format="nf4-dq")
    assert plan.fits
    assert plan.runnable
    assert plan.max_context > 100_000


def test_nf4_leaves_90_gb_of_a_mixtures_experts_in_16_bits() -> None:
    plan = planned("mixtral-8x7b", "2x80GiB", format="nf4")
    weights = sum(device.terms.weights for device in plan.devices)
    assert 90e9 < weights < 93e9
    assert not planned("mixtral-8x7b", "80GiB", format="nf4").fits


# --- choices


TRIED = {
    "native": ["bf16", "int8", "fp8", "nf4", "nf4-dq"],
    "transformers": ["bf16", "int8", "llm-int8", "fp8", "nf4", "nf4-dq"],
}
"""Engine → what auto tries on a GPU that computes in bfloat16, best first."""


@both
def test_auto_takes_the_best_format_that_runs_and_fits_and_says_why_not_a_better_one(
    engine: str,
) -> None:
    def chosen(free_bytes: int) -> Plan:
        request = PlanRequest(context=2048, engine=engine)
        return make_plan(known("llama-3.1-8b"), machine(free_bytes), request)

    def needs(format_name: str) -> int:
        plan = planned("llama-3.1-8b", "80GiB", context=2048, engine=engine, format=format_name)
        return plan.devices[0].peak_bytes

    expected = {
        24 * GIB: "bf16",
        12 * GIB: {"native": "int8", "transformers": "llm-int8"}[engine],
        8 * GIB: "nf4",
        (needs("nf4") + needs("nf4-dq")) // 2: "nf4-dq",
        2 * GIB: "nf4-dq",
    }
    for free_bytes, format_name in expected.items():
        plan = chosen(free_bytes)
        assert plan.format == format_name, free_bytes
        better = TRIED[engine][: TRIED[engine].index(format_name)]
        explained = [reason.split()[0] for reason in plan.reasons]
        assert explained[: len(better)] == better
        assert plan.fits == (free_bytes > 2 * GIB)


@both
def test_auto_tries_what_its_engine_can_run(engine: str) -> None:
    plan = planned("llama-3.1-8b", "80GiB", engine=engine)
    assert [plan.format, *(other.format for other in plan.alternatives)] == TRIED[engine]
    runnable = {other.format: other.runnable for other in plan.alternatives}
    ours = engine == "native"
    assert (runnable["int8"], runnable["fp8"]) == (ours, ours)


def test_a_plan_lists_the_other_formats_with_what_they_miss() -> None:
    plan = planned("llama-3.1-8b", "12GiB")
    others = {other.format: other for other in plan.alternatives}
    assert plan.format not in others
    assert not others["bf16"].fits
    assert others["bf16"].shortfall_bytes > 3 * GIB
    assert others["nf4-dq"].fits
    assert others["nf4-dq"].shortfall_bytes == 0
    assert others["nf4-dq"].max_context > plan.max_context
    assert all(other.runnable for other in others.values())
    plan = planned("llama-3.1-8b", "A100-80GB")
    runnable = {other.format: other.runnable for other in plan.alternatives}
    assert runnable == {"int8": True, "fp8": False, "nf4": True, "nf4-dq": True}
    assert planned("llama-3.1-8b", "12GiB", format="nf4").alternatives == ()


@both
def test_each_alternative_is_what_a_plan_in_that_format_says(engine: str) -> None:
    for other in planned("llama-3.1-8b", "12GiB", engine=engine).alternatives:
        plan = planned("llama-3.1-8b", "12GiB", format=other.format, engine=engine)
        assert (other.fits, other.runnable, other.max_context, other.shortfall_bytes) == (
            plan.fits,
            plan.runnable,
            plan.max_context,
            plan.shortfall_bytes,
        )


def test_a_gpu_below_capability_8_0_computes_in_float16() -> None:
    plan = planned("llama-3.2-1b", "T4")
    assert (plan.format, plan.compute_dtype, plan.kv_format) == ("fp16", "float16", "fp16")
    assert planned("llama-3.1-8b", "T4", format="nf4").compute_dtype == "float16"
    assert "bf16" not in {other.format for other in plan.alternatives}


def test_the_oldest_gpu_decides_the_compute_dtype() -> None:
    plan = planned("llama-3.1-8b", "1xA100-80GB,1xT4")
    assert (plan.compute_dtype, plan.kv_format) == ("float16", "fp16")


def test_bf16_below_capability_8_0_is_not_runnable_and_says_why() -> None:
    plan = planned("llama-3.2-1b", "T4", format="bf16")
    assert not plan.runnable
    assert "bf16 needs compute capability 8.0, Tesla T4 has 7.5" in plan.reasons


@pytest.mark.parametrize("format_name", ["fp8", "int8", "int4", "fp32"])
def test_a_format_that_its_engine_does_not_run_is_planned_but_not_runnable(
    format_name: str,
) -> None:
    plan = planned("llama-3.1-8b", "H100", format=format_name, engine="transformers")
    assert (plan.fits, plan.runnable, plan.format) == (True, False, format_name)
    assert f"{format_name} is not run by the transformers engine on cuda" in plan.reasons
    ours = planned("llama-3.1-8b", "H100", format=format_name)
    assert (ours.fits, ours.runnable, ours.engine) == (True, True, "native")


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ("A100-80GB", "fp8 needs compute capability 8.9, NVIDIA A100-SXM4-80GB has 8.0"),
        ("RTX 3090", "fp8 needs compute capability 8.9, NVIDIA GeForce RTX 3090 has 8.6"),
        ("RTX 4090", None),
        ("H100", None),
        ("24GiB", None),
    ],
)
def test_an_engine_that_runs_fp8_needs_capability_8_9(gpu: str, reason: str | None) -> None:
    devices = describe(gpu, host=HOST).devices
    for engine in ("native", "transformers"):
        profiles = [
            replace(engine_profile(engine, device, HOST), formats=frozenset({"fp8"}))
            for device in devices
        ]
        found = why_not_runnable(
            known("llama-3.1-8b"), FORMATS["fp8"], "bf16", DType.BFLOAT16, profiles, devices
        )
        assert found == reason


def test_an_fp8_cache_is_kept_by_our_own_engine_and_not_by_transformers() -> None:
    ours = planned("llama-3.1-8b", "H100", format="bf16", kv_format="fp8")
    assert (ours.kv_format, ours.runnable, ours.engine) == ("fp8", True, "native")
    theirs = planned("llama-3.1-8b", "H100", format="bf16", kv_format="fp8", engine="transformers")
    assert (theirs.kv_format, theirs.runnable) == ("fp8", False)
    assert "a fp8 KV cache is not kept by the transformers engine" in theirs.reasons


@pytest.mark.parametrize("kv_format", ["fp16", "fp32"])
def test_a_cache_in_another_dtype_than_is_computed_in_is_run_by_our_own_engine_only(
    kv_format: str,
) -> None:
    ours = planned("llama-3.1-8b", "H100", format="bf16", kv_format=kv_format)
    assert (ours.kv_format, ours.compute_dtype, ours.runnable) == (kv_format, "bfloat16", True)
    theirs = planned(
        "llama-3.1-8b", "H100", format="bf16", kv_format=kv_format, engine="transformers"
    )
    assert not theirs.runnable
    said = {"fp16": "keeps its KV cache in the compute dtype", "fp32": "a fp32 KV cache is not"}
    assert any(said[kv_format] in reason for reason in theirs.reasons)


def test_4_bit_weights_that_bitsandbytes_serves_wrongly_on_a_cpu_are_not_runnable() -> None:
    request = PlanRequest(format="nf4", engine="transformers")
    host = replace(HOST, cpu_features=frozenset({"avx512_bf16"}))
    narrow = make_plan(known("llama"), describe("cpu", host=host), request)
    assert not narrow.runnable
    assert any("want weights of 32 × 64" in reason for reason in narrow.reasons)
    # Its down projection has 96 columns: no whole blocks of 64, with or without packing.
    unpacked = make_plan(known("llama"), describe("cpu", host=HOST), request)
    assert not unpacked.runnable
    assert make_plan(known("llama"), describe("24GiB"), request).runnable
    wide = make_plan(known("llama-3.2-1b"), describe("cpu", host=host), request)
    assert wide.runnable


@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq", "fp4", "int4", "int8", "fp8"])
def test_our_own_engine_quantizes_rows_of_any_length_on_a_cpu(format_name: str) -> None:
    for features in (frozenset[str](), frozenset({"avx512_bf16"})):
        host = replace(HOST, cpu_features=features)
        plan = make_plan(
            known("llama"), describe("cpu", host=host), PlanRequest(format=format_name)
        )
        assert (plan.engine, plan.fits, plan.runnable) == ("native", True, True)


@pytest.mark.parametrize("name", ["gemma-2-9b", "gpt-oss", "llama-3.1-8b"])
def test_attention_is_eager_only_where_no_fused_kernel_computes_it(name: str) -> None:
    plan = planned(name, "80GiB", format="bf16", engine="transformers")
    assert plan.attention == ("eager" if known(name).eager_attention else "sdpa")
    assert any(plan.attention in reason.lower() for reason in plan.reasons)


def test_attention_of_our_own_engine_is_paged() -> None:
    plan = planned("llama-3.1-8b", "80GiB", format="bf16")
    assert plan.attention == "paged"
    assert "attention is our own, over pages that are allocated at load" in plan.reasons


# --- contexts


def test_the_default_context_is_8192_or_the_models_maximum() -> None:
    assert planned("llama-3.1-8b", "24GiB").context == 8192
    assert planned("llama-2-7b", "24GiB").context == known("llama-2-7b").max_position_embeddings
    assert known("llama-2-7b").max_position_embeddings == 4096


def test_auto_context_is_the_largest_page_that_fits_in_the_format_of_the_default() -> None:
    plan = planned("llama-3.1-8b", "12GiB", context="auto")
    assert plan.format == planned("llama-3.1-8b", "12GiB").format
    assert plan.fits
    assert plan.context == plan.max_context
    assert plan.context % PAGE_TOKENS == 0
    beyond = planned("llama-3.1-8b", "12GiB", format=plan.format, context=plan.context + 1)
    assert not beyond.fits


def test_auto_context_ends_at_the_models_maximum() -> None:
    plan = planned("llama-3.1-8b", "80GiB", context="auto")
    assert plan.context == plan.max_context == 131_072
    odd = replace(known("llama"), max_position_embeddings=1000)
    plan = make_plan(odd, describe("24GiB", host=HOST), PlanRequest(context="auto"))
    assert plan.context == 1000


def test_auto_context_where_nothing_fits_is_the_default() -> None:
    plan = planned("llama-3.1-70b", "12GiB", context="auto")
    assert (plan.fits, plan.context, plan.max_context) == (False, 8192, 0)


def test_auto_context_where_only_a_short_one_fits_takes_it() -> None:
    plan = planned("llama-3.1-70b", "40GiB", context="auto")
    assert plan.fits
    assert plan.format == "nf4-dq"
    assert 256 <= plan.context == plan.max_context < 8192


def test_more_requests_at_once_leave_less_context() -> None:
    one = planned("llama-3.1-8b", "12GiB", format="nf4-dq")
    four = planned("llama-3.1-8b", "12GiB", format="nf4-dq", concurrency=4)
    assert four.max_context < one.max_context
    assert four.devices[0].terms.kv_cache == 4 * one.devices[0].terms.kv_cache


# --- refusals


def test_a_context_beyond_the_model_is_refused_with_its_maximum() -> None:
    with pytest.raises(InputError, match=r"context 131,073 is beyond .*: ask for at most 131,072"):
        planned("llama-3.1-8b", "80GiB", context=131_073)


@pytest.mark.parametrize("index", [1, 7, -1])
def test_a_limit_for_an_absent_device_is_refused_with_those_present(index: int) -> None:
    with pytest.raises(InputError, match=rf"device {index}: the devices here are \[0\]"):
        planned("llama-3.1-8b", "24GiB", max_memory={index: GIB})


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(InputError, match="unknown engine 'vllm'"):
        planned("llama-3.1-8b", "24GiB", engine="vllm")


def test_a_checkpoint_quantized_by_a_method_that_is_not_planned_is_refused() -> None:
    with pytest.raises(InputError, match=r"already quantized \(mxfp4\), .*: plan the 16-bit"):
        planned("gpt-oss-20b", "80GiB")


# --- limits


def test_reserve_limit_and_cap_reduce_what_is_usable() -> None:
    def usable(**options: Any) -> list[int]:
        plan = planned("llama-3.2-1b", "2x24GiB", **options)
        return [device.usable_bytes for device in plan.devices]

    assert usable() == [24 * GIB] * 2
    assert usable(reserve_bytes=GIB) == [23 * GIB] * 2
    assert usable(max_memory={1: 5 * GIB}) == [24 * GIB, 5 * GIB]
    assert usable(cap_bytes=7 * GIB) == [7 * GIB] * 2
    assert usable(reserve_bytes=GIB, max_memory={0: 30 * GIB}) == [23 * GIB] * 2
    assert usable(cap_bytes=7 * GIB, max_memory={0: 6 * GIB}) == [6 * GIB, 7 * GIB]
    assert usable(reserve_bytes=30 * GIB) == [0, 0]
    assert usable(cap_bytes=100 * GIB) == [24 * GIB] * 2


def test_a_limit_moves_the_model_to_another_device() -> None:
    plan = planned("llama-3.1-8b", "2x24GiB", format="bf16", max_memory={0: GIB})
    assert [device.index for device in plan.devices_in_use] == [1]


def test_a_cap_is_recorded_and_obeyed() -> None:
    plan = planned("llama-3.1-8b", "24GiB", cap_bytes=8 * GIB, context=1024)
    assert plan.cap_bytes == 8 * GIB
    assert plan.fits
    assert plan.devices[0].peak_bytes <= 8 * GIB


# --- hosts and downloads


def probed(available_ram_bytes: int) -> Hardware:
    host = replace(HOST, available_ram_bytes=available_ram_bytes)
    return replace(describe("24GiB", host=host), source="probed")


def test_a_described_machine_states_no_host_memory() -> None:
    assert planned("llama-3.1-8b", "24GiB").host.usable_bytes is None


def test_a_host_with_too_little_memory_does_not_fit_and_says_so() -> None:
    plan = make_plan(known("llama-3.1-8b"), probed(2 * GIB), PlanRequest(format="nf4-dq"))
    assert not plan.fits
    assert plan.host.usable_bytes == 2 * GIB
    assert plan.shortfall_bytes == plan.host.peak_bytes - 2 * GIB > 0
    assert any("host RAM" in reason for reason in plan.reasons)
    assert make_plan(known("llama-3.1-8b"), probed(8 * GIB), PlanRequest(format="nf4-dq")).fits


def test_llm_int8_takes_its_largest_tensor_through_host_memory() -> None:
    plan = planned("llama-3.1-8b", "24GiB", format="llm-int8")
    assert plan.host.terms.staging == 128_256 * 4096 * 2
    assert planned("llama-3.1-8b", "24GiB", format="nf4").host.terms.staging == 0


def test_a_processor_gives_the_process_its_own_memory_first() -> None:
    plan = planned("llama-3.2-1b", "cpu", format="bf16")
    [device] = plan.devices
    assert device.kind == "cpu"
    assert device.usable_bytes == HOST.available_ram_bytes - plan.host.peak_bytes
    assert device.terms.cuda_context == 0


def test_the_catalogs_download_is_estimated_from_its_parameters() -> None:
    assert planned("llama-3.1-8b", "24GiB").download_bytes == 8_030_261_248 * 2
    assert planned("tiny", "24GiB").download_bytes == 0


# --- reasons


def test_a_misfit_names_the_device_that_misses_most() -> None:
    plan = planned("llama-3.1-70b", "2x12GiB", format="nf4")
    terms = {device.index: device.terms for device in plan.devices}
    usable = {device.index: device.usable_bytes for device in plan.devices}
    text = misfit(terms, usable, {0: "GPU 0", 1: "GPU 1"})
    worst = max(plan.devices, key=lambda device: device.peak_bytes)
    assert text.endswith(f"of it on GPU {worst.index}")
    assert "missing over 2 devices" in text
    assert any(reason.startswith("nf4 does not fit: ") for reason in plan.reasons)


def test_a_misfit_of_one_device_says_what_it_needs_and_has() -> None:
    plan = planned("llama-3.1-70b", "12GiB", format="nf4")
    [reason] = [r for r in plan.reasons if r.startswith("nf4 does not fit")]
    assert "missing on GPU 0 (12.0 GiB GPU): needs " in reason
    assert reason.endswith("has 12.0 GiB")


# --- laws

NAMES = st.sampled_from(["llama-3.1-8b", "llama-3.2-1b", "gemma-2-9b", "mixtral-8x7b", "llama"])
ENGINE_NAMES = st.sampled_from(["auto", "native", "transformers"])
SIZES = st.lists(st.integers(512 * MIB, 60 * GIB), min_size=1, max_size=3)


@law
@given(NAMES, SIZES, st.sampled_from(["auto", *sorted(FORMATS)]), st.integers(1, 256), ENGINE_NAMES)
def test_a_plan_agrees_with_its_own_devices(
    name: str, sizes: list[int], format_name: str, context: int, engine: str
) -> None:
    request = PlanRequest(format=format_name, context=context, engine=engine)
    plan = make_plan(known(name), machine(*sizes), request)
    missing = [max(0, d.peak_bytes - d.usable_bytes) for d in plan.devices]
    assert plan.shortfall_bytes == sum(missing)
    assert plan.fits == (sum(missing) == 0)
    assert plan.max_context >= context if plan.fits else plan.max_context < PAGE_TOKENS
    layers = [
        layer
        for device in plan.devices_in_use
        if device.layers
        for layer in range(device.layers[0], device.layers[1] + 1)
    ]
    assert layers == list(range(known(name).num_hidden_layers))
    if not plan.fits:
        assert any("does not fit" in reason for reason in plan.reasons)


@law
@given(
    name=NAMES,
    sizes=SIZES,
    which=st.integers(0, 2),
    more=st.integers(0, 30 * GIB),
    extra=st.integers(0, 30 * GIB),
    engine=ENGINE_NAMES,
)
def test_more_memory_never_hurts(
    name: str, sizes: list[int], which: int, more: int, extra: int, engine: str
) -> None:
    grown = list(sizes)
    grown[which % len(sizes)] += more
    plans = [
        make_plan(known(name), machine(*each), PlanRequest(context=256, engine=engine))
        for each in (sizes, grown, [*sizes, extra])
    ]
    before, *after = plans
    for plan in after:
        assert plan.fits >= before.fits
        if not before.fits:
            assert plan.fits or plan.shortfall_bytes <= before.shortfall_bytes
            continue
        assert QUALITY_ORDER.index(plan.format) <= QUALITY_ORDER.index(before.format)
        if plan.format == before.format:
            assert plan.max_context >= before.max_context


@law
@given(
    name=NAMES,
    size=st.integers(3 * GIB, 60 * GIB),
    context=st.integers(1, 250),
    fewer=st.integers(0, 249),
    concurrency=st.integers(1, 32),
    engine=ENGINE_NAMES,
)
def test_what_fits_also_fits_when_less_is_asked(
    name: str, size: int, context: int, fewer: int, concurrency: int, engine: str
) -> None:
    def fits(context: int, concurrency: int) -> bool:
        request = PlanRequest(format="nf4", context=context, concurrency=concurrency, engine=engine)
        return make_plan(known(name), machine(size), request).fits

    if fits(context, concurrency):
        assert fits(max(1, context - fewer), concurrency)
        assert fits(context, 1)


def test_planning_twice_gives_the_same_plan() -> None:
    first, second = (planned("llama-3.1-70b", "2x24GiB,1x12GiB") for _ in range(2))
    assert first == second


def test_equal_devices_are_interchangeable() -> None:
    device = DeviceSpec(index=0, name="g", kind="cuda", total_bytes=9 * GIB, free_bytes=9 * GIB)
    ordered = [replace(device, index=i, free_bytes=f * GIB) for i, f in enumerate((9, 24, 9))]
    plan = make_plan(
        known("llama-3.1-8b"),
        Hardware(devices=tuple(ordered), host=HOST, source="described"),
        PlanRequest(format="bf16"),
    )
    assert plan.fits
    assert [d.index for d in plan.devices_in_use] == [1]
