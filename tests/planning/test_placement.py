"""Placement against brute force, and the laws of every placement."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations, combinations_with_replacement, pairwise, permutations
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import FORMATS, DType
from oomproof.hardware.spec import DeviceSpec, HostSpec
from oomproof.memory.model import Demand, MemoryModel, WeightCosts
from oomproof.memory.profiles import engine_profile
from oomproof.models.spec import ModelSpec
from oomproof.planning.placement import Placement, Slot, can_place, place_fastest, reach
from oomproof.planning.shortfall import least_shortfall
from oomproof.units import GIB, MIB
from tests.models.configs import SMALL_CONFIGS, small, spec_of

law = settings(derandomize=True, deadline=None, max_examples=60)
HOST = HostSpec(
    total_ram_bytes=64 * GIB, available_ram_bytes=60 * GIB, free_disk_bytes=None, cpu_count=8
)
HOP_S = 1e-6
CAPABILITIES = ((7, 5), (8, 0), (9, 0), None)


@cache
def wide(layers: int, tied: bool) -> ModelSpec:
    """A few layers of about 100 MiB, with an embedding of about 250."""
    return spec_of(
        small(
            "LlamaForCausalLM",
            "llama",
            hidden_size=2048,
            intermediate_size=7168,
            num_attention_heads=16,
            num_hidden_layers=layers,
            vocab_size=64_000,
            max_position_embeddings=65_536,
            tie_word_embeddings=tied,
        )
    )


@cache
def memory_model(
    config: str | tuple[int, bool],
    format_name: str,
    capability: tuple[int, int] | None,
    context: int,
) -> MemoryModel:
    spec = spec_of(SMALL_CONFIGS[config]) if isinstance(config, str) else wide(*config)
    device = DeviceSpec(
        index=0,
        name="GPU",
        kind="cuda",
        total_bytes=GIB,
        free_bytes=GIB,
        compute_capability=capability,
    )
    profile = engine_profile("transformers", device, HOST)
    costs = WeightCosts(spec, FORMATS[format_name], profile, DType.BFLOAT16)
    return MemoryModel(costs, Demand(context=context, concurrency=1, kv_dtype=DType.BFLOAT16))


def slot(
    index: int,
    usable_bytes: int,
    model: MemoryModel,
    *,
    capability: tuple[int, int] | None = None,
    bandwidth: float | None = None,
) -> Slot:
    device = DeviceSpec(
        index=index,
        name=f"GPU {index}",
        kind="cuda",
        total_bytes=usable_bytes,
        free_bytes=usable_bytes,
        compute_capability=capability,
        bandwidth_bytes_per_s=bandwidth,
    )
    seconds = tuple(
        model.traffic_bytes(unit, unit + 1) / (bandwidth or 1e12) for unit in range(model.num_units)
    )
    return Slot(
        device=device,
        usable_bytes=usable_bytes,
        model=model,
        unit_seconds=seconds,
        alone_seconds=sum(seconds),
        hop_seconds=HOP_S,
    )


def place(slots: list[Slot]) -> Placement:
    return place_fastest(slots) or least_shortfall(slots)


@st.composite
def machines(draw: st.DrawFn) -> list[Slot]:
    """One to four GPUs that together hold a model to the byte, miss it by one, or do not at all."""
    config = draw(
        st.sampled_from([(2, False), (5, True), (8, False), (8, True)])
        | st.sampled_from(["llama", "gemma2", "mixtral", "gemma3-multimodal", "qwen2-moe"])
    )
    format_name = draw(st.sampled_from(["bf16", "nf4", "nf4-dq", "llm-int8"]))
    context = draw(st.sampled_from([1, 256, 4096, 60_000]))
    num_units = memory_model(config, format_name, None, context).num_units
    count = draw(st.sampled_from([1, 2, 2, 3, 3, 4]))
    cuts = draw(st.lists(st.integers(0, num_units), min_size=count - 1, max_size=count - 1))
    ranges = draw(st.permutations(list(pairwise((0, *sorted(cuts), num_units)))))
    slots = []
    for index, held in enumerate(ranges):
        capability = draw(st.sampled_from(CAPABILITIES))
        model = memory_model(config, format_name, capability, context)
        near = model.terms(*held).peak_bytes + draw(st.sampled_from([-1, 0, 0, 0, 1, MIB]))
        usable = draw(st.sampled_from([near] * 5) | st.integers(0, 4 * GIB))
        slots.append(slot(index, max(0, usable), model, capability=capability))
    return slots


def brute_force(slots: list[Slot]) -> int:
    """The least sum of missing bytes over every order of the devices and every split."""
    num_units = slots[0].model.num_units
    missing = {
        (each.device.index, first, end): max(
            0, each.model.terms(first, end).peak_bytes - each.usable_bytes
        )
        for each in slots
        for first in range(num_units + 1)
        for end in range(first, num_units + 1)
    }
    indexes = [each.device.index for each in slots]
    cuts = list(combinations_with_replacement(range(num_units + 1), len(slots) - 1))
    return min(
        sum(
            missing[index, first, end]
            for index, (first, end) in zip(order, pairwise((0, *cut, num_units)), strict=True)
        )
        for order in permutations(indexes)
        for cut in cuts
    )


def fastest(slots: list[Slot]) -> float:
    """The least time of a decode step over every order and every split that fits; inf for none."""
    num_units = slots[0].model.num_units
    best = inf
    for count in range(1, len(slots) + 1):
        for order in permutations(slots, count):
            for cuts in combinations(range(1, num_units), count - 1):
                ranges = list(pairwise((0, *cuts, num_units)))
                held = list(zip(order, ranges, strict=True))
                if all(
                    each.model.terms(*part).peak_bytes <= each.usable_bytes for each, part in held
                ):
                    best = min(best, seconds_of(held))
    return best


def seconds_of(held: Sequence[tuple[Slot, tuple[int, int]]]) -> float:
    if len(held) == 1:
        return held[0][0].alone_seconds
    hops = sum(each.hop_seconds for each, _ in held[1:])
    return hops + sum(sum(each.unit_seconds[first:end]) for each, (first, end) in held)


def missing_bytes(placement: Placement, slots: list[Slot]) -> int:
    by_index = {each.device.index: each for each in slots}
    return sum(
        max(0, by_index[i].model.terms(*held).peak_bytes - by_index[i].usable_bytes)
        for i, held in placement.ranges.items()
    )


def assert_ranges_cover_the_model_in_order(placement: Placement, slots: list[Slot]) -> None:
    held = list(placement.ranges.values())
    assert held[0][0] == 0
    assert held[-1][1] == slots[0].model.num_units
    assert all(first < end for first, end in held)
    assert all(before[1] == after[0] for before, after in pairwise(held))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(machines())
def test_feasibility_and_least_shortfall_equal_brute_force(slots: list[Slot]) -> None:
    expected = brute_force(slots)
    found = place(slots)
    assert can_place(slots) == (expected == 0)
    assert found.shortfall_bytes == expected
    assert found.fits == (expected == 0)
    assert missing_bytes(found, slots) == expected
    assert_ranges_cover_the_model_in_order(found, slots)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(machines(), st.lists(st.sampled_from([1e11, 4e11, 1e12]), min_size=4, max_size=4))
def test_the_placement_is_the_fastest_that_fits(slots: list[Slot], bandwidths: list[float]) -> None:
    slots = [
        slot(each.device.index, each.usable_bytes, each.model, bandwidth=bandwidth)
        for each, bandwidth in zip(slots[:3], bandwidths[: len(slots[:3])], strict=True)
    ]
    found = place_fastest(slots)
    expected = fastest(slots)
    assert (found is None) == (expected == inf)
    if found is not None:
        by_index = {each.device.index: each for each in slots}
        held = [(by_index[index], part) for index, part in found.ranges.items()]
        assert seconds_of(held) == pytest.approx(expected, rel=1e-8)
        assert missing_bytes(found, slots) == 0
        assert_ranges_cover_the_model_in_order(found, slots)


def test_a_slower_device_takes_no_more_than_the_faster_one_leaves() -> None:
    model = memory_model((8, False), "bf16", None, 4096)
    large = model.terms(0, 9).peak_bytes
    slots = [slot(0, large, model, bandwidth=4e11), slot(1, large, model, bandwidth=2e12)]
    found = place(slots)
    assert {index: end - first for index, (first, end) in found.ranges.items()}[1] == 9


@law
@given(machines())
def test_what_fits_uses_the_fewest_devices(slots: list[Slot]) -> None:
    found = place(slots)
    if not found.fits:
        return
    fewer = len(found.ranges) - 1
    if fewer:
        for subset in combinations(slots, fewer):
            assert brute_force(list(subset)) > 0


@law
@given(machines(), st.integers(0, 3), st.integers(0, GIB))
def test_what_fits_still_fits_with_more_memory_or_more_devices(
    slots: list[Slot], which: int, more: int
) -> None:
    if not can_place(slots):
        return
    grown = slots[which % len(slots)]
    larger = slot(grown.device.index, grown.usable_bytes + more, grown.model)
    assert can_place([larger if each is grown else each for each in slots])
    assert can_place([*slots, slot(9, more, grown.model)])


@law
@given(machines())
def test_the_order_in_which_devices_are_named_does_not_change_what_fits(
    slots: list[Slot],
) -> None:
    forwards, backwards = place(slots), place(slots[::-1])
    assert forwards.shortfall_bytes == backwards.shortfall_bytes
    assert forwards.fits == backwards.fits
    if forwards.fits:
        assert len(forwards.ranges) == len(backwards.ranges)


@law
@given(machines(), st.integers(0, 9))
def test_reach_is_the_furthest_range_that_fits(slots: list[Slot], first: int) -> None:
    each = slots[0]
    first %= each.model.num_units
    fitting = [
        end
        for end in range(first + 1, each.model.num_units + 1)
        if each.model.terms(first, end).peak_bytes <= each.usable_bytes
    ]
    assert reach(each, first) == max(fitting, default=first)


def test_reach_leaves_the_room_that_is_asked_for() -> None:
    model = memory_model((8, False), "bf16", None, 4096)
    peak = model.terms(0, 4).peak_bytes
    assert reach(slot(0, peak, model), 0) == 4
    assert reach(slot(0, peak, model), 0, room=1) == 3
    assert reach(slot(0, peak + MIB, model), 0, room=MIB) == 4
    assert reach(slot(0, peak, model), 0, room=2 * peak) == 0


def test_a_device_that_holds_the_whole_model_needs_no_room_for_neighbours() -> None:
    model = memory_model("llama", "bf16", None, 256)
    alone = model.terms(0, model.num_units).peak_bytes
    assert model.terms(0, model.num_units - 1).peak_bytes > alone
    found = place([slot(0, alone, model)])
    assert found.fits
    assert found.ranges == {0: (0, model.num_units)}


def test_one_device_is_used_where_one_is_enough() -> None:
    model = memory_model((8, False), "nf4-dq", None, 4096)
    found = place([slot(index, 24 * GIB, model) for index in range(8)])
    assert found.ranges == {0: (0, 10)}


def test_the_fastest_of_the_devices_that_are_enough_is_used() -> None:
    model = memory_model((8, False), "nf4-dq", None, 4096)
    slots = [slot(i, 24 * GIB, model, bandwidth=b) for i, b in enumerate((4e11, 2e12, 1e12))]
    assert place(slots).ranges == {1: (0, 10)}


def test_equal_devices_are_filled_evenly() -> None:
    model = memory_model((8, False), "bf16", None, 4096)
    alone = model.terms(0, 10).peak_bytes
    found = place([slot(index, alone - 1, model) for index in range(2)])
    peaks = [model.terms(*held).peak_bytes for held in found.ranges.values()]
    assert len(peaks) == 2
    layer = model.terms(1, 3).peak_bytes - model.terms(1, 2).peak_bytes
    assert abs(peaks[0] - peaks[1]) <= max(layer, model.weights_bytes(0, 1))


def test_what_does_not_fit_is_spread_over_equal_devices() -> None:
    model = memory_model((8, False), "bf16", None, 4096)
    slots = [slot(index, 1600 * MIB, model) for index in range(3)]
    found = place(slots)
    assert not found.fits
    assert len(found.ranges) == 3
    assert found.shortfall_bytes == missing_bytes(found, slots) == brute_force(slots)


def test_a_small_device_may_stand_anywhere_in_the_order() -> None:
    model = memory_model((8, False), "bf16", None, 4096)
    ends = [(0, 4), (4, 6), (6, 10)]
    for order in permutations(range(3)):
        slots = [
            slot(index, model.terms(*held).peak_bytes, model)
            for index, held in zip(order, ends, strict=True)
        ]
        assert place(slots).fits


@pytest.mark.parametrize("usable_bytes", [0, 1])
def test_a_machine_without_memory_misses_the_whole_peak(usable_bytes: int) -> None:
    model = memory_model("llama", "bf16", None, 256)
    found = place([slot(0, usable_bytes, model)])
    assert found.shortfall_bytes == model.terms(0, model.num_units).peak_bytes - usable_bytes
