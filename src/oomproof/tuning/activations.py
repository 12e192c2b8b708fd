"""What layers compute in: buffers of a phase, and what is kept until the backward pass."""

from __future__ import annotations

import torch

from oomproof.memory.training_buffers import phase_layout
from oomproof.memory.training_shape import Kept, TrainingShape
from oomproof.models.spec import ModelSpec
from oomproof.tuning.attention import Attended


class Phase:
    """The buffers of a phase, in one allocation that is there while the phase is open.

    The tensors stay the same, only their storage comes and goes: making views anew, thousands a
    step, would take longer to say than a GPU needs to compute a layer.
    """

    def __init__(
        self, spec: ModelSpec, shape: TrainingShape, name: str, device: torch.device
    ) -> None:
        self.layout = phase_layout(spec, shape, name)
        self._memory = torch.empty(self.layout.size_bytes, dtype=torch.uint8, device=device)
        self._storage = self._memory.untyped_storage()
        self._whole = {name: self._view(name) for name in self.layout.buffers}
        self._views, self._tokens = self._whole, -1
        self.close()

    def open(self, tokens: int) -> None:
        """Allocates them; they show their first rows, at most so many."""
        self._storage.resize_(self.layout.size_bytes)
        if tokens != self._tokens:
            self._tokens = tokens
            self._views = {name: whole[:tokens] for name, whole in self._whole.items()}

    def close(self) -> None:
        """Gives them back."""
        self._storage.resize_(0)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._views[name]

    def __contains__(self, name: str) -> bool:
        return name in self._views

    def _view(self, name: str) -> torch.Tensor:
        buffer, offset = self.layout.buffers[name], self.layout.offsets[name]
        dtype: torch.dtype = getattr(torch, buffer.dtype)
        raw = self._memory[offset : offset + buffer.size_bytes]
        return raw.view(dtype).view(buffer.shape)


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
        self._places: dict[tuple[str, int], torch.Tensor | None] = {}
        self._tokens = -1

    def of(self, name: str, layer: int, tokens: int) -> torch.Tensor | None:
        """Where a layer keeps it, [tokens, columns]; None where it does not."""
        if tokens != self._tokens:
            self._tokens = tokens
            self._places.clear()
        key = name, layer
        if key not in self._places:
            index = layer - (self._layers - self._counts[name])
            place = None if index < 0 else self._buffers[f"kept.{name}"][index, :tokens]
            self._places[key] = place
        return self._places[key]

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

    def __init__(self, phase: Phase, tokens: int) -> None:
        self._phase, self._tokens = phase, tokens

    def __enter__(self) -> Phase:
        self._phase.open(self._tokens)
        return self._phase

    def __exit__(self, *_: object) -> None:
        self._phase.close()
