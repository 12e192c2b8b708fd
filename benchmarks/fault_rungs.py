"""Rows of benchmarks/faults.py in which memory runs out or is taken, and the ladder goes on."""

from __future__ import annotations

import time

from benchmarks.fault_engines import (
    NEW_TOKENS,
    Starts,
    answers,
    describe,
    guarded,
    planned,
    reported,
    tell,
)
from benchmarks.fault_world import GpuWorld, World, measure_free
from oomproof.errors import LadderExhaustedError
from oomproof.guarding.ladder import LadderEvent
from oomproof.guarding.situation import Target
from oomproof.models.resolve import resolve
from oomproof.planning.plan import Plan
from oomproof.starting import Contract, import_engine
from oomproof.units import GIB, MIB

RUNGS = ("free", "queue", "kv8", "context", "batch", "format", "cpu", "tiny")
_SAME = ("free", "queue", "context", "batch")
"""Rungs that change no token."""
_AT_STEP = 12
_STOLEN_BYTES = 20 * GIB
_BACK_AFTER_S = 3.0


def rung_rows(model: str, world: World) -> None:
    """A row for each rung."""
    context = 32768 if isinstance(world, GpuWorld) else 1024
    target = planned(model, context=context)
    on_gpu = target.plan.devices_in_use[0].kind == "cuda"
    for rung in RUNGS:
        if rung in ("cpu", "tiny") and not on_gpu:
            continue
        with reported(f"rung-{rung}"):
            _rung_row(rung, target, world)
        world.lift()


def _rung_row(rung: str, target: Target, world: World) -> None:
    if rung == "tiny":
        _smaller_model(target, world)
        return
    vocab_size = target.spec.vocab_size
    kv = sum(device.terms.kv_cache for device in target.plan.devices_in_use)
    less = {"free": 0, "queue": 0}.get(rung, 0.2 * kv)
    starts, events = Starts(world), list[LadderEvent]()
    allowed = () if rung in ("free", "queue") else (rung,)
    with guarded(target, starts, events, allowed) as engine:
        calm = answers(engine, vocab_size)
        at = starts.count[0] + _AT_STEP
        starts.steps[at] = int(less)
        if rung == "queue":
            starts.steps[at + 1] = 0
        began = time.perf_counter()
        found = answers(engine, vocab_size)
        took = time.perf_counter() - began
        taken, plan = [event.rung for event in events], engine.plan
    handed_out = _AT_STEP - 2
    is_whole = all(len(tokens) == NEW_TOKENS for tokens in found.values())
    is_same = found == calm
    # In 16 bits two tokens of nearly the same score may change places behind a resume.
    must_be_same = rung in _SAME and target.plan.format == "fp32"
    begins_alike = all(found[id_][:handed_out] == calm[id_][:handed_out] for id_ in calm)
    tell(
        f"rung-{rung}",
        is_ok=taken[-1:] == [rung] and is_whole and begins_alike and (is_same or not must_be_same),
        rungs=taken,
        same_tokens=is_same,
        alike_until=min(alike_until(found[id_], calm[id_]) for id_ in calm),
        begins_alike=begins_alike,
        less_bytes=int(less),
        recovery_s=round(took, 2),
        said=events[-1].message if events else None,
        plan=describe(plan),
    )


def alike_until(one: list[int], other: list[int]) -> int:
    """How many tokens two answers have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _smaller_model(target: Target, world: World) -> None:
    """At load: so little is left that only the bundled model has room."""
    starts, events = Starts(world), list[LadderEvent]()
    needed = sum(device.peak_bytes for device in target.plan.devices_in_use)
    least = sum(device.peak_bytes for device in planned("tiny", context=1024).plan.devices_in_use)
    limit_load(target.plan, needed - least - 64 * MIB)
    with guarded(target, starts, events, ("tiny",)) as engine:
        found = answers(engine, resolve("tiny").vocab_size, 1)
        tell(
            "rung-tiny",
            is_ok=[event.rung for event in events] == ["free", "tiny"] and bool(found["0"]),
            rungs=[event.rung for event in events],
            said=events[-1].message,
            plan=describe(engine.plan),
        )


def limit_load(plan: Plan, less_bytes: int) -> None:
    """Allows torch so much less than a plan needs, before anything of it is there."""
    import torch

    device = plan.devices_in_use[0]
    total = torch.cuda.get_device_properties(0).total_memory
    limit = device.peak_bytes - device.terms.cuda_context - less_bytes
    torch.cuda.set_per_process_memory_fraction(max(0.0, limit / total), 0)


def steal_rows(model: str, world: World) -> None:
    """Memory that another process takes, at the two moments."""
    target = planned(model, context=4096 if isinstance(world, GpuWorld) else 1024)
    needed = sum(device.peak_bytes for device in target.plan.devices_in_use)
    hardware = world.machine.measure(target.plan)
    # What is imported while memory is gone would be time in which it may come back.
    import_engine(Contract(plan=target.plan, spec=target.spec, hardware=hardware))
    # Most is taken first: a card with room for the plan, and without 20 GiB for half of it. What
    # the context of this process takes is free to its own plans.
    spare = _STOLEN_BYTES + needed // 2
    for stays in (False, True):
        row = f"steal-plan-load-{'stays' if stays else 'returns'}"
        with reported(row):
            _steal_before_load(row, target, world, spare, stays=stays)
    with reported("steal-load-generate"):
        _steal_before_generate(target, world)


def _steal_before_load(row: str, target: Target, world: World, spare: int, *, stays: bool) -> None:
    starts, events = Starts(world), list[LadderEvent]()
    began = time.perf_counter()
    with (
        world.thief(left=spare),
        world.thief(size=_thief_bytes(world), seconds=0.0 if stays else _BACK_AFTER_S) as taken,
    ):
        free = measure_free(world)
        refused, plan, found = None, None, {}
        try:
            with guarded(target, starts, events, ("format",)) as engine:
                plan = engine.plan
                found = answers(engine, target.spec.vocab_size)
        except LadderExhaustedError as error:
            refused = str(error)
    rungs = [event.rung for event in events]
    tell(
        row,
        # Where it goes again the same plan is loaded; else a smaller one, or a typed refusal.
        is_ok=("wait" in rungs and bool(found) and plan == target.plan)
        if not stays
        else bool(refused) or bool(found),
        stolen_bytes=taken,
        free_bytes=free,
        needed_bytes=target.plan.devices_in_use[0].peak_bytes,
        rungs=rungs,
        refused=refused,
        said=[event.message for event in events][-3:],
        plan=None if plan is None else describe(plan),
        wall_s=round(time.perf_counter() - began, 2),
    )


def _thief_bytes(world: World) -> int:
    """20 GiB, or all that a processor was said to have."""
    return _STOLEN_BYTES if isinstance(world, GpuWorld) else measure_free(world)


def _steal_before_generate(target: Target, world: World) -> None:
    starts, events = Starts(world), list[LadderEvent]()
    with guarded(target, starts, events) as engine:
        calm = answers(engine, target.spec.vocab_size)
        with world.thief(size=_STOLEN_BYTES) as first, world.thief(left=64 * MIB) as rest:
            free = measure_free(world)
            found = answers(engine, target.spec.vocab_size)
    tell(
        "steal-load-generate",
        is_ok=found == calm and not events,
        stolen_bytes=first + rest,
        free_bytes=free,
        same_tokens=found == calm,
        rungs=[event.rung for event in events],
    )
