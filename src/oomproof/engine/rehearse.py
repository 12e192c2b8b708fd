"""A plan run at full size with random weights, and what came of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from oomproof.engine.protocol import Engine
from oomproof.engine.rehearsal import Rung, climb
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.loading.devices import release_devices
from oomproof.memory.terms import DeviceTerms
from oomproof.models.spec import ModelSpec
from oomproof.planning.notes import CalibrationNote, Notes, kind_of
from oomproof.planning.plan import DevicePlan, Plan
from oomproof.units import format_bytes

_ASKED = re.compile(r"Tried to allocate ([0-9.]+) ([KMG]iB)")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a plan became when it was run."""

    plan: Plan
    devices: tuple[DeviceSpec, ...]
    """The devices in use, in the order of plan.devices_in_use."""
    measured: Mapping[int, DeviceTerms]
    """Device index → bytes measured."""
    rungs: tuple[Rung, ...]
    versions: str
    """Of what the engine runs on."""
    load_s: float | None
    """Seconds of making, quantizing and placing the weights; None where that failed."""
    failed: str | None
    """Where and why it ended early; None where it ran through."""
    asked_bytes: int = 0
    """What the allocation that failed had asked for."""
    failed_device: int | None = None

    @property
    def exceeded(self) -> tuple[str, ...]:
        """Devices that took more than was planned, margin aside, in words."""
        return tuple(
            f"{device.name} {device.index} took "
            f"{format_bytes(self.measured[device.index].peak_bytes)}, planned were "
            f"{format_bytes(device.peak_bytes - device.terms.margin)} without margin"
            for device in self.plan.devices_in_use
            if self.measured[device.index].peak_bytes > device.peak_bytes - device.terms.margin
        )

    @property
    def kept_its_promise(self) -> bool:
        """Whether it ran through and no device took more than was planned."""
        return self.failed is None and not self.exceeded

    @property
    def single(self) -> Rung | None:
        """The longest rung of one request: what speeds are told by."""
        alone = [rung for rung in self.rungs if rung.requests == 1]
        return alone[-1] if alone else None

    def notes(self, earlier: Notes) -> list[CalibrationNote]:
        """One for each GPU in use: what the next plan on this machine should know."""
        weight_format = self.plan.weight_format
        kind = kind_of(weight_format)
        return [
            CalibrationNote(
                date=datetime.now(UTC).date().isoformat(),
                device=device.name,
                engine=self.plan.engine,
                kind=kind,
                versions=self.versions,
                model=self.plan.model,
                format=self.plan.format,
                context=self.plan.context,
                concurrency=self.plan.concurrency,
                failed=self.failed,
                cuda_context_bytes=self.measured[device.index].cuda_context,
                workspace_excess_bytes=self._excess(planned),
                decode_factor=self._decode_factor(earlier, device, kind),
                prefill_factor=self._prefill_factor(earlier, device, kind),
            )
            for device, planned in zip(self.devices, self.plan.devices_in_use, strict=True)
            if device.kind == "cuda"
        ]

    def _excess(self, planned: DevicePlan) -> int:
        if self.failed is not None:
            return self.asked_bytes if planned.index == self.failed_device else 0
        measured = self.measured[planned.index]
        over = measured.peak_bytes - measured.cuda_context
        promised = planned.peak_bytes - planned.terms.margin - planned.terms.cuda_context
        return over - promised

    def _decode_factor(self, earlier: Notes, device: DeviceSpec, kind: str) -> float | None:
        predicted = self.plan.tokens_per_second.decode
        rung = self.single
        measured = None if rung is None else rung.tokens_per_second
        # Over several devices the split's own overhead is in the time: it is no device's factor.
        if predicted is None or measured is None or self.plan.pipeline > 1:
            return None
        before, _ = earlier.speed_factors(device, self.plan.engine, kind)
        return round(before * predicted / measured, 4)

    def _prefill_factor(self, earlier: Notes, device: DeviceSpec, kind: str) -> float | None:
        predicted, rung = self.plan.tokens_per_second.prefill, self.single
        if predicted is None or rung is None or self.plan.pipeline > 1:
            return None
        _, before = earlier.speed_factors(device, self.plan.engine, kind)
        return round(before * predicted / rung.prefill_tokens_per_second, 4)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `rehearse --json`."""
        return {
            "model": self.plan.model,
            "format": self.plan.format,
            "context": self.plan.context,
            "concurrency": self.plan.concurrency,
            "engine": self.plan.engine,
            "kept_its_promise": self.kept_its_promise,
            "failed": self.failed,
            "exceeded": list(self.exceeded),
            "load_s": self.load_s,
            "predicted_tokens_per_second": asdict(self.plan.tokens_per_second),
            "rungs": [
                {
                    **asdict(rung),
                    "prefill_tokens_per_second": rung.prefill_tokens_per_second,
                    "tokens_per_second": rung.tokens_per_second,
                }
                for rung in self.rungs
            ],
            "devices": [
                {
                    "index": device.index,
                    "name": device.name,
                    "usable_bytes": device.usable_bytes,
                    "layers": device.layers,
                    "predicted": device.terms.as_dict(),
                    "predicted_peak_bytes": device.peak_bytes - device.terms.margin,
                    "measured": self.measured[device.index].as_dict(),
                    "measured_peak_bytes": self.measured[device.index].peak_bytes,
                }
                for device in self.plan.devices_in_use
            ],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsable:
    """An engine that can be rehearsed."""

    start: Callable[[], Engine]
    """Makes random weights where the plan puts them, and the engine over them."""
    measured: Callable[[], Mapping[int, DeviceTerms]]
    """Device index → bytes measured so far; also of a start that failed."""
    versions: str
    """Of what it runs on."""


def rehearse_plan(
    plan: Plan,
    spec: ModelSpec,
    hardware: Hardware,
    engine: Rehearsable,
    on_rung: Callable[[Rung], None] | None = None,
) -> Rehearsal:
    """Loads random weights as planned, climbs the ladder, and gives everything back.

    Running out of memory is a result, not an error: `failed` says where.

    Raises:
        PlanMismatchError: A loaded parameter differs from the plan.
        CheckpointError: transformers cannot use the model's config.
    """
    rungs: list[Rung] = []
    load_s = None
    started_engine: Engine | None = None
    failure: tuple[str, int, int | None] | None = None

    def done(rung: Rung) -> None:
        rungs.append(rung)
        if on_rung is not None:
            on_rung(rung)

    stage = "loading"
    started = time.perf_counter()
    try:
        started_engine = engine.start()
        _synchronize()
        load_s = round(time.perf_counter() - started, 3)
        stage = "running"
        climb(started_engine, plan, spec.vocab_size, done)
    except torch.OutOfMemoryError as error:
        where = f"running, after {len(rungs)} rungs" if stage == "running" else stage
        failure = (f"out of memory while {where}", _asked_bytes(error), _device_of(error))
    nothing = {device.index: DeviceTerms() for device in plan.devices_in_use}
    measured = nothing | dict(engine.measured())
    if started_engine is not None:
        started_engine.close()
    else:
        release_devices(plan)
    specs = {device.index: device for device in hardware.devices}
    message, asked_bytes, failed_device = failure or (None, 0, None)
    return Rehearsal(
        plan=plan,
        devices=tuple(specs[device.index] for device in plan.devices_in_use),
        measured=measured,
        rungs=tuple(rungs),
        versions=engine.versions,
        load_s=load_s,
        failed=message,
        asked_bytes=asked_bytes,
        failed_device=failed_device,
    )


def _synchronize() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


def _asked_bytes(error: torch.OutOfMemoryError) -> int:
    """Bytes that an allocation had asked for, by the words of torch's caching allocator."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def _device_of(error: torch.OutOfMemoryError) -> int | None:
    found = re.search(r"GPU ([0-9]+) has", str(error))
    return int(found[1]) if found else None
