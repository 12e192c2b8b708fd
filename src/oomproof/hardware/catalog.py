"""Accelerators by name: what a machine has that is described and not there.

The figures are in catalog_data.py. A spelling is compared without case, spaces, hyphens and
vendor words, so "A100-80GB", "nvidia a100 80 GB" and "A100_80G" are one card; a spelling that
names several cards is refused with the choices, never guessed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from oomproof.errors import HardwareError
from oomproof.hardware.spec import DeviceKind, DeviceSpec
from oomproof.units import GIB, MIB

_ARCHITECTURES = (
    ((5, 0), "maxwell"),
    ((6, 0), "pascal"),
    ((7, 0), "volta"),
    ((7, 5), "turing"),
    ((8, 0), "ampere"),
    ((8, 9), "ada"),
    ((9, 0), "hopper"),
    ((10, 0), "blackwell"),
    ((13, 0), "unknown"),
)
"""The first compute capability of each NVIDIA architecture, in order."""

_VENDOR_WORDS = re.compile(
    r"\b(?:nvidia|geforce|tesla|quadro|amd|radeon|instinct|apple|gpu|graphics|generation|edition)\b"
)
_MEMORY_TOLERANCE = 0.1
_MAX_CHOICES = 6
_METAL_SMALL_MEMORY_BYTES = 36 * GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """One accelerator as it is sold."""

    key: str
    """How we write it: "A100-80GB", "RTX 4090", "M3 Max 128GB"."""
    name: str
    """How the driver, or the operating system, prints it."""
    aliases: tuple[str, ...] = ()
    """Further spellings; one that several accelerators share is ambiguous."""
    kind: DeviceKind
    architecture: str
    compute_capability: tuple[int, int] | None
    """CUDA compute capability, None for other vendors."""
    label_gb: int
    """Memory on the label; vendors mean GiB or a little less."""
    total_bytes: int
    """Memory that the driver reports."""
    free_bytes: int
    """Memory that a process can allocate on an idle card, before a context of its own."""
    free_is_estimate: bool = False
    """Whether free_bytes was derived from similar cards and not held against a report."""
    bandwidth_bytes_per_s: float
    """Peak memory bandwidth by the datasheet."""
    flops_per_s: float | None
    """Dense 16-bit matrix rate with fp32 accumulation; None where the vendor states none."""
    unified_memory: bool = False
    """Whether the memory is shared with the processor."""
    source: str
    """Where bandwidth and rate come from."""

    def device(self, index: int) -> DeviceSpec:
        """An idle accelerator of this name at that position."""
        return DeviceSpec(
            index=index,
            name=self.name,
            kind=self.kind,
            total_bytes=self.total_bytes,
            free_bytes=self.free_bytes,
            compute_capability=self.compute_capability,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            flops_per_s=self.flops_per_s,
            unified_memory=self.unified_memory,
        )


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """Every accelerator we know, NVIDIA first."""
    return (*_discrete(), *_apple())


def lookup(text: str) -> Accelerator:
    """The accelerator that a person means by "RTX 4090", "rtx4090", "4090" or "A100 80GB".

    Raises:
        HardwareError: Nothing or more than one accelerator answers to the name.
    """
    found = _spellings().get(_normalize(text), ())
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(accelerator.key for accelerator in found)
        raise HardwareError(
            f"{text!r} names {len(found)} different GPUs", remedy=f"write one of {choices}"
        )
    raise HardwareError(f"unknown GPU {text!r}", remedy=_suggestion(text))


def match(name: str, total_bytes: int | None) -> Accelerator | None:
    """The catalog's entry for a real device, None where it has none.

    Several cards share a name (RTX 3080 with 10 and 12 GB): the memory decides, within 10 %.

    Args:
        name: What the driver or the operating system calls the device.
        total_bytes: Memory that it reports, None where it has none of its own.
    """
    found = _spellings().get(_normalize(name), ())
    if total_bytes is None:
        return found[0] if len(found) == 1 else None
    near = [
        accelerator
        for accelerator in found
        if abs(accelerator.total_bytes - total_bytes) <= _MEMORY_TOLERANCE * accelerator.total_bytes
    ]
    return min(near, key=lambda one: abs(one.total_bytes - total_bytes), default=None)


def architecture_of(compute_capability: tuple[int, int] | None) -> str:
    """NVIDIA's architecture: "ampere", "ada", "hopper" …; "unknown" for none, older or newer."""
    architecture = "unknown"
    if compute_capability is not None:
        for first, name in _ARCHITECTURES:
            if compute_capability >= first:
                architecture = name
    return architecture


def metal_budget_bytes(memory_bytes: int) -> int:
    """What a Mac lends its GPU: 3/4 of the memory, 2/3 where that is under 36 GiB.

    Metal's recommendedMaxWorkingSetSize has these values on Macs with default settings; the call
    itself would need a Metal binding.
    """
    share = (
        memory_bytes * 2 // 3 if memory_bytes < _METAL_SMALL_MEMORY_BYTES else memory_bytes // 4 * 3
    )
    return share // MIB * MIB


def _discrete() -> Iterator[Accelerator]:
    from oomproof.hardware import catalog_data as table

    for kind, architecture, capability, source, rows in table.GROUPS:
        for key, name, label_gb, total_mib, free_mib, gb_per_s, tflops in rows:
            yield Accelerator(
                key=key,
                name=name,
                aliases=table.FURTHER_SPELLINGS.get(key, ()),
                kind=kind,
                architecture=architecture,
                compute_capability=capability,
                label_gb=label_gb,
                total_bytes=total_mib * MIB,
                free_bytes=free_mib * MIB,
                free_is_estimate=key not in table.REPORTED_FREE,
                bandwidth_bytes_per_s=gb_per_s * 1e9,
                flops_per_s=tflops * 1e12,
                unified_memory=key in table.UNIFIED,
                source=source,
            )


def _apple() -> Iterator[Accelerator]:
    from oomproof.hardware import catalog_data as table

    for chip, sizes_gib, gb_per_s, tflops in table.APPLE:
        for size_gib in sizes_gib:
            yield Accelerator(
                key=f"{chip} {size_gib}GB",
                name=f"Apple {chip}",
                kind="mps",
                architecture="apple",
                compute_capability=None,
                label_gb=size_gib,
                total_bytes=size_gib * GIB,
                free_bytes=metal_budget_bytes(size_gib * GIB),
                free_is_estimate=True,
                bandwidth_bytes_per_s=gb_per_s * 1e9,
                flops_per_s=None if tflops is None else tflops * 1e12,
                unified_memory=True,
                source=table.APPLE_SOURCE,
            )


def _normalize(text: str) -> str:
    words = re.sub(r"[\s_-]+", " ", text.casefold())
    packed = re.sub(r"[^a-z0-9]", "", _VENDOR_WORDS.sub("", words))
    return re.sub(r"([0-9])g(?:i?b)?$", r"\1gb", packed)


@cache
def _spellings() -> Mapping[str, tuple[Accelerator, ...]]:
    """Normalized spelling → the accelerators it names; a key names its own accelerator alone."""
    spellings: dict[str, tuple[Accelerator, ...]] = {}
    for accelerator in accelerators():
        for spelling in _ways_to_write(accelerator):
            spellings[spelling] = (*spellings.get(spelling, ()), accelerator)
    return spellings


def _ways_to_write(accelerator: Accelerator) -> set[str]:
    ways = {_normalize(text) for text in (accelerator.key, accelerator.name, *accelerator.aliases)}
    ways |= {way.removeprefix(brand) for way in ways for brand in ("rtx", "gtx", "rx")}
    # "RTX 4090 24GB": the label's memory may follow any name that does not end in one.
    ways |= {f"{way}{accelerator.label_gb}gb" for way in ways if not way.endswith("gb")}
    return ways


def _suggestion(text: str) -> str:
    near = difflib.get_close_matches(_normalize(text), _spellings(), n=3, cutoff=0.6)
    keys = dict.fromkeys(one.key for spelling in near for one in _spellings()[spelling])
    if keys:
        return f"did you mean {', '.join(list(keys)[:_MAX_CHOICES])}?"
    return 'write a name such as "RTX 4090" or "A100-80GB", or free memory such as "24GiB"'
