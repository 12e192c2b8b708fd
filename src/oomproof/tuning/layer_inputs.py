"""The inputs of layers between the forward and the backward pass (arXiv:1604.06174).

They stay on the device, or wait in page-locked host memory: copied there while the next layer
computes, and fetched while the layer behind it does, on a stream of their own.
"""

from __future__ import annotations

import torch


class Checkpoints:
    """On the device.

    Args:
        memory: [layers, tokens, hidden].
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory

    def place(self, layer: int, tokens: int) -> torch.Tensor:
        """Where a layer's input is written, [tokens, hidden]."""
        return self._memory[layer, :tokens]

    def written(self, layer: int, tokens: int) -> None:
        """Says that a layer's input is there, and that the layer has been computed."""

    def saved(self, layer: int, tokens: int) -> torch.Tensor:
        """A layer's input; layers come in falling order."""
        return self.place(layer, tokens)

    def done(self, layer: int, tokens: int) -> None:
        """Says that a layer's backward pass has been computed."""


class OffloadedCheckpoints(Checkpoints):
    """In host memory, with some places on the device that layers take turns in.

    Args:
        memory: [places, tokens, hidden] on a GPU; at least three places, or one for each layer.
        layers: Of the model.
    """

    def __init__(self, memory: torch.Tensor, layers: int) -> None:
        super().__init__(memory)
        self._host = torch.empty(
            (layers, *memory.shape[1:]), dtype=memory.dtype, pin_memory=memory.is_cuda
        )
        self._layers, self._slots = layers, len(memory)
        self._stream = torch.cuda.Stream(memory.device) if memory.is_cuda else None
        self._copied: dict[int, torch.cuda.Event] = {}
        """Layer → when its input has left its place, or has come back."""

    def place(self, layer: int, tokens: int) -> torch.Tensor:
        """See Checkpoints: waits until what was there before has left."""
        before = layer - self._slots
        self._wait(self._copied.pop(before, None))
        return self._memory[layer % self._slots, :tokens]

    def written(self, layer: int, tokens: int) -> None:
        """See Checkpoints: begins its way to the host."""
        self._copy(layer, self._host[layer, :tokens], self._memory[layer % self._slots, :tokens])

    def saved(self, layer: int, tokens: int) -> torch.Tensor:
        """See Checkpoints: the last ones are still in their places."""
        if layer < self._layers - self._slots:
            self._wait(self._copied.pop(layer, None))
        return self._memory[layer % self._slots, :tokens]

    def done(self, layer: int, tokens: int) -> None:
        """See Checkpoints: another one comes to its place."""
        other = layer - self._slots
        if other >= 0:
            # What left this place for the host has done so, or is behind us on the same stream.
            place = self._memory[layer % self._slots, :tokens]
            self._copy(other, place, self._host[other, :tokens])

    def _copy(self, layer: int, into: torch.Tensor, source: torch.Tensor) -> None:
        if self._stream is None:
            into.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._memory.device))
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._copied[layer] = event

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self._memory.device).wait_event(event)
