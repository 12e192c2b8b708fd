"""Frozen layers of which each rank holds a part, and has the whole just while it computes with it.

That is what stage 3 of ZeRO does with parameters (Rajbhandari et al. 2020, arXiv:1910.02054), and
torch's FSDP2 with DTensors. It is done by hand here because neither finds anything to hold on to:
weights are codes and scales in tiles that kernels read by their place in a layer's bytes, no module
has them as parameters, and one autograd function is the whole model, so that no hook is called
between two layers. What is left is simple: weights do not change, so there is nothing to scatter
back, and the order of layers is known, so that the next one travels while one computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from oomproof.memory.sharding import GATHER_BUFFERS, Sharding
from oomproof.tuning.distributed import Exchange, Ranks


class ShardedLayers:
    """The parts of this rank, and the buffers that layers come together in, in turns.

    Args:
        memory: uint8 [parts_bytes + buffers_bytes] of the sharding.
        sharding: How layers are cut.
        ranks: Who has the other parts.
    """

    def __init__(self, memory: torch.Tensor, sharding: Sharding, ranks: Ranks) -> None:
        parts, buffers = memory.split([sharding.parts_bytes, sharding.buffers_bytes])
        self._parts = parts.view(sharding.layers, sharding.part_bytes)
        self._buffers: list[torch.Tensor] = list(buffers.split(sharding.gathered_bytes))
        self._ranks = ranks
        self._held: list[int | None] = [None] * GATHER_BUFFERS
        """The layer that is in each buffer, or on its way there."""
        self._coming: list[Exchange | None] = [None] * GATHER_BUFFERS

    @property
    def ranks(self) -> Ranks:
        """Who has the other parts."""
        return self._ranks

    def place(self, layer: int) -> torch.Tensor:
        """Where a layer's bytes are while it is at work, and padding: neighbours differ in it."""
        return self._buffers[layer % GATHER_BUFFERS]

    def take(self, layer: int, following: int | None) -> None:
        """Brings a layer to its place, and lets the next one begin to come to the other.

        What was launched so far must be all that uses the layer before; what is launched from now
        on finds this one there.

        Args:
            layer: Its index.
            following: The neighbour that is taken next; None where it is not known.
        """
        self._begin(layer)
        self._arrive(layer % GATHER_BUFFERS)
        if following is not None:
            self._begin(following)

    def _begin(self, layer: int) -> None:
        slot = layer % GATHER_BUFFERS
        # Of the two last layers of a pass the next one begins with nothing has to travel.
        if self._held[slot] == layer:
            return
        self._arrive(slot)
        self._held[slot] = None
        # It waits for what is launched already: the layer that was here has been computed.
        self._coming[slot] = self._ranks.gather(self._buffers[slot], self._parts[layer])
        self._held[slot] = layer

    def _arrive(self, slot: int) -> None:
        coming, self._coming[slot] = self._coming[slot], None
        if coming is not None:
            coming.wait()

    def fill(self, load: Callable[[int], None]) -> None:
        """Loads all layers, each on one rank, which hands its parts out.

        So each rank reads and quantizes its share of the layers, and nothing takes more memory
        than the buffers.

        Args:
            load: Brings a layer to its place.
        """
        size, rank, layers = self._ranks.size, self._ranks.rank, len(self._parts)
        self._held = [None] * GATHER_BUFFERS
        for first in range(0, layers, size):
            own = first + rank
            if own < layers:
                load(own)
            whole = self.place(own)
            count = min(size, layers - first)
            into = self._parts[first : first + count].view(-1)
            if count < size:
                # The last round has no layer for some ranks: what they send is dropped.
                into = self.place(own + 1)
            self._ranks.trade(into, whole)
            if count < size:
                self._parts[first:].copy_(into.view(size, -1)[:count])
            if whole.is_cuda:
                # The loader has streams of its own, which do not wait for this one.
                torch.cuda.synchronize(whole.device)
