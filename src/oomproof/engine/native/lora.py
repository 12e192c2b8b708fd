"""A device's LoRA adapter: its factors in memory that was planned, and what they add to products.

A and B are held in the compute dtype, A's of linears that share an input as one matrix. The scale
is multiplied into B in float32, before B is rounded: a step has no product with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from oomproof.engine.native.lora_operators import lora_down, lora_up, lora_up_gated
from oomproof.loading.targets import Target
from oomproof.memory.adapter import LoraGroup, LoraLayer, LoraPart


class Lora:
    """What is added to the product of linears that share an input.

    Args:
        a: [rank, columns], of all of them.
        parts: (B [rows, ranks] times its scale, first column of the result, first rank) of each.
    """

    __slots__ = ("_a", "_b", "_parts", "_places")

    def __init__(self, a: torch.Tensor, parts: Sequence[tuple[torch.Tensor, int, int]]) -> None:
        self._a = a
        self._parts = tuple(parts)
        self._b = [b for b, _, _ in parts]
        self._places = [
            number for b, column, first in parts for number in (column, first, b.shape[1])
        ]

    def add(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """To the product of x [tokens, columns] in out [tokens, rows of all linears]."""
        self.down(x, scratch)
        lora_up(scratch, len(self._a), self._b, self._places, out)

    def down(self, x: torch.Tensor, scratch: torch.Tensor) -> None:
        """What `up` and `up_gated` begin with."""
        lora_down(x, self._a, scratch)

    def up(self, out: torch.Tensor, first: int, scratch: torch.Tensor) -> None:
        """To columns first, first + 1, … of the result, which out has alone."""
        end = first + out.shape[1]
        b, places = [], []
        for factor, column, rank in self._parts:
            begin, stop = max(first, column), min(end, column + len(factor))
            if begin < stop:
                b.append(factor[begin - column : stop - column])
                places += [begin - first, rank, factor.shape[1]]
        if b:
            lora_up(scratch, len(self._a), b, places, out)

    def up_gated(self, gate_up: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """To gate and up, and what they are gated to in out."""
        lora_up_gated(scratch, len(self._a), self._b, self._places, gate_up, out)


class LayerLora:
    """The adapters of a layer's products; None where a product has none."""

    __slots__ = ("down", "gate_up", "o", "qkv")

    def __init__(self, groups: Mapping[str, Lora]) -> None:
        self.qkv = groups.get("qkv")
        self.o = groups.get("o")
        self.gate_up = groups.get("gate_up")
        self.down = groups.get("down")

    @property
    def chains(self) -> bool:
        """Whether the products that update the hidden states in place have none."""
        return self.o is None and self.down is None


NO_LORA = LayerLora({})
"""Of a layer without an adapter."""


class LoraWeights:
    """The adapters of a device's layers, one after the other.

    Args:
        layers: Layer → where its adapters lie; of this device alone.
        dtype: What is computed in.
        memory: Of exactly their bytes, on the device.
    """

    def __init__(
        self, layers: Mapping[int, LoraLayer], dtype: torch.dtype, memory: torch.Tensor
    ) -> None:
        # What is behind a rank that was rounded up adds nothing.
        self.memory = memory.zero_()
        self._dtype = dtype
        self._layers: dict[int, tuple[LoraLayer, torch.Tensor]] = {}
        first = 0
        for index, layer in layers.items():
            self._layers[index] = layer, memory[first : first + layer.size_bytes]
            first += layer.size_bytes

    def layer(self, index: int) -> LayerLora:
        """The adapters of a layer."""
        if index not in self._layers:
            return NO_LORA
        laid_out, memory = self._layers[index]
        return LayerLora({group.name: self._group(group, memory) for group in laid_out.groups})

    def targets(self) -> list[Target]:
        """Where the loader brings the tensors of the adapter's file."""
        found = []
        for laid_out, memory in self._layers.values():
            for group in laid_out.groups:
                a = self._matrix(memory, group.offset_bytes, group.rank, group.columns)
                for part in group.parts:
                    one = part.adapted
                    own = a[part.first_rank : part.first_rank + one.rank]
                    found.append(
                        Target(
                            name=one.a.name,
                            shape=one.a.shape,
                            device=own.device,
                            store=partial(_store, own, 1.0),
                            place=own,
                        )
                    )
                    b = self._b(part, memory)[:, : one.rank]
                    found.append(
                        Target(
                            name=one.b.name,
                            shape=one.b.shape,
                            device=b.device,
                            store=partial(_store, b, one.scale),
                        )
                    )
        return found

    def is_finite(self) -> bool:
        """Whether every value is a number. It waits for the device."""
        if not self.memory.numel():
            return True
        return bool(torch.stack(torch.aminmax(self.memory.view(self._dtype))).isfinite().all())

    def _group(self, group: LoraGroup, memory: torch.Tensor) -> Lora:
        return Lora(
            self._matrix(memory, group.offset_bytes, group.rank, group.columns),
            [(self._b(part, memory), part.first_column, part.first_rank) for part in group.parts],
        )

    def _b(self, part: LoraPart, memory: torch.Tensor) -> torch.Tensor:
        return self._matrix(memory, part.offset_bytes, part.adapted.shape[0], part.padded_rank)

    def _matrix(self, memory: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
        size = rows * columns * self._dtype.itemsize
        return memory[offset : offset + size].view(self._dtype).view(rows, columns)


def _store(final: torch.Tensor, scale: float, values: torch.Tensor, first_row: int) -> None:
    part = final[first_row : first_row + len(values)]
    if scale == 1:
        part.copy_(values, non_blocking=True)
    else:
        # In float32: a product of 16 bits would be rounded twice.
        part.copy_(values.float().mul_(scale), non_blocking=True)
