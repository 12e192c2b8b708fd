"""What several checks ask of the facts."""

from __future__ import annotations

from dataclasses import dataclass

from oomproof.doctor.cuda_support import Capability, numbers
from oomproof.doctor.facts import Facts, GpuFacts
from oomproof.errors import HardwareError
from oomproof.hardware.visible import visible_ordinals

_HIDES_ALL = ("", "-1", "NoDevFiles", "none", "void")


@dataclass(frozen=True, kw_only=True, slots=True)
class Visible:
    """What CUDA_VISIBLE_DEVICES leaves of the machine's GPUs."""

    gpus: tuple[GpuFacts, ...]
    setting: str | None
    on_purpose: bool = False
    """Whether the setting is one of those that hide every GPU."""
    names_mig: bool = False
    unknown: str | None = None
    """The first entry that names no GPU of this machine, at which CUDA stops reading."""
    twice: str | None = None
    """An entry that names a GPU for the second time, for which CUDA hides all."""


def visible(facts: Facts) -> Visible:
    """The GPUs that CUDA shows to this process."""
    setting = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if setting is None or not facts.gpus or facts.gpus[0].kind != "cuda":
        return Visible(gpus=facts.gpus, setting=setting)
    uuids = [gpu.uuid or f"GPU-unknown-{gpu.index}" for gpu in facts.gpus]
    entries = [entry.strip() for entry in setting.split(",")]
    if setting.strip() in _HIDES_ALL:
        return Visible(gpus=(), setting=setting, on_purpose=True)
    try:
        ordinals = visible_ordinals(setting, uuids)
        alone = [visible_ordinals(entry, uuids) for entry in entries]
    except HardwareError:
        return Visible(gpus=(), setting=setting, names_mig=True)
    unknown = next((entry for entry, named in zip(entries, alone, strict=True) if not named), None)
    read = entries if unknown is None else entries[: entries.index(unknown)]
    seen: set[int] = set()
    twice = None
    for entry, named in zip(read, alone, strict=False):
        if twice is None and named[0] in seen:
            twice = entry
        seen.add(named[0])
    return Visible(
        gpus=tuple(facts.gpus[ordinal] for ordinal in ordinals),
        setting=setting,
        unknown=unknown,
        twice=twice,
    )


def cuda_gpus(facts: Facts) -> tuple[GpuFacts, ...]:
    """The visible GPUs of NVIDIA that answer."""
    return tuple(gpu for gpu in visible(facts).gpus if gpu.kind == "cuda" and gpu.error is None)


def capabilities(facts: Facts) -> tuple[Capability, ...]:
    """The known compute capabilities of the visible GPUs."""
    return tuple(
        gpu.compute_capability for gpu in cuda_gpus(facts) if gpu.compute_capability is not None
    )


def has_nvidia(facts: Facts) -> bool:
    """Whether there is a GPU of NVIDIA, with or without a driver that works."""
    return any(gpu.kind == "cuda" for gpu in facts.gpus) or bool(facts.driver.gpus_on_bus)


def is_jetson(facts: Facts) -> bool:
    """One of NVIDIA's boards, for which torch has wheels of its own."""
    return "tegra" in facts.system.release.casefold()


def version(facts: Facts, package: str) -> tuple[int, ...]:
    """An installed package's version in numbers, empty where it is absent."""
    return numbers(facts.packages.get(package))


def dotted(capability: Capability | None) -> str:
    """(8, 9) → "8.9"."""
    return "unknown" if capability is None else f"{capability[0]}.{capability[1]}"
