"""One look at what a process holds: terms, torch's allocator, resident memory.

torch is never imported: where this process has not imported it, there is no allocator to ask.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import AfterValidator

from oomproof.memory.terms import DeviceTerms
from oomproof.monitoring.events import MAX_COUNT, Bytes, Count, Index, Time
from oomproof.units import MAX_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorFacts:
    """torch's caching allocator on one GPU."""

    allocated_bytes: Bytes
    """In tensors."""
    reserved_bytes: Bytes
    """Taken from the driver."""
    peak_allocated_bytes: Bytes
    peak_reserved_bytes: Bytes
    """High-water marks since loading ended."""
    inactive_split_bytes: Bytes
    """Free pieces of blocks that are partly in use: they cannot be given back."""
    num_ooms: Count = 0
    """Allocations that failed."""
    num_alloc_retries: Count = 0
    """Allocations that succeeded only after caches were freed."""

    @property
    def fragmentation_bytes(self) -> int:
        """Reserved and in no tensor."""
        return max(0, self.reserved_bytes - self.allocated_bytes)

    def as_dict(self) -> dict[str, int]:
        """Plain values, fragmentation among them."""
        return {**asdict(self), "fragmentation_bytes": self.fragmentation_bytes}


def _sane(terms: DeviceTerms) -> DeviceTerms:
    for name, size in terms.as_dict().items():
        if not 0 <= size <= MAX_BYTES:
            raise ValueError(f"{name} is {size}, not from 0 to {MAX_BYTES}")
    return terms


Terms = Annotated[DeviceTerms, AfterValidator(_sane)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSample:
    """One device of a plan."""

    index: Index
    measured: Terms
    """High-water marks, under the names of the plan's terms."""
    allocator: AllocatorFacts | None
    """None for a processor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look."""

    at: Time
    steps: Count
    """Of the engine, so far."""
    requests: Count
    """That ended, so far."""
    rss_bytes: Bytes
    """The process's resident memory."""
    devices: tuple[DeviceSample, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def read_allocator(index: int) -> AllocatorFacts | None:
    """The allocator's counts on a GPU; None where this process has no CUDA in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return allocator_facts(torch.cuda.memory_stats(index))


def allocator_facts(stats: Mapping[str, Any]) -> AllocatorFacts:
    """The counts that matter, of `torch.cuda.memory_stats`; what a version lacks is 0."""

    def count(name: str, most: int = MAX_BYTES) -> int:
        return max(0, min(int(stats.get(name, 0)), most))

    return AllocatorFacts(
        allocated_bytes=count("allocated_bytes.all.current"),
        reserved_bytes=count("reserved_bytes.all.current"),
        peak_allocated_bytes=count("allocated_bytes.all.peak"),
        peak_reserved_bytes=count("reserved_bytes.all.peak"),
        inactive_split_bytes=count("inactive_split_bytes.all.current"),
        num_ooms=count("num_ooms", MAX_COUNT),
        num_alloc_retries=count("num_alloc_retries", MAX_COUNT),
    )
