"""The cases that other planners get wrong, and the laws that every plan obeys."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import InputError
from oomproof.formats import DType, get_format
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.model import Demand, MemoryModel, WeightCosts
from oomproof.memory.profiles import QUANTIZED_ROLES, engine_profile
from oomproof.memory.weights import stored
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.placement import Slot, can_place, place_fastest
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.planning.shortfall import least_shortfall
from oomproof.units import GIB

GB = 10**9

both = pytest.mark.parametrize("engine", ["native", "transformers"])


@cache
def spec_of(name: str) -> ModelSpec:
    return resolve(name)


def planned(name: str, gpus: str, **options: Any) -> Plan:
    return make_plan(spec_of(name), describe(gpus), PlanRequest(**options))


def weights_bytes(name: str, format_name: str) -> int:
    roles = QUANTIZED_ROLES["transformers"]
    chosen = get_format(format_name)
    return sum(
        stored(tensor, chosen, DType.BFLOAT16, roles).stored_bytes
        for tensor in spec_of(name).tensors
    )


@pytest.mark.parametrize(
    ("name", "bf16", "nf4", "nf4_dq"),
    [
        ("llama-3.1-8b", 16.06, 6.03, 5.70),
        ("llama-3.1-70b", 141.1, 42.7, 39.5),
        ("llama-3.1-405b", 811.7, 234.3, 215.6),
    ],
)
def test_weights_are_those_the_field_measured(
    name: str, bf16: float, nf4: float, nf4_dq: float
) -> None:
    """Decimal GB, embedding and head in bf16."""
    for format_name, expected in (("bf16", bf16), ("nf4", nf4), ("nf4-dq", nf4_dq)):
        assert weights_bytes(name, format_name) / GB == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize(
    ("name", "per_token"),
    [("llama-3.1-8b", 131_072), ("llama-3.1-70b", 327_680), ("llama-3.1-405b", 516_096)],
)
def test_the_kv_cache_of_a_token_is_exact(name: str, per_token: int) -> None:
    # transformers' static caches keep a counter a layer besides; our pages hold nothing else.
    counters = 512 * spec_of(name).num_hidden_layers
    for engine, besides in (("native", 0), ("transformers", counters)):
        plan = planned(name, "16x192GiB", format="bf16", context=131_072, engine=engine)
        kv_cache = sum(device.terms.kv_cache for device in plan.devices)
        assert kv_cache == per_token * 131_072 + besides


def test_an_fp8_cache_takes_half_of_it_and_is_kept_on_any_gpu_of_ours() -> None:
    for gpu in ("A100-80GB", "RTX 3090", "H100"):
        wide, narrow = (
            planned("llama-3.1-8b", gpu, format="nf4", kv_format=kv).devices[0].terms.kv_cache
            for kv in ("bf16", "fp8")
        )
        assert wide == 2 * narrow == 131_072 * 8192
        assert planned("llama-3.1-8b", gpu, format="nf4", kv_format="fp8").runnable


def test_405b_nf4_dq_weights_are_200_8_gib() -> None:
    assert weights_bytes("llama-3.1-405b", "nf4-dq") / GIB == pytest.approx(200.8, abs=0.1)


@both
def test_405b_nf4_dq_fits_on_three_cards_of_80_gib(engine: str) -> None:
    plan = planned("llama-3.1-405b", "3x80GiB", format="nf4-dq", engine=engine)
    assert plan.fits
    assert plan.pipeline == 3
    assert plan.max_context >= 8192


@both
def test_70b_nf4_dq_fits_on_one_card_of_40_gib_with_a_short_context(engine: str) -> None:
    plan = planned("llama-3.1-70b", "40GiB", format="nf4-dq", context=2048, engine=engine)
    assert plan.fits
    assert 2048 <= plan.max_context < 131_072


@both
def test_405b_nf4_dq_does_not_fit_on_eight_cards_of_24_gib(engine: str) -> None:
    plan = planned("llama-3.1-405b", "8x24GiB", format="nf4-dq", engine=engine)
    assert not plan.fits
    needs = sum(device.peak_bytes for device in plan.devices)
    assert plan.shortfall_bytes >= needs - 8 * 24 * GIB > 0


@both
def test_8b_nf4_dq_needs_one_of_eight_cards(engine: str) -> None:
    plan = planned("llama-3.1-8b", "8x24GiB", format="nf4-dq", engine=engine)
    assert plan.fits
    assert [d.index for d in plan.devices_in_use] == [0]


@both
def test_405b_bf16_misses_on_eight_a100_by_the_right_number_of_bytes(engine: str) -> None:
    plan = planned("llama-3.1-405b", "8xA100-80GB", format="bf16", engine=engine)
    assert not plan.fits
    usable = sum(device.usable_bytes for device in plan.devices)
    needs = sum(device.peak_bytes for device in plan.devices)
    assert plan.shortfall_bytes == needs - usable
    assert needs > weights_bytes("llama-3.1-405b", "bf16")


@both
def test_405b_nf4_dq_fits_on_four_a100_with_a_largest_context(engine: str) -> None:
    plan = planned("llama-3.1-405b", "4xA100-80GB", format="nf4-dq", engine=engine)
    assert plan.fits
    assert plan.max_context % 256 == 0
    assert planned(
        "llama-3.1-405b", "4xA100-80GB", format="nf4-dq", context=plan.max_context, engine=engine
    ).fits


@both
def test_unequal_cards_each_stay_below_their_own_limit(engine: str) -> None:
    plan = planned(
        "llama-3.1-70b", "2x24GiB,1x12GiB", format="nf4-dq", context=16_384, engine=engine
    )
    assert plan.fits
    for device in plan.devices:
        assert device.peak_bytes <= device.usable_bytes


def test_a_mixture_counts_its_experts_in_16_bits() -> None:
    experts = sum(t.numel for t in spec_of("mixtral-8x7b").tensors if t.role is Role.EXPERTS)
    assert weights_bytes("mixtral-8x7b", "nf4") > 2 * experts > 90 * GB


def test_auto_takes_the_best_format_that_fits_and_says_why_not_a_better_one() -> None:
    plan = planned("llama-3.1-8b", "12GiB")
    assert (plan.format, plan.engine) == ("int8", "native")
    assert [reason.split()[0] for reason in plan.reasons if "does not fit" in reason] == ["bf16"]
    plan = planned("llama-3.1-8b", "12GiB", engine="transformers")
    assert (plan.format, plan.engine) == ("llm-int8", "transformers")
    assert any(reason.startswith("bf16 does not fit") for reason in plan.reasons)
    assert any(reason.startswith("int8 would fit, but") for reason in plan.reasons)


@both
def test_auto_context_is_the_largest_that_fits(engine: str) -> None:
    plan = planned("llama-3.1-8b", "12GiB", format="nf4-dq", context="auto", engine=engine)
    assert plan.context == plan.max_context
    beyond = plan.context + 256
    assert not planned("llama-3.1-8b", "12GiB", format="nf4-dq", context=beyond, engine=engine).fits


def test_fp8_below_its_capability_is_refused_with_the_reason() -> None:
    plan = planned("llama-3.1-8b", "A100-80GB", format="fp8")
    assert not plan.runnable
    assert plan.not_runnable in plan.reasons
    assert plan.not_runnable == ("fp8 needs compute capability 8.9, NVIDIA A100-SXM4-80GB has 8.0")
    assert planned("llama-3.1-8b", "RTX 4090", format="fp8").runnable


def test_a_gpu_without_bfloat16_computes_in_float16() -> None:
    plan = planned("llama-3.2-1b", "T4")
    assert (plan.format, plan.compute_dtype, plan.kv_format) == ("fp16", "float16", "fp16")


def test_limits_reduce_what_is_usable() -> None:
    plain = planned("tiny", "24GiB").devices[0].usable_bytes
    assert planned("tiny", "24GiB", reserve_bytes=GIB).devices[0].usable_bytes == plain - GIB
    assert planned("tiny", "24GiB", max_memory={0: GIB}).devices[0].usable_bytes == GIB
    capped = planned("tiny", "24GiB", cap_bytes=2 * GIB)
    assert (capped.devices[0].usable_bytes, capped.cap_bytes) == (2 * GIB, 2 * GIB)
    with pytest.raises(InputError, match="device 3"):
        planned("tiny", "24GiB", max_memory={3: GIB})


def test_the_json_has_the_promised_keys_and_comes_back_equal() -> None:
    plan = planned("llama-3.1-70b", "2x24GiB,1x12GiB", format="nf4-dq")
    plain = plan.as_dict()
    promised = {
        "model", "format", "fits", "context", "concurrency", "max_context", "runnable", "engine",
        "compute_dtype", "attention", "kv_format", "devices", "host", "shortfall_bytes",
        "alternatives", "download_bytes", "tokens_per_second", "reasons",
    }  # fmt: skip
    assert promised <= plain.keys()
    assert {"index", "name", "usable_bytes", "peak_bytes", "layers", "terms"} <= plain["devices"][
        0
    ].keys()
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(InputError, match="context"):
        Plan.from_json(plan.to_json().replace('"context": 8192', '"context": "many"'))


def test_a_device_map_names_every_layer_once() -> None:
    plan = planned(
        "llama-3.1-70b",
        "2x24GiB,1x12GiB",
        format="nf4-dq",
        context=16_384,
        engine="transformers",
    )
    placed = plan.to_transformers()["device_map"]
    layers = {f"model.layers.{i}" for i in range(80)}
    assert layers <= placed.keys()
    assert placed["model.embed_tokens"] == placed["model.layers.0"]
    assert placed["lm_head"] == placed["model.norm"] == placed["model.layers.79"]


def test_a_tied_head_stays_with_the_embedding() -> None:
    plan = planned(
        "llama-3.2-3b", "1x4GiB,1x5GiB", format="bf16", context=1024, engine="transformers"
    )
    assert plan.pipeline == 2
    placed = plan.to_transformers()["device_map"]
    assert placed["lm_head"] == placed["model.embed_tokens"]


@settings(max_examples=40, deadline=None)
@given(
    engine=st.sampled_from(["native", "transformers"]),
    context=st.integers(1, 120_000),
    more=st.integers(0, 10_000),
    concurrency=st.integers(1, 8),
    gibibytes=st.integers(4, 90),
)
def test_bytes_never_fall_as_more_is_asked_and_more_memory_never_hurts(
    engine: str, context: int, more: int, concurrency: int, gibibytes: int
) -> None:
    def on(gibibytes: int, name: str, context: int, concurrency: int = 1) -> Plan:
        return planned(
            "llama-3.1-8b",
            f"{gibibytes}GiB",
            format=name,
            context=context,
            concurrency=concurrency,
            engine=engine,
        )

    def peak(context: int, concurrency: int, name: str) -> int:
        return on(400, name, context, concurrency).devices[0].peak_bytes

    assert peak(context, concurrency, "nf4") <= peak(context + more, concurrency, "nf4")
    assert peak(context, concurrency, "nf4") <= peak(context, concurrency + 1, "nf4")
    assert peak(context, 1, "nf4-dq") <= peak(context, 1, "nf4") <= peak(context, 1, "int8")
    if on(gibibytes, "nf4", context).fits:
        assert on(gibibytes + 1, "nf4", context).fits


def _slots(spec: ModelSpec, sizes: list[int], engine: str) -> list[Slot]:
    hardware = describe(",".join(["1x24GiB"] * len(sizes)))
    slots = []
    for device, size in zip(hardware.devices, sizes, strict=True):
        profile = engine_profile(engine, device, hardware.host)
        costs = WeightCosts(spec, get_format("nf4"), profile, DType.BFLOAT16)
        demand = Demand(context=512, concurrency=1, kv_dtype=DType.BFLOAT16)
        slots.append(_slot(device, size, MemoryModel(costs, demand)))
    return slots


def _slot(device: DeviceSpec, size: int, model: MemoryModel) -> Slot:
    return Slot(device=device, usable_bytes=size, model=model)


def _brute_force(slots: list[Slot]) -> int:
    """The least sum of missing bytes over every order of devices and every split."""
    num_units = slots[0].model.num_units

    def best(order: tuple[Slot, ...], first: int) -> int:
        if first == num_units:
            return 0
        if not order:
            return 2**62
        slot, *rest = order
        totals = [best(tuple(rest), first)]
        for end in range(first + 1, num_units + 1):
            peak = slot.model.terms(first, end).peak_bytes
            totals.append(max(0, peak - slot.usable_bytes) + best(tuple(rest), end))
        return min(totals)

    return min(best(order, 0) for order in permutations(slots))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["native", "transformers"]),
    st.lists(st.integers(900, 2600), min_size=1, max_size=3),
)
def test_placement_equals_brute_force_on_small_cases(engine: str, mebibytes: list[int]) -> None:
    spec = _small_llama()
    slots = _slots(spec, [size * 2**20 for size in mebibytes], engine)
    expected = _brute_force(slots)
    found = place_fastest(slots) or least_shortfall(slots)
    assert can_place(slots) == (expected == 0)
    assert found.shortfall_bytes == expected
    held = sorted(found.ranges.values())
    assert held[0][0] == 0
    assert held[-1][1] == slots[0].model.num_units
    assert all(a[1] == b[0] for a, b in pairwise(held))


@cache
def _small_llama() -> ModelSpec:
    from oomproof.models.architectures import build_spec
    from oomproof.models.catalog import find

    entry = find("llama-3.2-1b")
    assert entry is not None
    config = dict(entry.config) | {"num_hidden_layers": 4, "tie_word_embeddings": False}
    return build_spec(config, id="small", source=spec_of("tiny").source, file="config.json")


@both
def test_every_range_costs_what_its_terms_say(engine: str) -> None:
    [slot] = _slots(_small_llama(), [2**40], engine)
    model = slot.model
    for first in range(model.num_units):
        for end, peak in enumerate(model.peaks_from(first), first + 1):
            assert peak == model.terms(first, end).peak_bytes
