"""LoRA adapters: all of a model in one float32 tensor, each a parameter by peft's name.

Beside a layer's weights W, an adapter adds scale × B A (arXiv:2106.09685). The A of linears that
share an input lie one after the other, so that they are multiplied as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from oomproof.memory.training_shape import PROJECTIONS, adapter_shapes, linear_shapes
from oomproof.models.spec import ModelSpec
from oomproof.tuning.settings import LoraSettings

_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a matrix lies among a layer's numbers."""

    name: str
    """In the layer: "mlp.up_proj.lora_A.weight"."""
    offset: int
    shape: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Low:
    """Adapters of the linears that share an input, as views of a layer's numbers."""

    a: torch.Tensor
    """[linears × rank, columns]."""
    b: tuple[tuple[int, int, torch.Tensor], ...]
    """(first row, end, B [rows, rank]) of each linear of the projection that has one."""


class Adapters:
    """The trained numbers of a model, and their gradients.

    Args:
        spec: The model.
        settings: Of the adapters.
        device: Where they live.
        seed: Of the A matrices, uniform as peft's; B begins at 0.
        dtype: Of the parameters: float32 beside 16-bit weights, as peft's.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: LoraSettings,
        device: torch.device,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._shapes = adapter_shapes(spec, settings.rank, settings.target_modules)
        self.rank = settings.rank
        self.rows = _rows_of(spec)
        self._lows: dict[str, tuple[Place, tuple[tuple[int, int, Place], ...]]] = {}
        self.places, self.numel = self._lay_out()
        layers = spec.num_hidden_layers
        self.values = torch.zeros(layers, self.numel, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.values)
        self._prefix = f"{_PREFIX}{spec.decoder_prefix}.layers."
        self.parameters: list[dict[str, torch.nn.Parameter]] = [
            {
                place.name: torch.nn.Parameter(_view(self.values[layer], place))
                for place in self.places
            }
            for layer in range(layers)
        ]
        self._grads = [
            [_view(self.grads[layer], place) for place in self.places] for layer in range(layers)
        ]
        self._initialise(seed)

    def _lay_out(self) -> tuple[tuple[Place, ...], int]:
        places: list[Place] = []
        offset = 0
        for kind, names in PROJECTIONS.items():
            present = [name for name in names if name in self._shapes]
            if not present:
                continue
            columns = self._shapes[present[0]][0][1]
            whole = Place(name=kind, offset=offset, shape=(len(present) * self.rank, columns))
            for name in present:
                shape = self._shapes[name][0]
                places.append(Place(name=f"{name}.lora_A.weight", offset=offset, shape=shape))
                offset += prod(shape)
            found, first = [], 0
            for name in names:
                end = first + self.rows[name]
                if name in self._shapes:
                    shape = self._shapes[name][1]
                    place = Place(name=f"{name}.lora_B.weight", offset=offset, shape=shape)
                    places.append(place)
                    found.append((first, end, place))
                    offset += prod(shape)
                first = end
            self._lows[kind] = (whole, tuple(found))
        return tuple(places), offset

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.parameters:
                for name, parameter in layer.items():
                    if ".lora_A." in name:
                        # kaiming_uniform_ with a = √5, as peft and torch's linears have it.
                        bound = 1 / math.sqrt(parameter.shape[1])
                        drawn = torch.empty(parameter.shape).uniform_(
                            -bound, bound, generator=generator
                        )
                        parameter.copy_(drawn)

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(peft's name, parameter) of all layers."""
        for number, layer in enumerate(self.parameters):
            for name, parameter in layer.items():
                yield f"{self._prefix}{number}.{name}", parameter

    def lows(self, numbers: torch.Tensor) -> dict[str, Low]:
        """Projection → its adapters, as views of a layer's numbers [numel]."""
        return {
            kind: Low(
                a=_view(numbers, whole),
                b=tuple((first, end, _view(numbers, place)) for first, end, place in found),
            )
            for kind, (whole, found) in self._lows.items()
        }

    def take_grads(self, layer: int, found: torch.Tensor, scale: torch.Tensor) -> None:
        """Adds a layer's gradients [numel] to those of its parameters, which may have none yet.

        Those are views of `grads` unless somebody put others there.

        Args:
            layer: Its index.
            found: The gradients, in the compute dtype.
            scale: What they are multiplied by, float32 [1].
        """
        grads, parameters = self.grads[layer], self.parameters[layer]
        fresh = [parameter.grad is None for parameter in parameters.values()]
        if all(fresh):
            torch.mul(found, scale, out=grads)
            for parameter, grad in zip(parameters.values(), self._grads[layer], strict=True):
                parameter.grad = grad
            return
        if all(_shares(parameter.grad, grads) for parameter in parameters.values()):
            torch.addcmul(grads, found, scale, out=grads)
            return
        for place, is_fresh in zip(self.places, fresh, strict=True):
            parameter, part = parameters[place.name], _view(found, place)
            if is_fresh:
                parameter.grad = torch.mul(part, scale, out=_view(grads, place))
            else:
                assert parameter.grad is not None
                parameter.grad.addcmul_(part, scale)

    def adopt_grads(self, layer: int) -> None:
        """Makes the gradients of a layer's parameters, where there are any, views of `grads`."""
        grads, parameters = self.grads[layer], self.parameters[layer]
        if all(parameter.grad is None for parameter in parameters.values()):
            return
        for place in self.places:
            parameter, into = parameters[place.name], _view(grads, place)
            if parameter.grad is None:
                parameter.grad = into.zero_()
            elif not _shares(parameter.grad, grads):
                parameter.grad = into.copy_(parameter.grad)


def _rows_of(spec: ModelSpec) -> dict[str, int]:
    return {name: shape[0] for name, shape in linear_shapes(spec).items()}


def _view(numbers: torch.Tensor, place: Place) -> torch.Tensor:
    rows, columns = place.shape
    return numbers[place.offset : place.offset + rows * columns].view(rows, columns)


def _shares(grad: torch.Tensor | None, grads: torch.Tensor) -> bool:
    if grad is None:
        return False
    return grad.untyped_storage().data_ptr() == grads.untyped_storage().data_ptr()
