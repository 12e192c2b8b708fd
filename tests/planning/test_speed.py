"""Predicted tokens per second: bytes over bandwidth, never above the hardware's limit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import FORMATS, DType, get_format
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import DeviceSpec, HostSpec
from oomproof.memory.model import Demand, MemoryModel, WeightCosts
from oomproof.memory.profiles import engine_profile
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.planning.speed import (
    ATTENTION_BANDWIDTH_EFFICIENCY,
    CALIBRATIONS,
    HOP_S,
    SpeedModel,
    TokensPerSecond,
    calibration,
    host_link_bytes_per_s,
    load_seconds,
    predict_speed,
)
from oomproof.units import GIB

law = settings(derandomize=True, deadline=None, max_examples=40)
HOST = HostSpec(
    total_ram_bytes=64 * GIB, available_ram_bytes=60 * GIB, free_disk_bytes=None, cpu_count=8
)
engines = pytest.mark.parametrize("engine", ["native", "transformers"])
UNKNOWN = TokensPerSecond(decode=None, decode_total=None, prefill=None)


@cache
def known(name: str) -> ModelSpec:
    return resolve(name)


def gpu(
    index: int = 0, *, bandwidth: float | None = 2e12, flops: float | None = 3e14
) -> DeviceSpec:
    return DeviceSpec(
        index=index,
        name=f"GPU {index}",
        kind="cuda",
        total_bytes=80 * GIB,
        free_bytes=80 * GIB,
        bandwidth_bytes_per_s=bandwidth,
        flops_per_s=flops,
    )


@cache
def memory_model(
    name: str,
    format_name: str,
    context: int = 8192,
    concurrency: int = 1,
    engine: str = "transformers",
) -> MemoryModel:
    profile = engine_profile(engine, gpu(), HOST)
    costs = WeightCosts(known(name), FORMATS[format_name], profile, DType.BFLOAT16)
    demand = Demand(context=context, concurrency=concurrency, kv_dtype=DType.BFLOAT16)
    return MemoryModel(costs, demand)


def speed(
    name: str,
    format_name: str,
    *devices: DeviceSpec,
    engine: str = "transformers",
    **demand: int,
) -> TokensPerSecond:
    """Speed with the units spread evenly over the devices."""
    model = memory_model(name, format_name, engine=engine, **demand)
    bounds = [round(model.num_units * i / len(devices)) for i in range(len(devices) + 1)]
    return predict_speed(
        [
            (SpeedModel(engine, device, model), bounds[i], bounds[i + 1])
            for i, device in enumerate(devices)
        ]
    )


def planned(name: str, gpus: str, **options: Any) -> Plan:
    return make_plan(known(name), describe(gpus, host=HOST), PlanRequest(**options))


def test_efficiencies_are_shares_of_the_datasheet_and_dated() -> None:
    for (_, kind), each in CALIBRATIONS.items():
        assert 0 < each.bandwidth_efficiency <= 1
        # The datasheet's 16-bit FLOP/s; e4m3 has twice as many.
        assert 0 < each.flops_efficiency <= (2 if kind == "fp8" else 1)
        assert 0 < each.attention_flops_efficiency <= 1
        assert each.layer_overhead_s + each.added_overhead_s > 0
        assert each.batch_step_factor is None or each.batch_step_factor >= 1
        assert each.measured.startswith("20")


@pytest.mark.parametrize(
    ("engine", "format_name", "kind"),
    [
        ("transformers", "bf16", "16-bit"),
        ("transformers", "fp16", "16-bit"),
        ("transformers", "llm-int8", "llm-int8"),
        ("transformers", "nf4", "4-bit"),
        ("transformers", "nf4-dq", "4-bit"),
        ("transformers", "fp4", "4-bit"),
        ("native", "fp32", "16-bit"),
        ("native", "bf16", "16-bit"),
        ("native", "int8", "8-bit"),
        ("native", "fp8", "fp8"),
        ("native", "int4", "4-bit"),
        ("native", "nf4-dq", "4-bit"),
        ("native", "fp4", "4-bit"),
    ],
)
def test_a_format_takes_the_calibration_of_its_kind(
    engine: str, format_name: str, kind: str
) -> None:
    assert calibration(engine, get_format(format_name)) is CALIBRATIONS[engine, kind]


@engines
def test_every_format_has_a_calibration(engine: str) -> None:
    of_engine = [each for (name, _), each in CALIBRATIONS.items() if name == engine]
    for weight_format in FORMATS.values():
        assert calibration(engine, weight_format) in of_engine


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b"])
def test_our_own_engine_reads_the_half_of_the_context_that_is_used_and_copies_nothing(
    name: str,
) -> None:
    # So slow a memory that launches do not matter.
    found = speed(name, "bf16", gpu(bandwidth=1e10), context=4096, engine="native")
    model = memory_model(name, "bf16", 4096, engine="native")
    efficiency = CALIBRATIONS["native", "16-bit"].bandwidth_efficiency
    seconds = model.traffic_bytes() / efficiency
    seconds += model.kv_bytes() / 2 / ATTENTION_BANDWIDTH_EFFICIENCY
    assert found.decode == pytest.approx(1e10 / seconds, rel=0.005)


@pytest.mark.parametrize(("name", "copies"), [("llama-3.1-8b", 4), ("llama-2-7b", 1)])
def test_decode_reads_every_weight_once_and_copies_the_cache_to_each_query_head(
    name: str, copies: int
) -> None:
    # So slow a memory that launches do not matter.
    found = speed(name, "bf16", gpu(bandwidth=1e10), context=4096)
    model = memory_model(name, "bf16", 4096)
    cache = model.kv_bytes() * (1 if copies == 1 else 1 + 2 * copies)
    efficiency = CALIBRATIONS["transformers", "16-bit"].bandwidth_efficiency
    seconds = model.traffic_bytes() / efficiency + cache / ATTENTION_BANDWIDTH_EFFICIENCY
    assert found.decode == pytest.approx(1e10 / seconds, rel=0.005)


def test_decode_is_bound_by_launches_on_a_very_fast_memory() -> None:
    overhead_s = CALIBRATIONS["transformers", "4-bit"].layer_overhead_s
    found = speed("llama-3.1-8b", "nf4", gpu(bandwidth=1e18))
    assert found.decode == pytest.approx(1 / (34 * overhead_s), rel=0.005)


def test_a_short_prompt_of_a_small_model_is_bound_by_launches() -> None:
    measured = CALIBRATIONS["transformers", "4-bit"]
    found = speed("llama-3.2-1b", "nf4", gpu(flops=1e18), context=1024)
    assert found.prefill == pytest.approx(1024 / (18 * measured.chunk_overhead_s), rel=0.01)


def test_requests_take_turns_in_transformers_and_share_a_step_in_our_own_engine() -> None:
    for engine, requests in (("transformers", 8), ("transformers", 1), ("native", 1)):
        found = speed("llama-3.1-8b", "bf16", gpu(), concurrency=requests, engine=engine)
        assert found.decode_total == found.decode
    model = memory_model("llama-3.1-8b", "bf16", concurrency=8, engine="native")
    one = SpeedModel("native", gpu(), model)
    assert one.batch_step_factor is not None
    attention_s = sum(one.attention_s)
    assert 0 < attention_s < one.alone_s / 10
    step_s = one.batch_step_factor * (one.alone_s - attention_s) + 8 * attention_s
    found = speed("llama-3.1-8b", "bf16", gpu(), concurrency=8, engine="native")
    assert found.decode_total == pytest.approx(8 / step_s, rel=0.005)
    assert found.decode is not None
    assert found.decode_total is not None
    assert 4 * found.decode < found.decode_total < 8 * found.decode


def test_devices_in_a_row_take_turns() -> None:
    alone = speed("llama-3.1-8b", "bf16", gpu(bandwidth=1e10)).decode
    shared = speed("llama-3.1-8b", "bf16", gpu(bandwidth=1e10), gpu(1, bandwidth=1e10)).decode
    uneven = speed("llama-3.1-8b", "bf16", gpu(bandwidth=1e10), gpu(1, bandwidth=1e9)).decode
    assert alone == pytest.approx(shared, rel=0.01)
    assert uneven is not None
    assert alone is not None
    assert uneven < alone / 2


def test_a_split_model_pays_for_each_layer_and_each_hop() -> None:
    measured = CALIBRATIONS["transformers", "4-bit"]
    alone, shared = (
        speed("llama-3.1-8b", "nf4", *devices).decode
        for devices in ((gpu(bandwidth=1e18),), (gpu(bandwidth=1e18), gpu(1, bandwidth=1e18)))
    )
    assert alone is not None
    assert shared is not None
    assert 1 / shared - 1 / alone == pytest.approx(34 * measured.split_overhead_s + HOP_S, rel=0.05)


def test_waiting_for_streamed_weights_is_added_to_every_step_and_chunk() -> None:
    stage = (SpeedModel("transformers", gpu(), memory_model("llama-3.1-8b", "nf4")), 0, 34)
    quick, slow = predict_speed([stage]), predict_speed([stage], streaming_s=2.0)
    assert slow.decode == pytest.approx(0.5, rel=0.05)
    assert quick.prefill is not None
    assert slow.prefill is not None
    assert slow.prefill < quick.prefill


@pytest.mark.parametrize(
    ("device", "rate"),
    [
        (gpu(), 27.4e9),
        (replace(gpu(), compute_capability=(7, 5)), 13.7e9),
        (replace(gpu(), compute_capability=(8, 9)), 27.4e9),
        (replace(gpu(), compute_capability=(9, 0)), 54.8e9),
        (replace(gpu(), compute_capability=(9, 0), host_link_bytes_per_s=15.75e9), 13.7e9),
    ],
)
def test_the_host_link_is_the_probed_one_or_its_generations(
    device: DeviceSpec, rate: float
) -> None:
    assert host_link_bytes_per_s(device) == pytest.approx(rate, rel=0.01)


def test_loading_takes_the_time_of_the_checkpoints_bytes() -> None:
    found = load_seconds(known("llama-3.1-8b"), get_format("nf4-dq"), "transformers")
    rate = CALIBRATIONS["transformers", "4-bit"].load_bytes_per_s
    assert found == pytest.approx(16.06e9 / rate, rel=0.01)


@engines
def test_prefill_is_bound_by_flops(engine: str) -> None:
    found = speed("llama-3.1-8b", "bf16", gpu(flops=1e12), engine=engine)
    parameters = known("llama-3.1-8b").num_parameters - 128_256 * 4096
    measured = CALIBRATIONS[engine, "16-bit"]
    attention = 4 * 8192 * 4096 * 32 / measured.attention_flops_efficiency
    seconds = (2 * parameters / measured.flops_efficiency + attention) / 1e12
    assert found.prefill == pytest.approx(1 / seconds, rel=0.005)


def test_a_mixture_computes_only_the_experts_of_a_token() -> None:
    dense, mixture = (
        speed(name, "bf16", gpu(bandwidth=1e10, flops=1e12))
        for name in ("llama-2-70b", "mixtral-8x7b")
    )
    # 69 and 12.7 billion parameters for each token.
    for slow, fast in ((dense.decode, mixture.decode), (dense.prefill, mixture.prefill)):
        assert slow is not None
        assert fast is not None
        assert 4 < fast / slow < 7


@pytest.mark.parametrize("position", [0, 1])
def test_nothing_is_predicted_where_a_bandwidth_is_not_known(position: int) -> None:
    devices = [gpu(0), gpu(1)]
    devices[position] = replace(devices[position], bandwidth_bytes_per_s=None)
    assert speed("llama-3.1-8b", "bf16", *devices) == UNKNOWN
    assert planned("llama-3.1-8b", "24GiB").tokens_per_second == UNKNOWN


@pytest.mark.parametrize("position", [0, 1])
def test_only_decode_is_predicted_where_a_flop_rate_is_not_known(position: int) -> None:
    devices = [gpu(0), gpu(1)]
    devices[position] = replace(devices[position], flops_per_s=None)
    found = speed("llama-3.1-8b", "bf16", *devices)
    assert found.prefill is None
    assert found.decode == speed("llama-3.1-8b", "bf16", gpu(), gpu(1)).decode


@pytest.mark.parametrize(
    ("name", "format_name", "context", "decode", "prefill"),
    [
        # benchmarks/results/rehearsals-h200.jsonl
        ("llama-3.2-1b", "bf16", 8192, 92.7, 59_900),
        ("llama-3.2-3b", "bf16", 8192, 49.7, 29_900),
        ("llama-3.1-8b", "bf16", 8192, 44.3, 20_100),
        ("llama-3.1-8b", "nf4", 32_768, 31.5, 9_500),
        ("llama-3.1-8b", "nf4-dq", 4096, 41.3, 14_200),
        ("qwen2.5-14b", "nf4", 32_768, 17.8, 4_770),
        ("llama-3.1-8b", "llm-int8", 4096, 13.9, 6_160),
    ],
)
def test_the_h200_is_predicted_within_reach_of_what_it_measured(
    name: str, format_name: str, context: int, decode: float, prefill: float
) -> None:
    plan = planned(name, "H200", format=format_name, context=context, engine="transformers")
    assert plan.tokens_per_second.decode == pytest.approx(decode, rel=0.2)
    assert plan.tokens_per_second.prefill == pytest.approx(prefill, rel=0.25)


def test_figures_have_three_digits() -> None:
    found = speed("llama-3.1-8b", "bf16", gpu(bandwidth=1.2345e12))
    for value in (found.decode, found.decode_total, found.prefill):
        assert value is not None
        assert value == float(f"{value:.3g}")


@law
@given(
    name=st.sampled_from(["llama-3.1-8b", "llama-3.2-1b", "mixtral-8x7b", "gemma-2-9b"]),
    format_name=st.sampled_from(sorted(FORMATS)),
    context=st.integers(1, 8192),
    bandwidth=st.floats(1e9, 1e13),
    faster=st.floats(1, 100),
    concurrency=st.integers(1, 8),
    engine=st.sampled_from(["native", "transformers"]),
)
def test_speed_never_beats_the_memory_and_never_falls_with_faster_memory(
    name: str,
    format_name: str,
    context: int,
    bandwidth: float,
    faster: float,
    concurrency: int,
    engine: str,
) -> None:
    def at(bandwidth: float, context: int = context) -> float:
        device, demand = gpu(bandwidth=bandwidth), {"context": context, "concurrency": concurrency}
        found = speed(name, format_name, device, engine=engine, **demand)
        assert found.decode is not None
        assert found.decode_total is not None
        assert found.decode_total >= found.decode > 0
        assert found.decode_total <= 1.01 * concurrency * found.decode
        return found.decode

    model = memory_model(name, format_name, context, concurrency, engine)
    assert at(bandwidth) <= 1.01 * bandwidth / model.traffic_bytes()
    assert at(bandwidth) <= at(bandwidth * faster)
    assert at(bandwidth, context=8192) <= at(bandwidth)
