"""The rungs of the ladder: what each proposes, what it frees and what it costs.

A rung is one entry of RUNGS. It gets the situation and proposes a plan made by the planner, or says
why it has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from oomproof.errors import InputError, OomproofError
from oomproof.faults.fault import FaultClass
from oomproof.formats import QUALITY_ORDER, SEARCHED_FORMATS
from oomproof.guarding.fallback import is_model
from oomproof.guarding.situation import Situation, Target, request_of, total_bytes
from oomproof.hardware.probe import cpu_device
from oomproof.hardware.spec import Hardware
from oomproof.memory.kv_cache import KV_FORMATS
from oomproof.models.spec import ModelSpec
from oomproof.planning.notes import read_notes
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """What a rung would go on with."""

    target: Target
    frees_bytes: int
    """Of the devices' planned peaks together; less than 0 where a new device holds more."""
    one_by_one: bool = False
    """Whether requests are let in one after the other from now on."""
    waits: bool = False
    """Whether memory, or the device, has to come back first."""
    hardware: Hardware | None = None
    """What it is started on, where that is not the machine as it was measured."""


Proposed = Proposal | str
"""A proposal, or why there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One way to go on."""

    name: str
    costs: str
    """In words."""
    propose: Callable[[Situation], Proposed]
    is_free: bool = False
    """Whether it changes neither tokens nor promised limits, and so needs nobody's leave."""


def rung_of(name: str) -> Rung:
    """The rung of a name that `fallback.read_fallback` allowed."""
    if is_model(name):
        return Rung(
            name=name,
            costs="another model's answers, and only for prompts that no answer has begun to",
            propose=lambda situation: _smaller_model(situation, name),
        )
    return RUNGS[name]


def _again(situation: Situation) -> Proposed:
    if not situation.target.plan.fits:
        return "the plan never fitted"
    if situation.failure.fault.fault_class is FaultClass.WAIT:
        return "the device is busy"
    if not situation.fits_again:
        return "the plan does not fit into what is free now"
    return Proposal(target=situation.target, frees_bytes=0)


def _wait(situation: Situation) -> Proposed:
    if not situation.target.plan.fits:
        return "the plan never fitted"
    if situation.failure.fault.fault_class is not FaultClass.WAIT:
        if situation.fits_again:
            return "nothing to wait for: what is free would do"
        if not situation.holders:
            return "no other process is known to hold the memory"
    return Proposal(target=situation.target, frees_bytes=0, waits=True)


def _queue(situation: Situation) -> Proposed:
    if situation.requests < 2:
        return "no two requests are running"
    if situation.failure.while_starting:
        return "it was loading that failed, which no request makes smaller"
    if not situation.fits_again:
        return "the plan does not fit into what is free now"
    return Proposal(target=situation.target, frees_bytes=0, one_by_one=True)


def _kv8(situation: Situation) -> Proposed:
    plan = situation.target.plan
    if KV_FORMATS[plan.kv_format].itemsize == 1:
        return f"the KV cache is {plan.kv_format} already"
    return _planned(situation, replace(request_of(plan), kv_format="fp8"))


def _context(situation: Situation) -> Proposed:
    plan, least = situation.target.plan, situation.least_context
    largest = _planned(situation, replace(request_of(plan), context="auto"))
    if not isinstance(largest, str):
        found = largest.target.plan.context
        return largest if found < plan.context else f"a context of {found:,} would free nothing"
    if not least:
        return largest
    # The largest is looked for in whole pages; what is needed may lie within one.
    exact = _planned(situation, replace(request_of(plan), context=least))
    if isinstance(exact, str):
        return f"running requests need {least:,} tokens, and {exact}"
    return exact


def _batch(situation: Situation) -> Proposed:
    plan = situation.target.plan
    if plan.concurrency == 1:
        return "there is one request at a time already"
    proposal = _planned(situation, replace(request_of(plan), concurrency="auto"))
    if isinstance(proposal, str):
        return proposal
    found = proposal.target.plan.concurrency
    return proposal if found < plan.concurrency else "fewer requests would free nothing"


def _format(situation: Situation) -> Proposed:
    plan, spec = situation.target.plan, situation.target.spec
    if spec.checkpoint_quantization is not None:
        return "the checkpoint is quantized already"
    order = [*QUALITY_ORDER] if plan.format in QUALITY_ORDER else [plan.format, *QUALITY_ORDER]
    smaller = order[order.index(plan.format) + 1 :]
    for name in smaller:
        proposal = _planned(situation, _in_format(plan, name))
        if not isinstance(proposal, str) and proposal.frees_bytes > 0:
            return proposal
    return f"no smaller format than {plan.format} fits"


def _cpu(situation: Situation) -> Proposed:
    plan = situation.target.plan
    if all(device.kind == "cpu" for device in plan.devices):
        return "it runs on the processor already"
    hardware = situation.proven if situation.failure.is_of_host else situation.hardware
    alone = replace(hardware, devices=(cpu_device(hardware.host),), links=())
    why = ""
    for name in ("bf16", "nf4"):
        request = PlanRequest(format=name, context=plan.context, concurrency=plan.concurrency)
        proposal = _on(situation, alone, request, situation.target.spec)
        if not isinstance(proposal, str):
            return replace(proposal, hardware=alone)
        why = proposal
    return why


def _smaller_model(situation: Situation, name: str) -> Proposed:
    if situation.target.spec.adapter is not None:
        return f"the adapter {situation.target.spec.adapter.name} is not of that model"
    if situation.has_answers or situation.requests:
        return "tokens of another model cannot be continued"
    try:
        spec = situation.find(name)
    except OomproofError as error:
        return str(error)
    plan = situation.target.plan
    request = replace(
        request_of(plan),
        format="auto",
        kv_format="auto",
        compute_dtype="auto",
        engine="auto",
        context=min(plan.context, spec.max_position_embeddings),
    )
    return _on(situation, situation.proven, request, spec)


def _in_format(plan: Plan, name: str) -> PlanRequest:
    asked = request_of(plan)
    # Formats that the engine does not hold are another engine's: it is chosen anew.
    engine = "auto" if name == "llm-int8" else asked.engine
    own = {"float32": "auto"}
    return replace(
        asked,
        format=name,
        engine=engine,
        compute_dtype=own.get(asked.compute_dtype, asked.compute_dtype),
        kv_format="auto" if asked.kv_format == "fp32" else asked.kv_format,
        search=asked.search and name in SEARCHED_FORMATS,
    )


def _planned(situation: Situation, request: PlanRequest) -> Proposed:
    """The same model by another request, on what the failure left."""
    return _on(situation, situation.proven, request, situation.target.spec)


def _on(
    situation: Situation, hardware: Hardware, request: PlanRequest, spec: ModelSpec
) -> Proposed:
    try:
        plan = make_plan(spec, hardware, request, read_notes())
    except InputError as error:
        return str(error)
    if spec is situation.target.spec:
        # The name it was asked for by, where that was not the folder's.
        plan = replace(plan, model=situation.target.plan.model)
    if not plan.runnable:
        return str(plan.not_runnable)
    if not plan.fits:
        return f"{format_bytes(plan.shortfall_bytes)} would be missing"
    if plan.refused is not None:
        return plan.refused
    if plan.context < situation.least_context:
        return f"running requests need {situation.least_context:,} tokens"
    frees = total_bytes(situation.target.plan) - total_bytes(plan)
    return Proposal(target=Target(plan=plan, spec=spec), frees_bytes=frees)


RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung(
            name="free",
            costs="the time to load once more",
            propose=_again,
            is_free=True,
        ),
        Rung(
            name="wait",
            costs="up to a minute, and the time to load once more",
            propose=_wait,
            is_free=True,
        ),
        Rung(
            name="queue",
            costs="requests are answered one after the other until the interrupted ones are done",
            propose=_queue,
            is_free=True,
        ),
        Rung(name="kv8", costs="precision: keys and values in 8 bits", propose=_kv8),
        Rung(name="context", costs="room: shorter prompts and answers", propose=_context),
        Rung(name="batch", costs="room: fewer requests at once", propose=_batch),
        Rung(name="format", costs="precision: weights of fewer bits", propose=_format),
        Rung(name="cpu", costs="speed: the processor instead of the GPU", propose=_cpu),
    )
}
"""Every rung by its name, in the order in which one is recommended."""
