"""What a rung is chosen from: what runs, what failed, what the machine has left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from oomproof.errors import PlanDoesNotFitError
from oomproof.faults.classify import classify
from oomproof.faults.fault import Cause, Fault, FaultClass, MemoryFigures
from oomproof.hardware.holders import Holder
from oomproof.hardware.spec import Hardware
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import DevicePlan, Plan
from oomproof.planning.request import PlanRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What an engine is started from."""

    plan: Plan
    spec: ModelSpec
    """The model, with the headers of its checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A failure without its exception: nothing of it holds a tensor."""

    fault: Fault
    text: str
    """What was raised, in a line."""
    missing_bytes: int
    """What there was too little, 0 where nothing says."""
    is_world: bool = False
    """Whether a device has less free memory than the plan was made for."""
    allowed_bytes: int | None = None
    """The most that torch may hold on the GPU, where a limit of its own was met."""
    while_starting: bool = False
    """Whether it was an engine's start that failed, and no request's step."""
    kept: Path | None = None
    """A file with what is known of it."""

    @property
    def is_of_host(self) -> bool:
        """Whether it was the host's memory that ran out, not a GPU's."""
        return self.fault.cause is Cause.HOST_MEMORY

    @property
    def is_fatal(self) -> bool:
        """Whether this process, or the GPU, is of no use any more."""
        return self.fault.fault_class in (FaultClass.PROCESS, FaultClass.GPU)


def judge(error: BaseException) -> Failure | None:
    """The failure that an exception is, without the exception; None where it is the user's."""
    fault = classify(error)
    if fault is None:
        return None
    text = fault.evidence.text or type(error).__name__
    if isinstance(error, PlanDoesNotFitError):
        return Failure(
            fault=fault, text=error.message, missing_bytes=error.shortfall_bytes, is_world=True
        )
    if fault.fault_class is FaultClass.USER:
        return None
    figures = fault.figures
    return Failure(
        fault=fault,
        text=text,
        missing_bytes=_missing_bytes(figures),
        allowed_bytes=figures.allowed_bytes,
    )


def _missing_bytes(figures: MemoryFigures) -> int:
    """What there was too little: on the device, or under torch's own limit."""
    if figures.tried_bytes is None:
        return 0
    room = figures.free_bytes or 0
    if figures.allowed_bytes is not None and figures.reserved_bytes is not None:
        room = min(room, max(0, figures.allowed_bytes - figures.reserved_bytes))
    return max(0, figures.tried_bytes - room)


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """Where the ladder stands."""

    target: Target
    """What failed."""
    failure: Failure
    hardware: Hardware
    """The machine as it is, with the failed engine gone."""
    least_context: int
    """Prompt and answer of the longest request that has begun, in tokens; 0 where none has."""
    requests: int
    """Unfinished ones."""
    has_answers: bool
    """Whether tokens were handed out that have to be continued."""
    holders: tuple[Holder, ...] = ()
    """Other processes with memory on the plan's GPUs."""
    find: Callable[[str], ModelSpec]
    """From a smaller model's name to what it is; raises an OomproofError where there is none."""

    @property
    def fits_again(self) -> bool:
        """Whether the plan that failed fits into what is free now."""
        plan = self.target.plan
        free = {(device.index, device.kind): device.free_bytes for device in self.hardware.devices}
        return all(
            free.get((device.index, device.kind), -1) >= needed_bytes(plan, device)
            for device in used(plan)
        )

    @property
    def proven(self) -> Hardware:
        """The machine, bounded by what failed.

        A plan that ran out of memory is proof that its peak is more than there is: what a new one
        may use is that peak less what was missing, and no more than torch was allowed. Where a
        device just has less free memory than before, that is measured, and proves nothing more. The
        host's memory bounds the host, and a GPU's the GPU; on a processor they are one.
        """
        plan, failed = self.target.plan, self.failure.fault.device
        if self.failure.is_world:
            return self.hardware
        if self.failure.is_of_host and all(device.kind != "cpu" for device in used(plan)):
            return self._with_less_host_memory(plan)
        most = {
            (device.index, device.kind): self._bound(device) + plan.reserve_bytes
            for device in used(plan)
            if failed in (None, device.index)
        }
        devices = tuple(
            replace(
                device,
                free_bytes=max(
                    0, min(device.free_bytes, most.get((device.index, device.kind), 1 << 62))
                ),
            )
            for device in self.hardware.devices
        )
        return replace(self.hardware, devices=devices)

    def _bound(self, device: DevicePlan) -> int:
        failure = self.failure
        most = needed_bytes(self.target.plan, device) - max(1, failure.missing_bytes)
        if failure.allowed_bytes is None or device.kind != "cuda":
            return most
        return min(most, failure.allowed_bytes + device.terms.cuda_context)

    def _with_less_host_memory(self, plan: Plan) -> Hardware:
        most = plan.host.peak_bytes - max(1, self.failure.missing_bytes)
        host = self.hardware.host
        return replace(
            self.hardware,
            host=replace(host, available_ram_bytes=max(0, min(host.available_ram_bytes, most))),
        )


def used(plan: Plan) -> tuple[DevicePlan, ...]:
    """The plan's devices; all of them where it does not fit, and so has placed nothing."""
    return plan.devices_in_use or plan.devices


def needed_bytes(plan: Plan, device: DevicePlan) -> int:
    """What must be free of a device; on the CPU, model and process live in the same memory."""
    return device.peak_bytes + (plan.host.peak_bytes if device.kind == "cpu" else 0)


def total_bytes(plan: Plan) -> int:
    """Peaks of all the devices together."""
    return sum(device.peak_bytes for device in plan.devices_in_use)


def request_of(plan: Plan) -> PlanRequest:
    """What to ask for to get this plan again, on a machine with as much room."""
    return PlanRequest(
        format=plan.format,
        kv_format=plan.kv_format,
        compute_dtype=plan.compute_dtype,
        context=plan.context,
        concurrency=plan.concurrency,
        reserve_bytes=plan.reserve_bytes,
        max_memory={d.index: d.limit_bytes for d in plan.devices if d.limit_bytes is not None},
        cap_bytes=plan.cap_bytes,
        engine=plan.engine,
        offload=plan.offload,
        search=plan.search,
    )
