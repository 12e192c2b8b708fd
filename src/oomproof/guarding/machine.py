"""What the machine has now: free memory as a fresh process would see it, and who holds the rest."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from oomproof.engine.protocol import Engine
from oomproof.hardware.holders import Holder, read_holders
from oomproof.hardware.probe import cpu_device, probe
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.models.resolve import resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.monitoring.monitor import MonitoredEngine
from oomproof.monitoring.record import record_out_of_memory
from oomproof.planning.plan import DevicePlan, Plan
from oomproof.units import GIB

log = logging.getLogger(__name__)
_UNNAMED_BYTES = GIB
"""Less than this of a GPU is the driver's own."""


def free_caches() -> None:
    """Gives back what nobody refers to: Python's cycles, then torch's idle blocks."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def measure(plan: Plan) -> Hardware:
    """The machine now, what this process needs in any case counted as free.

    A plan's terms hold the CUDA context and the runtime of its process. Here both are there
    already, so what they take is added to what is free.

    Args:
        plan: Whose predicted terms count where the driver does not name processes.

    Raises:
        HardwareError: NVML reports a fault.
    """
    hardware = probe()
    if hardware.has_gpu and all(device.kind == "cpu" for device in plan.devices_in_use):
        hardware = replace(hardware, devices=(cpu_device(hardware.host),), links=())
    devices = tuple(
        replace(device, free_bytes=min(device.total_bytes, device.free_bytes + own))
        for device in hardware.devices
        for own in (_own_bytes(device, plan),)
    )
    host = hardware.host
    available = min(host.total_ram_bytes, host.available_ram_bytes + _own_ram_bytes(plan))
    return replace(hardware, devices=devices, host=replace(host, available_ram_bytes=available))


def keep(error: BaseException, plan: Plan, engine: Engine | None) -> Path | None:
    """Keeps what is known of memory that ran out; the file, or None where nothing can be kept.

    To be called in the handler, while the memory is still held.
    """
    samples = engine.sampler.samples if isinstance(engine, MonitoredEngine) else ()
    try:
        return record_out_of_memory(error, plan, tuple(samples)).file
    except Exception:
        # What explains a failure must not take its place.
        log.exception("what is known of a failed allocation cannot be kept")
        return None


def others_of(plan: Plan) -> tuple[Holder, ...]:
    """The other processes with memory on the plan's GPUs."""
    used = {device.index: device for device in plan.devices_in_use if device.kind == "cuda"}
    if not used:
        return ()
    found, present = read_holders(), {device.index: device for device in probe().devices}
    others: list[Holder] = []
    for index, planned in used.items():
        named = without_own(
            [one for one in found if one.device == index],
            _reserved_bytes(index),
            planned.terms.cuda_context,
        )
        others += named
        if (device := present.get(index)) is not None:
            taken = device.total_bytes - device.free_bytes - _own_total_bytes(planned)
            taken -= sum(one.used_bytes or 0 for one in named)
            if taken > _UNNAMED_BYTES:
                others.append(Holder(device=index, pid=None, name="?", used_bytes=taken))
    return tuple(others)


def without_own(
    holders: Sequence[Holder], reserved_bytes: int | None, context_bytes: int
) -> list[Holder]:
    """The other processes of one GPU.

    In a container the driver may list this process by the host's number, which nobody here knows:
    the one that holds what torch has reserved, and no more than a context beside it, is taken out.

    Args:
        holders: Of one GPU.
        reserved_bytes: By this process's torch; None where it has no CUDA.
        context_bytes: What a context is planned to take.
    """
    others = [one for one in holders if one.pid != os.getpid()]
    if reserved_bytes is None or len(others) < len(holders):
        return others
    near = [
        one
        for one in others
        if one.used_bytes is not None
        and 0 <= one.used_bytes - reserved_bytes <= 2 * context_bytes
        and (one.pid is None or not psutil.pid_exists(one.pid))
    ]
    if near:
        others.remove(min(near, key=lambda one: one.used_bytes or 0))
    return others


def find_model(name: str) -> ModelSpec:
    """A model by its name, with the headers of its checkpoint.

    Raises:
        InputError: There is none.
    """
    return with_checkpoint(resolve(str(Path(name)) if name.startswith((".", "~")) else name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the ladder asks of the machine; tests give it others."""

    measure: Callable[[Plan], Hardware] = measure
    """From the plan that was running to the machine as it is now."""
    holders: Callable[[Plan], tuple[Holder, ...]] = others_of
    find: Callable[[str], ModelSpec] = find_model
    """From a smaller model's name to what it is, with the headers of its checkpoint."""
    sleep: Callable[[float], None] = time.sleep
    keep: Callable[[BaseException, Plan, Engine | None], Path | None] = keep
    """From an error, the plan and the engine that met it to where what is known of it is kept."""


def _own_bytes(device: DeviceSpec, plan: Plan) -> int:
    if device.kind == "cpu":
        return _own_ram_bytes(plan)
    reserved = _reserved_bytes(device.index) if device.kind == "cuda" else None
    if reserved is None:
        return 0
    for one in read_holders():
        if (one.device, one.pid) == (device.index, os.getpid()) and one.used_bytes is not None:
            return max(0, one.used_bytes - reserved)
    planned = next((p for p in plan.devices_in_use if p.index == device.index), None)
    return 0 if planned is None else planned.terms.cuda_context


def _own_total_bytes(planned: DevicePlan) -> int:
    """What this process holds of a GPU, its context by the plan."""
    reserved = _reserved_bytes(planned.index)
    return 0 if reserved is None else reserved + planned.terms.cuda_context


def _own_ram_bytes(plan: Plan) -> int:
    return int(min(plan.host.terms.runtime, psutil.Process().memory_info().rss))


def _reserved_bytes(device: int) -> int | None:
    """By torch on a GPU; None where this process has no CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.memory_reserved(device))
