"""How named buffers share one allocation, computed before there is any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from oomproof.formats import DType
from oomproof.units import round_up

ALIGNMENT_BYTES = 256
"""Of every buffer: what 16-byte vector loads and bulk copies need, with room to spare."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """One tensor in the arena."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    phase: str | None = None
    """Buffers of different phases are never alive together and share memory; None for always."""

    @property
    def size_bytes(self) -> int:
        """Bytes, without alignment."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where each buffer lies."""

    buffers: Mapping[str, Buffer]
    offsets: Mapping[str, int]
    """Bytes from the beginning of the arena."""
    size_bytes: int
    """Of the whole arena."""


def lay_out(buffers: Iterable[Buffer]) -> Layout:
    """Buffers that are always alive one after the other, then the phases over each other."""
    listed = tuple(buffers)
    offsets: dict[str, int] = {}
    ends: dict[str, int] = {}
    always = 0
    for buffer in listed:
        if buffer.phase is None:
            offsets[buffer.name] = always
            always += round_up(buffer.size_bytes, ALIGNMENT_BYTES)
    for buffer in listed:
        if buffer.phase is not None:
            start = ends.get(buffer.phase, always)
            offsets[buffer.name] = start
            ends[buffer.phase] = start + round_up(buffer.size_bytes, ALIGNMENT_BYTES)
    return Layout(
        buffers={buffer.name: buffer for buffer in listed},
        offsets=offsets,
        size_bytes=max(always, *ends.values()) if ends else always,
    )
