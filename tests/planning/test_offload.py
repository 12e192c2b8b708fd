"""Layers in host memory: what fits then, what it costs, and what it never does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from oomproof.errors import InputError
from oomproof.hardware.describe import describe
from oomproof.models.resolve import resolve
from oomproof.planning.explain import NOT_STREAMED
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.planning.speed import MIN_TOKENS_PER_SECOND
from oomproof.session import plan as plan_here
from oomproof.units import GIB


def planned(name: str, gpus: str, **options: Any) -> Plan:
    return make_plan(resolve(name), describe(gpus), PlanRequest(**options))


def test_405b_on_eight_cards_of_24_gib_fits_with_layers_in_host_memory_at_a_price() -> None:
    refused = planned("llama-3.1-405b", "8x24GiB", format="nf4-dq")
    assert not refused.fits
    assert any("--offload cpu would fit" in reason for reason in refused.reasons)
    plan = planned("llama-3.1-405b", "8x24GiB", format="nf4-dq", offload="cpu")
    assert plan.fits
    assert plan.offload == "cpu"
    # What is missing without it, and two buffers where layers are streamed, in whole layers.
    layer = 1.65 * GIB
    offloaded = plan.host.terms.offloaded
    assert refused.shortfall_bytes < offloaded < refused.shortfall_bytes + 8 * layer
    assert all(device.peak_bytes <= device.usable_bytes for device in plan.devices)
    assert plan.runnable
    assert plan.refused is not None
    assert "under 1" in plan.refused


def test_layers_in_host_memory_are_priced_for_transformers_and_not_run() -> None:
    plan = planned("llama-3.1-70b", "24GiB", format="nf4-dq", offload="cpu", engine="transformers")
    assert (plan.fits, plan.offload, plan.runnable) == (True, "cpu", False)
    assert plan.not_runnable == NOT_STREAMED
    assert NOT_STREAMED in plan.reasons
    ours = planned("llama-3.1-70b", "24GiB", format="nf4-dq", offload="cpu")
    assert (ours.offload, ours.engine, ours.not_runnable) == ("cpu", "native", None)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("llama-3.1-70b", {"format": "fp8"}, "fp8 needs compute capability 8.9"),
        ("gemma-2-27b", {"format": "bf16", "engine": "native"}, "no decoder of this family"),
    ],
)
def test_streaming_makes_nothing_runnable_that_is_not_without_it(
    name: str, options: dict[str, str], said: str
) -> None:
    plan = planned(name, "1x RTX 3090", offload="cpu", context=1024, **options)
    assert (plan.fits, plan.offload, plan.runnable) == (True, "cpu", False)
    assert said in (plan.not_runnable or "")


def test_force_accepts_a_slow_plan_and_nothing_that_does_not_fit() -> None:
    slow = planned("llama-3.1-405b", "8x24GiB", format="nf4-dq", offload="cpu", force=True)
    assert slow.fits
    assert slow.refused is None
    none = planned("llama-3.1-405b", "1x1GiB", format="nf4-dq", offload="cpu", force=True)
    assert not none.fits
    assert none.shortfall_bytes > 0


def test_what_fits_is_never_streamed() -> None:
    with_offload = planned("llama-3.1-8b", "24GiB", offload="cpu")
    assert with_offload == planned("llama-3.1-8b", "24GiB")
    assert with_offload.offload == "none"


def test_nothing_is_streamed_unless_it_is_asked_for() -> None:
    plan = planned("llama-3.1-70b", "24GiB", format="nf4-dq")
    assert not plan.fits
    assert plan.offload == "none"
    assert plan.host.terms.offloaded == 0
    assert all(device.streamed_layers is None for device in plan.devices)


def test_the_terms_say_what_is_resident_and_what_is_in_host_memory() -> None:
    whole = planned("llama-3.1-70b", "80GiB", format="nf4-dq")
    plan = planned("llama-3.1-70b", "24GiB", format="nf4-dq", offload="cpu")
    [device] = plan.devices
    assert device.layers == (0, 79)
    assert device.streamed_layers is not None
    first, last = device.streamed_layers
    assert 0 < first <= last == 79
    total = whole.devices[0].terms.weights
    layer = plan.host.terms.offloaded // (last - first + 1)
    buffers = device.terms.weights + plan.host.terms.offloaded - total
    assert buffers == pytest.approx(2 * layer, rel=0.01)


def test_one_layer_less_in_host_memory_would_not_fit() -> None:
    plan = planned("llama-3.1-70b", "24GiB", format="nf4-dq", offload="cpu")
    [device] = plan.devices
    assert device.streamed_layers is not None
    first, last = device.streamed_layers
    layer = plan.host.terms.offloaded // (last - first + 1)
    assert device.peak_bytes <= device.usable_bytes < device.peak_bytes + layer


def test_the_price_is_the_bytes_over_the_link() -> None:
    fast = planned("llama-3.1-70b", "H100-80GB", format="bf16", offload="cpu")
    rate = 63e9 * 0.87
    assert fast.tokens_per_second.decode is not None
    assert fast.tokens_per_second.decode < rate / fast.host.terms.offloaded
    assert fast.tokens_per_second.decode == pytest.approx(rate / fast.host.terms.offloaded, rel=0.3)


def test_a_faster_link_makes_a_faster_plan() -> None:
    spec = resolve("llama-3.1-70b")
    machine = describe("RTX 4090")

    def speed(link: float) -> float:
        devices = tuple(replace(d, host_link_bytes_per_s=link) for d in machine.devices)
        request = PlanRequest(format="nf4-dq", offload="cpu")
        plan = make_plan(spec, replace(machine, devices=devices), request)
        assert plan.tokens_per_second.decode is not None
        return plan.tokens_per_second.decode

    assert speed(63e9) > 1.5 * speed(31.5e9)


def test_auto_takes_the_best_quality_that_is_not_too_slow() -> None:
    plan = planned("llama-3.1-70b", "RTX 4090", offload="cpu", context=4096)
    assert plan.fits
    assert plan.tokens_per_second.decode is not None
    assert plan.tokens_per_second.decode >= MIN_TOKENS_PER_SECOND
    for name in ("bf16", "int8", "fp8"):
        better = planned("llama-3.1-70b", "RTX 4090", offload="cpu", context=4096, format=name)
        assert (better.fits, better.runnable) == (True, True)
        assert (better.tokens_per_second.decode or 0) < MIN_TOKENS_PER_SECOND
    assert (plan.format, plan.runnable) == ("nf4", True)
    smaller = planned("llama-3.1-8b", "RTX 3070", offload="cpu", context=2048)
    assert smaller.fits
    assert (smaller.tokens_per_second.decode or 0) >= MIN_TOKENS_PER_SECOND


def test_host_memory_bounds_what_can_stay_there() -> None:
    free = planned("llama-3.1-70b", "24GiB", format="nf4-dq", offload="cpu")
    needs = free.host.peak_bytes
    enough = planned("llama-3.1-70b", "24GiB", format="nf4-dq", offload="cpu", max_host_bytes=needs)
    assert enough.fits
    short = planned(
        "llama-3.1-70b", "24GiB", format="nf4-dq", offload="cpu", max_host_bytes=needs - 1
    )
    assert not short.fits
    assert short.shortfall_bytes == 1
    assert any("host RAM missing" in reason for reason in short.reasons)


@pytest.mark.parametrize(
    ("offload", "said"),
    [("disk", "hundredths of a token a second"), ("gpu", "use one of none, cpu")],
)
def test_other_places_are_refused_with_the_reason(offload: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        PlanRequest(offload=offload)


def test_unequal_cards_are_placed_too() -> None:
    plan = planned("llama-3.1-70b", "1x24GiB,1x8GiB", format="nf4-dq", offload="cpu")
    assert plan.fits
    covered = sorted(d.layers for d in plan.devices if d.layers is not None)
    assert covered[0][0] == 0
    assert covered[-1][1] == 79
    assert all(device.peak_bytes <= device.usable_bytes for device in plan.devices)


def test_page_locked_layers_are_planned_as_torch_rounds_them_up() -> None:
    options: dict[str, Any] = {"gpus": "H200", "format": "bf16", "context": 8192}
    whole = plan_here("llama-3.1-8b", **options)
    streamed = plan_here("llama-3.1-8b", **options, cap="11GiB", offload="cpu")
    [device] = streamed.devices
    assert device.streamed_layers is not None
    count = device.streamed_layers[1] - device.streamed_layers[0] + 1
    layer = streamed.host.terms.offloaded // count
    rounded = 1 << (layer - 1).bit_length()
    assert streamed.host.terms.pinned - whole.host.terms.pinned == count * (rounded - layer)
