"""A training plan run at full size: random weights, random tokens, the planned batch, measured."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from oomproof.faults.classify import classify
from oomproof.faults.fault import FaultClass
from oomproof.hardware.spec import Hardware
from oomproof.models.spec import ModelSpec
from oomproof.tuning.assemble import close_device, open_device
from oomproof.tuning.engines import Progress, build_native, build_with_peft
from oomproof.tuning.meter import MemoryMeter
from oomproof.tuning.options import TuningSettings
from oomproof.tuning.plan import TrainingData, TrainingPlan
from oomproof.units import format_bytes

STEPS = 3
"""Optimizer steps; the first one is not timed."""
_MOST_MICRO_BATCHES = 4
"""Of a step: more of them take no more memory."""
_SAMPLES = 1024
_SEED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningRehearsal:
    """What a training plan became when it was run."""

    plan: TrainingPlan
    load_s: float | None
    losses: tuple[float, ...]
    """Of each step's last micro-batch."""
    tokens_per_second: float | None
    context_bytes: int
    """What the driver lost outside torch's allocator; 0 on a processor."""
    allocated_bytes: int
    """The most that torch's tensors took; on a processor the growth of the resident set."""
    reserved_bytes: int
    """The most that torch's allocator held, with what it caches."""
    failed: str | None
    """Where memory ran out; None where it ran through."""

    @property
    def predicted_bytes(self) -> int:
        """The plan's peak without margin, and without what the allocator may cache."""
        terms = self.plan.terms
        return terms.peak_bytes - terms.margin - terms.allocator

    @property
    def measured_bytes(self) -> int:
        """The peak, beside which a prediction is held."""
        return self.context_bytes + self.allocated_bytes

    @property
    def predicted_tokens_per_second(self) -> float | None:
        """None where the device's FLOP/s are not known."""
        plan = self.plan
        if not plan.train_s:
            return None
        return plan.steps * plan.batch_size * plan.data.tokens_per_row / plan.train_s

    @property
    def exceeded(self) -> tuple[str, ...]:
        """What was above the plan, in words; resident memory of a processor is held against none.

        It has the interpreter's and the libraries' own growth in it.
        """
        plan = self.plan
        if plan.base.devices[0].kind == "cpu":
            return ()
        held = self.context_bytes + self.reserved_bytes
        return tuple(
            f"{plan.device} {what} {format_bytes(found)}, planned were {format_bytes(planned)}"
            for what, found, planned in (
                ("took", self.measured_bytes, self.predicted_bytes),
                ("held", held, plan.peak_bytes),
            )
            if found > planned
        )

    @property
    def kept_its_promise(self) -> bool:
        """Whether it ran through, at finite losses, within the plan."""
        finite = bool(self.losses) and all(math.isfinite(one) for one in self.losses)
        return self.failed is None and not self.exceeded and finite

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `rehearse --tune --json`."""
        plan = self.plan
        return {
            "model": plan.base.model,
            "format": plan.format,
            "engine": plan.engine,
            "device": plan.device,
            "context": plan.context,
            "micro_batch": plan.micro_batch,
            "micro_batches_per_step": plan.micro_batches_per_step,
            "optimizer": plan.optimizer,
            "checkpointing": plan.checkpointing,
            "kept": plan.kept,
            "kept_its_promise": self.kept_its_promise,
            "failed": self.failed,
            "exceeded": list(self.exceeded),
            "load_s": self.load_s,
            "losses": list(self.losses),
            "tokens_per_second": self.tokens_per_second,
            "predicted_tokens_per_second": self.predicted_tokens_per_second,
            "terms": plan.terms.as_dict(),
            "predicted_peak_bytes": self.predicted_bytes,
            "measured_peak_bytes": self.measured_bytes,
            "measured_context_bytes": self.context_bytes,
            "measured_reserved_bytes": self.reserved_bytes,
        }


def made_up_data(context: int) -> TrainingData:
    """Full sequences of one document each."""
    return TrainingData(
        name="random tokens",
        samples=_SAMPLES,
        tokens=_SAMPLES * context,
        learned_tokens=_SAMPLES * context,
        longest=context,
        longest_line=1,
        truncated=0,
        dropped=0,
        validation_samples=0,
        rows=_SAMPLES,
        filled=1.0,
        lengths=((context, _SAMPLES),),
        documents=1,
        is_cut=True,
    )


def rehearse_plan(
    plan: TrainingPlan,
    spec: ModelSpec,
    settings: TuningSettings,
    *,
    hardware: Hardware,
    progress: Progress | None = None,
) -> TuningRehearsal:
    """Makes random weights as planned, takes a few steps, and gives everything back.

    Running out of memory is a result, not an error: `failed` says where.

    Raises:
        HardwareError, PlanDoesNotFitError: The device is not what was planned for.
    """
    place = open_device(plan, hardware)
    if place.type == "cpu":
        # What the first step of an optimizer imports is none of the plan's.
        number = torch.nn.Parameter(torch.zeros(1))
        number.grad = torch.zeros(1)
        _optimizer(plan.optimizer, [number], settings).step()
    meter = MemoryMeter(place)
    free = next(one.free_bytes for one in hardware.devices if one.index == plan.device_index)
    done = _Steps(free_bytes=free)
    if place.type == "cuda":
        done.held_bytes = torch.cuda.memory_reserved(place)
    failed = None
    try:
        _run(plan, spec, settings, place, done, progress)
    except Exception as error:
        fault = classify(error)
        if fault is None or fault.fault_class is not FaultClass.SHRINK:
            raise
        where = f"in step {len(done.losses) + 1}" if done.load_s is not None else "while loading"
        failed = f"out of memory {where}: {str(error).splitlines()[0][:200]}"
    reserved, allocated = meter.read(), meter.read_allocated()
    if place.type == "cuda":
        torch.cuda.empty_cache()
    close_device(plan)
    return TuningRehearsal(
        plan=plan,
        load_s=done.load_s,
        losses=tuple(done.losses),
        tokens_per_second=done.tokens / done.seconds if done.seconds else None,
        context_bytes=done.outside_bytes,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        failed=failed,
    )


@dataclass(slots=True)
class _Steps:
    """What is done so far."""

    free_bytes: int
    """Of the device, before this process touched it."""
    held_bytes: int = 0
    """Of torch's allocator then."""
    outside_bytes: int = 0
    load_s: float | None = None
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def look_outside(self, place: torch.device) -> None:
        """What the driver has lost that is not torch's."""
        if place.type == "cuda":
            left, _ = torch.cuda.mem_get_info(place)
            own = torch.cuda.memory_reserved(place) - self.held_bytes
            self.outside_bytes = max(0, self.free_bytes - left - own)


def _run(
    plan: TrainingPlan,
    spec: ModelSpec,
    settings: TuningSettings,
    place: torch.device,
    done: _Steps,
    progress: Progress | None,
) -> None:
    begin = time.perf_counter()
    model: Any
    if plan.engine == "native":
        model = build_native(plan, spec, None, settings, progress=progress)
    else:
        model = build_with_peft(plan, spec, None, settings, base_id=spec.id, progress=progress)
    _wait(place)
    done.load_s = round(time.perf_counter() - begin, 3)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = _optimizer(plan.optimizer, trained, settings)
    micro_batches = min(plan.micro_batches_per_step, _MOST_MICRO_BATCHES)
    rows, length = plan.micro_batch, plan.longest
    chooser = torch.Generator().manual_seed(_SEED)
    model.train()
    for step in range(STEPS):
        begin = time.perf_counter()
        loss = torch.zeros(())
        for _ in range(micro_batches):
            ids = torch.randint(0, spec.vocab_size, (rows, length), generator=chooser).to(place)
            positions = torch.arange(length, device=place).repeat(rows, 1)
            loss = model(ids, ids, positions, rows * (length - 1) * micro_batches).loss
            loss.backward()
        # Pages of a paged optimizer, which leave where memory is short, are none of the context.
        if not step or not plan.optimizer.startswith("paged"):
            done.look_outside(place)
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        done.losses.append(float(loss.detach()) * micro_batches)
        if step:
            done.tokens += micro_batches * rows * length
            done.seconds += time.perf_counter() - begin


def _optimizer(
    name: str, parameters: list[torch.nn.Parameter], settings: TuningSettings
) -> torch.optim.Optimizer:
    """As transformers' Trainer makes it of the name."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    from bitsandbytes.optim import AdamW

    made: torch.optim.Optimizer = AdamW(
        parameters,
        lr=rate,
        weight_decay=decay,
        optim_bits=8 if "8bit" in name else 32,
        is_paged=name.startswith("paged"),
    )
    return made


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
