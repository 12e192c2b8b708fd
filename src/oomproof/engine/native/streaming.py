"""Layers that stay in pinned host memory: one computes while the next one travels.

The streamed layers are used in a circle, step after step, so the link never rests: as soon as a
layer has been computed, its buffer receives the one after the next, across the border of a step
too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oomproof.engine.native.layout import Block
from oomproof.engine.native.weights import LayerWeights
from oomproof.memory.native import STREAMING_BUFFERS


class LayerStream:
    """Streamed layers of one device.

    Args:
        first: Index of the first of them.
        blocks: What each holds, in order.
        buffers: Device memory, STREAMING_BUFFERS of at least the largest block.
        compute_stream: On which layers are computed.
    """

    def __init__(
        self,
        first: int,
        blocks: Sequence[Block],
        buffers: Sequence[torch.Tensor],
        compute_stream: torch.cuda.Stream,
    ) -> None:
        self._first = first
        self._buffers = buffers
        self.host = [
            torch.empty(block.size_bytes, dtype=torch.uint8, pin_memory=True) for block in blocks
        ]
        """Pinned memory of each layer."""
        self._views = [[LayerWeights(block, buffer) for block in blocks] for buffer in buffers]
        self._compute = compute_stream
        self._copies = torch.cuda.Stream(device=buffers[0].device)
        self._arrived = [torch.cuda.Event() for _ in buffers]
        self._free = [torch.cuda.Event() for _ in buffers]
        self._turn = 0
        """Layers computed so far, in all."""

    @property
    def size_bytes(self) -> int:
        """Pinned memory of all layers."""
        return sum(layer.nbytes for layer in self.host)

    def start(self) -> None:
        """Sends the first layers on their way; the host copies are final now."""
        self._compute.synchronize()
        for turn in range(STREAMING_BUFFERS):
            self._free[turn].record(self._compute)
            self._send(turn)

    def weights(self, index: int) -> LayerWeights:
        """A layer's weights; the compute stream waits until they have arrived."""
        number = self._turn % len(self.host)
        assert index == self._first + number
        place = self._turn % STREAMING_BUFFERS
        self._compute.wait_event(self._arrived[place])
        return self._views[place][number]

    def done(self) -> None:
        """The layer just computed gives its buffer to the one after the next."""
        self._free[self._turn % STREAMING_BUFFERS].record(self._compute)
        self._send(self._turn + STREAMING_BUFFERS)
        self._turn += 1

    def _send(self, turn: int) -> None:
        place = turn % STREAMING_BUFFERS
        source = self.host[turn % len(self.host)]
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._free[place])
            self._buffers[place][: source.numel()].copy_(source, non_blocking=True)
            self._arrived[place].record(self._copies)
