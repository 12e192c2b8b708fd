"""What layers compute in: buffers of a phase, and what is kept until the backward pass."""

from __future__ import annotations

import torch

from oomproof.memory.training_buffers import phase_layout
from oomproof.memory.training_shape import Kept, TrainingShape
from oomproof.models.spec import ModelSpec
from oomproof.tuning.attention import Attended


class Phase:
    """The buffers of a phase, in one allocation that lives as long as this does."""

    def __init__(self, spec: ModelSpec, shape: TrainingShape, name: str) -> None:
        self.layout = phase_layout(spec, shape, name)
        self._memory: torch.Tensor | None = None

    def open(self, device: torch.device) -> None:
        """Allocates them."""
        self._memory = torch.empty(self.layout.size_bytes, dtype=torch.uint8, device=device)

    def close(self) -> None:
        """Gives them back."""
        self._memory = None

    def __getitem__(self, name: str) -> torch.Tensor:
        assert self._memory is not None
        buffer, offset = self.layout.buffers[name], self.layout.offsets[name]
        dtype: torch.dtype = getattr(torch, buffer.dtype)
        raw = self._memory[offset : offset + buffer.size_bytes]
        return raw.view(dtype).view(buffer.shape)

    def __contains__(self, name: str) -> bool:
        return name in self.layout.buffers


class Activations:
    """What layers keep from the forward to the backward pass, in buffers that are always there.

    Args:
        buffers: Name → buffer, of memory.training.static_buffers.
        kept: How many layers keep what.
        layers: Of the model.
    """

    def __init__(self, buffers: dict[str, torch.Tensor], kept: Kept, layers: int) -> None:
        self._buffers = buffers
        self._counts = {name: getattr(kept, name) for name in Kept.__slots__}
        self._layers = layers
        self._attended: dict[int, Attended] = {}

    def of(self, name: str, layer: int, tokens: int) -> torch.Tensor | None:
        """Where a layer keeps it, [tokens, columns]; None where it does not."""
        index = layer - (self._layers - self._counts[name])
        return None if index < 0 else self._buffers[f"kept.{name}"][index, :tokens]

    def keep_attended(self, layer: int, tokens: int, attended: Attended) -> Attended:
        """Copies attention's result to its place, where the layer has one."""
        out = self.of("attention", layer, tokens)
        if out is None:
            return attended
        out.copy_(attended.out)
        index = layer - (self._layers - self._counts["attention"])
        place = self._buffers["kept.lse"][index].view(-1)
        lse = attended.lse
        if lse.numel() <= place.numel() and lse.dtype is place.dtype:
            lse = place[: lse.numel()].view(lse.shape).copy_(lse)
        kept = Attended(out=out, lse=lse, state=attended.state)
        self._attended[layer] = kept
        return kept

    def take_attended(self, layer: int) -> Attended | None:
        """Attention's result, once."""
        return self._attended.pop(layer, None)

    def forget(self) -> None:
        """Drops what a pass that was never finished left."""
        self._attended.clear()


class opened:  # noqa: N801 - reads as a verb
    """Opens a phase for a block of code."""

    def __init__(self, phase: Phase, device: torch.device) -> None:
        self._phase, self._device = phase, device

    def __enter__(self) -> Phase:
        self._phase.open(self._device)
        return self._phase

    def __exit__(self, *_: object) -> None:
        self._phase.close()
