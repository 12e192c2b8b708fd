"""A measured term above its plan.

On a GPU every term is compared. On a processor model and process live in the same memory and the
workspace is measured by the process's growth, so weights and KV cache are compared to the byte, and
the sum with what the plan has for the device and the process together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from oomproof.hardware.spec import DeviceKind
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import DevicePlan, Plan
from oomproof.units import format_bytes

PEAK = "peak"
"""The sum of a device's terms; no term of its own."""
_EXACT_ON_CPU = ("weights", "kv_cache")
_ON_GPU = tuple(field.name for field in fields(DeviceTerms) if field.name != "margin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Excess:
    """A term that is above its plan."""

    device: int
    term: str
    measured_bytes: int
    planned_bytes: int
    still_fits: bool
    """Whether the device as a whole is within its plan, margin included."""

    @property
    def message(self) -> str:
        """In a line."""
        sum_of = "" if self.still_fits else ", and the device's whole plan is exceeded"
        if self.term == "cuda_context":
            # It is what the driver lost, which is not ours alone.
            sum_of += " (or another process has taken the difference)"
        return (
            f"{self.term} of device {self.device} takes {format_bytes(self.measured_bytes)}, "
            f"planned were {format_bytes(self.planned_bytes)}{sum_of}"
        )


def excesses(plan: Plan, measured: Mapping[int, DeviceTerms]) -> Iterator[Excess]:
    """Every term that is above its plan now, device by device."""
    for device in plan.devices_in_use:
        found = measured.get(device.index)
        if found is None:
            continue
        allowed = allowed_bytes(plan, device)
        fits = found.peak_bytes <= allowed
        for name in terms_over(device.kind, device.terms, found):
            yield Excess(
                device=device.index,
                term=name,
                measured_bytes=getattr(found, name),
                planned_bytes=getattr(device.terms, name),
                still_fits=fits,
            )
        if not fits:
            yield Excess(
                device=device.index,
                term=PEAK,
                measured_bytes=found.peak_bytes,
                planned_bytes=allowed,
                still_fits=False,
            )


def allowed_bytes(plan: Plan, device: DevicePlan) -> int:
    """The most that the plan lets a device's measured terms sum up to."""
    return device.peak_bytes + (plan.host.peak_bytes if device.kind == "cpu" else 0)


def terms_over(kind: DeviceKind, planned: DeviceTerms, measured: DeviceTerms) -> tuple[str, ...]:
    """Names of the terms that are above their plan, of those that such a device is held to."""
    names = _EXACT_ON_CPU if kind == "cpu" else _ON_GPU
    over = [name for name in names if getattr(measured, name) > getattr(planned, name)]
    # Kernels that a GPU behind the first loads while it records are measured as graphs and planned
    # as context. Only the driver's whole share can be held against the plan.
    driver = measured.cuda_context + measured.graphs
    if "graphs" in over and driver <= planned.cuda_context + planned.graphs:
        over.remove("graphs")
    return tuple(over)
