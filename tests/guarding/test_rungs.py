"""Each rung: the plan it proposes on a described machine, what that frees, or why there is none."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest

from oomproof.faults.classify import classify
from oomproof.guarding.ladder import command_of, event_of
from oomproof.guarding.machine import find_model
from oomproof.guarding.rungs import RUNGS, Proposal, rung_of
from oomproof.guarding.situation import (
    Failure,
    Situation,
    Target,
    judge,
    needed_bytes,
    request_of,
    total_bytes,
)
from oomproof.hardware.describe import describe
from oomproof.hardware.probe import cpu_device
from oomproof.models.resolve import resolve
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.units import GIB, MIB
from tests.planning.test_adapter import with_made_up

OUT_OF_GPU_MEMORY = RuntimeError("CUDA error: out of memory")


def situation(
    missing_bytes: int = 300 * MIB,
    *,
    gpus: str = "1x24GiB",
    model: str = "llama-3.1-8b",
    ram_bytes: int = 64 * GIB,
    changes: dict[str, Any] | None = None,
    trouble: Exception = OUT_OF_GPU_MEMORY,
    **options: Any,
) -> Situation:
    hardware = describe(gpus)
    host = replace(hardware.host, total_ram_bytes=ram_bytes, available_ram_bytes=ram_bytes)
    hardware = replace(hardware, host=host)
    spec = resolve(model)
    request = PlanRequest(**{"format": "bf16", "context": 8192, "concurrency": 4, **options})
    fault = classify(trouble)
    assert fault is not None
    values: dict[str, Any] = {
        "target": Target(plan=make_plan(spec, hardware, request), spec=spec),
        "failure": Failure(fault=fault, text="out of memory", missing_bytes=missing_bytes),
        "hardware": hardware,
        "least_context": 0,
        "requests": 2,
        "has_answers": False,
        "find": find_model,
        **(changes or {}),
    }
    return Situation(**values)


def proposed(name: str, where: Situation) -> Proposal:
    proposal = rung_of(name).propose(where)
    assert isinstance(proposal, Proposal), proposal
    return proposal


def refused(name: str, where: Situation) -> str:
    proposal = rung_of(name).propose(where)
    assert isinstance(proposal, str)
    return proposal


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("kv8", {"kv_format": "fp8"}),
        ("batch", {"concurrency": 3}),
        ("format", {"format": "int8"}),
    ],
)
def test_a_rung_changes_what_it_names_and_frees_what_was_missing(
    name: str, changed: dict[str, Any]
) -> None:
    where = situation()
    before = where.target.plan
    after = proposed(name, where).target.plan
    kept = {"format", "kv_format", "context", "concurrency", "engine"} - set(changed)
    assert {key: getattr(after, key) for key in changed} == changed
    assert all(getattr(after, key) == getattr(before, key) for key in kept)
    freed = total_bytes(before) - total_bytes(after)
    assert proposed(name, where).frees_bytes == freed >= 300 * MIB


def test_the_context_shrinks_to_the_largest_that_fits_and_never_below_what_is_needed() -> None:
    where = situation(300 * MIB, concurrency=1)
    found = proposed("context", where).target.plan
    assert 4096 < found.context < 8192
    assert found.context % 256 == 0
    needed = replace(where, least_context=found.context + 1)
    assert "running requests need" in refused("context", needed)
    again = proposed("context", replace(where, least_context=found.context))
    assert again.target.plan.context == found.context


def test_more_missing_bytes_take_a_larger_step() -> None:
    formats = [
        proposed("format", situation(missing)).target.plan.format
        for missing in (1, 6 * GIB, 9 * GIB)
    ]
    assert formats[0] == "int8"
    assert formats[-1] in ("nf4", "nf4-dq")
    assert "no smaller format than bf16 fits" in refused("format", situation(18 * GIB))


def test_the_processor_takes_bf16_where_ram_allows_and_nf4_else() -> None:
    rich, poor = situation(), situation(ram_bytes=12 * GIB)
    assert proposed("cpu", rich).target.plan.format == "bf16"
    assert proposed("cpu", rich).target.plan.devices[0].kind == "cpu"
    assert proposed("cpu", poor).target.plan.format == "nf4"
    assert "would be missing" in refused("cpu", situation(ram_bytes=2 * GIB))


def test_an_adapter_stays_on_every_rung_and_is_never_answered_without() -> None:
    where = situation(1 * GIB)
    spec = with_made_up(where.target.spec)
    plan = make_plan(spec, where.hardware, request_of(where.target.plan))
    adapted = replace(where, target=Target(plan=plan, spec=spec), requests=0, failure=where.failure)
    for name in ("kv8", "batch", "format", "cpu"):
        found = proposed(name, replace(adapted, requests=2)).target
        assert found.spec.adapter is spec.adapter
        assert found.plan.adapter is not None
    words = shlex.split(command_of(plan))
    assert words[words.index("--adapter") + 1] == "/adapters/one"
    refusal = refused("org/smaller", adapted)
    assert refusal == "the adapter one is not of that model"


def test_a_smaller_model_is_only_for_loading() -> None:
    loading = situation(12 * GIB, changes={"requests": 0})
    assert refused("tiny", situation()) == "tokens of another model cannot be continued"
    after = proposed("tiny", loading).target
    assert after.plan.model == "tiny"
    assert after.spec.fingerprint != loading.target.spec.fingerprint
    assert "oomproof" in refused("/oomproof/nothing", loading)


def test_what_is_at_its_end_says_so() -> None:
    least = situation(kv_format="fp8", concurrency=1, format="nf4-dq")
    assert refused("kv8", least) == "the KV cache is fp8 already"
    assert refused("batch", least) == "there is one request at a time already"
    assert refused("format", least) == "no smaller format than nf4-dq fits"
    assert refused("queue", replace(least, requests=1)) == "no two requests are running"


def test_what_changes_nothing_needs_a_plan_that_still_fits() -> None:
    where = situation()
    assert proposed("free", where).target == where.target
    assert proposed("queue", where).one_by_one
    taken = tuple(replace(device, free_bytes=8 * GIB) for device in where.hardware.devices)
    less = replace(where, hardware=replace(where.hardware, devices=taken))
    for name in ("free", "queue"):
        assert refused(name, less) == "the plan does not fit into what is free now"
    assert refused("wait", less) == "no other process is known to hold the memory"


def test_where_the_world_changed_what_is_free_is_the_only_bound() -> None:
    where = situation(changes={})
    moved = replace(where, failure=replace(where.failure, is_world=True))
    assert moved.proven == where.hardware
    one = replace(
        where, failure=replace(where.failure, fault=replace(where.failure.fault, device=1))
    )
    assert one.proven == where.hardware


def test_a_limit_of_torchs_own_bounds_the_next_plan() -> None:
    plan = situation().target.plan
    context = plan.devices[0].terms.cuda_context
    error = torch_out_of_memory(tried="0.50 GiB", allowed="12.00 GiB", used="11.75 GiB")
    failure = judge(error)
    assert failure is not None
    assert (failure.missing_bytes, failure.allowed_bytes) == (GIB // 4, 12 * GIB)
    bounded = replace(situation(), failure=failure).proven
    assert bounded.devices[0].free_bytes == 12 * GIB + context


def torch_out_of_memory(*, tried: str, allowed: str, used: str) -> Exception:
    """As torch says it under set_per_process_memory_fraction."""
    return RuntimeError(
        f"CUDA out of memory. Tried to allocate {tried}. GPU 0 has a total capacity of 139.80 GiB "
        f"of which 120.00 GiB is free. {allowed} allowed; Of the allocated memory {used} is "
        "allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated."
    )


def test_host_memory_that_runs_out_bounds_the_host_and_no_gpu() -> None:
    where = situation(GIB, trouble=MemoryError())
    where = replace(where, hardware=replace(where.hardware, source="probed"))
    bounded, plan = where.proven, where.target.plan
    assert bounded.devices == where.hardware.devices
    assert bounded.host.available_ram_bytes == plan.host.peak_bytes - GIB
    # A rung that frees a GPU's memory is no answer to that, nor is the processor.
    for name in ("kv8", "context", "batch", "format"):
        assert isinstance(rung_of(name).propose(where), str)
    assert "would be missing" in refused("cpu", where)
    assert proposed("free", where).target == where.target


def test_on_a_processor_the_hosts_memory_is_the_devices() -> None:
    hardware = describe("1x24GiB")
    alone = replace(hardware, devices=(cpu_device(hardware.host),))
    spec = resolve("llama-3.1-8b")
    plan = make_plan(spec, alone, PlanRequest(format="bf16", context=4096))
    where = replace(
        situation(GIB, trouble=MemoryError()),
        target=Target(plan=plan, spec=spec),
        hardware=alone,
    )
    assert where.proven.devices[0].free_bytes < needed_bytes(plan, plan.devices[0])


def test_the_processor_is_a_machine_of_its_own() -> None:
    hardware = proposed("cpu", situation()).hardware
    assert hardware is not None
    assert [device.kind for device in hardware.devices] == ["cpu"]


def test_letting_requests_in_one_by_one_says_that_the_plan_stays() -> None:
    where = situation()
    told = event_of(RUNGS["queue"], proposed("queue", where), where).message
    assert "queue: frees nothing of the plan; running requests go back to the queue" in told


def test_a_plan_is_asked_for_again_with_its_limits() -> None:
    hardware = describe("2x24GiB")
    request = PlanRequest(
        format="nf4",
        kv_format="fp8",
        context=4096,
        concurrency=2,
        reserve_bytes=GIB,
        cap_bytes=20 * GIB,
        max_memory={0: 10 * GIB},
        engine="native",
    )
    plan = make_plan(resolve("llama-3.1-8b"), hardware, request)
    assert make_plan(resolve("llama-3.1-8b"), hardware, request_of(plan)) == plan


def test_every_rung_says_what_it_costs() -> None:
    assert list(RUNGS) == ["free", "wait", "queue", "kv8", "context", "batch", "format", "cpu"]
    assert all(rung.costs for rung in RUNGS.values())
    assert [rung.name for rung in RUNGS.values() if rung.is_free] == ["free", "wait", "queue"]
