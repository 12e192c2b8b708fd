"""Frozen layers that several ranks share: each holds a part of every layer's bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from oomproof.formats import ceil_div
from oomproof.memory.arena import ALIGNMENT_BYTES
from oomproof.units import MIB, round_up

GATHER_BUFFERS = 2
"""Whole layers that a rank has room for: one is computed with while the next comes together."""
COMM_BYTES = 1440 * MIB
"""What NCCL takes outside torch's allocator, its kernels with it: 1,286 MiB with NCCL 2.28 on two
H200s (benchmarks/results/tuning-ranks-h200.jsonl), and room. More ranks were not measured; over
PCIe it has fewer channels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How layers are cut: the parts of all ranks, one after the other, are a layer and padding."""

    ranks: int
    layers: int
    part_bytes: int
    """Of a layer on one rank, the same for all layers."""

    @property
    def gathered_bytes(self) -> int:
        """A whole layer, padded."""
        return self.ranks * self.part_bytes

    @property
    def parts_bytes(self) -> int:
        """What a rank holds of all layers."""
        return self.layers * self.part_bytes

    @property
    def buffers_bytes(self) -> int:
        """Where layers come together."""
        return GATHER_BUFFERS * self.gathered_bytes


def cut_layers(layer_bytes: Iterable[int], ranks: int) -> Sharding:
    """The cut of layers of these sizes, by the largest."""
    sizes = tuple(layer_bytes)
    part = round_up(ceil_div(max(sizes), ranks), ALIGNMENT_BYTES)
    return Sharding(ranks=ranks, layers=len(sizes), part_bytes=part)
