"""Whether the GPUs themselves are well: lost ones, memory errors, faults, heat, modes."""

from __future__ import annotations

from oomproof.doctor.facts import Facts, GpuFacts
from oomproof.doctor.findings import Capability, Check, Finding, Summary
from oomproof.doctor.remedies import nvidia_smi, restart
from oomproof.doctor.view import cuda_gpus, visible

_FATAL_XIDS = {
    48: "double-bit memory error",
    64: "a bad row could not be remapped",
    79: "fell off the bus",
    95: "uncontained memory error",
    119: "its system processor does not answer",
    120: "its system processor failed",
}
"""NVIDIA's "Xid errors": those after which a GPU is not to be used as it is."""
_HOT_C = 90


def lost_gpu(facts: Facts) -> Finding | None:
    """A GPU that does not answer NVML, which then fails for all of them when models are planned."""
    for gpu in facts.gpus:
        if gpu.error is not None:
            return Finding(
                status="missing",
                detail=f"GPU {gpu.index} ({gpu.name or gpu.bus_id}) does not answer: {gpu.error}",
                remedy=restart(facts) + _unless_gone(gpu),
            )
    return None


def _unless_gone(gpu: GpuFacts) -> str:
    return (
        " (if it comes back: check its power and its seat)" if "LOST" in (gpu.error or "") else ""
    )


def _memory_errors(facts: Facts) -> Finding | None:
    for position, gpu in enumerate(facts.gpus):
        if gpu.remap_failed:
            rest = [str(other.index) for other in facts.gpus if other is not gpu]
            return Finding(
                status="missing",
                detail=f"GPU {gpu.index} ({gpu.name}) has no spare row left for a bad one: replace "
                "it",
                remedy=f"export CUDA_VISIBLE_DEVICES={','.join(rest) or '-1'}",
            )
        if gpu.remap_pending or gpu.uncorrected_errors:
            count = gpu.uncorrected_errors or 0
            return Finding(
                status="limited",
                detail=f"GPU {gpu.index} ({gpu.name}): {count} uncorrected memory errors since the "
                "driver was loaded"
                + (", a bad row waits for a reset" if gpu.remap_pending else ""),
                remedy=nvidia_smi(facts, position, "--gpu-reset"),
            )
    return None


def _xids(facts: Facts) -> Finding | None:
    for fault in facts.xids or ():
        if fault.code in _FATAL_XIDS:
            return Finding(
                status="limited",
                detail=f"the kernel's log has Xid {fault.code} of GPU {fault.bus_id}: "
                f"{_FATAL_XIDS[fault.code]}",
                remedy=restart(facts),
            )
    return None


def _throttling(facts: Facts) -> Finding | None:
    for gpu in cuda_gpus(facts):
        hot = gpu.temperature_c is not None and gpu.temperature_c >= _HOT_C
        if not gpu.throttling and not hot:
            continue
        degrees = "" if gpu.temperature_c is None else f" at {gpu.temperature_c} °C"
        heat = hot or "heat" in gpu.throttling
        return Finding(
            status="limited",
            detail=f"GPU {gpu.index} ({gpu.name}) is slowed down{degrees}: "
            f"{', '.join(gpu.throttling) or 'heat'}",
            remedy="cool it: free its fans and air, or lower its power limit (sudo nvidia-smi -pl)"
            if heat
            else "give it power: check its cables and the power supply",
        )
    return None


def _exclusive(facts: Facts) -> Finding | None:
    for position, gpu in enumerate(facts.gpus):
        if gpu.compute_mode == "exclusive" and gpu in cuda_gpus(facts) and not gpu.processes:
            return Finding(
                status="limited",
                detail=f"GPU {gpu.index} ({gpu.name}) is in exclusive mode: one process at a time",
                remedy=nvidia_smi(facts, position, "-c DEFAULT"),
            )
    return None


def _summary(facts: Facts) -> Summary:
    gpus = cuda_gpus(facts)
    if not gpus:
        kinds = {gpu.kind for gpu in visible(facts).gpus}
        return Summary(
            status="ok" if kinds == {"mps"} else "missing",
            detail="nothing is reported of this GPU" if kinds == {"mps"} else "no GPU is visible",
        )
    parts = ["no fault"]
    degrees = [gpu.temperature_c for gpu in gpus if gpu.temperature_c is not None]
    if degrees:
        parts.append(f"{max(degrees)} °C")
    if any(gpu.ecc for gpu in gpus):
        parts.append("ECC on")
    if any(gpu.persistence is False for gpu in gpus):
        parts.append("persistence mode off (a first use takes longer)")
    return Summary(detail=", ".join(parts))


GPU_HEALTH = Capability(
    name="GPU health",
    summary=_summary,
    checks=(
        Check(name="gpu-lost", run=lost_gpu),
        Check(name="memory-errors", run=_memory_errors),
        Check(name="xid", run=_xids),
        Check(name="throttling", run=_throttling),
        Check(name="exclusive-mode", run=_exclusive),
    ),
)
