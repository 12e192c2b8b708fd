"""Products of torch's own with a weight that is dequantized to scratch, slice after slice.

Writing the next slice on a second stream while the present one is multiplied gains nothing: a
product fills the GPU (benchmarks/LOG.md). Nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from oomproof.memory.slices import cut_rows
from oomproof.quantization.scratch import ALIGNMENT, aligned

Dequantize = Callable[[int, int, torch.Tensor], None]
"""(first row, end, slice [rows, columns]) → those rows of the weight, written on this stream."""


class Scratch:
    """Cuts tensors out of scratch, one after the other, each aligned."""

    def __init__(self, scratch: torch.Tensor) -> None:
        self._left = scratch[-scratch.data_ptr() % ALIGNMENT :]

    @property
    def left(self) -> torch.Tensor:
        """What has not been cut off."""
        return self._left

    def cut(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor.

        Raises:
            ValueError: It does not fit.
        """
        numel = 1
        for size in shape:
            numel *= size
        size_bytes = numel * dtype.itemsize
        if size_bytes > self._left.numel():
            raise ValueError(
                f"scratch has {self._left.numel()} bytes left, {shape} of {dtype} needs "
                f"{size_bytes}: see least_scratch_bytes"
            )
        cut = self._left[:size_bytes].view(dtype).view(shape)
        self._left = self._left[aligned(size_bytes) :]
        return cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Where slices lie, one after the other."""

    step: int
    """Rows of each but the last."""
    place: torch.Tensor
    """[step, columns]."""


def room_of(x: torch.Tensor, rows: int, scratch: Scratch, *, most_rows: int | None = None) -> Room:
    """Room for slices of a weight of so many rows, and as many columns as x has.

    Raises:
        ValueError: Not even a row fits.
    """
    columns = x.shape[1]
    step = cut_rows(
        tokens=len(x),
        rows=rows,
        row_bytes=columns * x.itemsize,
        room_bytes=scratch.left.numel(),
        most_rows=most_rows,
    )
    return Room(step=step, place=scratch.cut((step, columns), x.dtype))


def slices_of(first: int, end: int, step: int) -> list[tuple[int, int]]:
    """(first row, end) of each."""
    return [(a, min(a + step, end)) for a in range(first, end, step)]


def slice_after_slice(
    x: torch.Tensor, dequantize: Dequantize, out: torch.Tensor, scratch: Scratch
) -> Iterator[tuple[int, int]]:
    """Multiplies with slices of the weight, and yields (first row, end) after each.

    Args:
        x: [tokens, columns].
        dequantize: Writes rows of the weight.
        out: [tokens, rows].
        scratch: Room for the slices.
    """
    rows = out.shape[1]
    room = room_of(x, rows, scratch)
    slices = slices_of(0, rows, room.step)
    return multiply(x, dequantize, slices, lambda first, end: out[:, first:end], room)


def multiply(
    x: torch.Tensor,
    dequantize: Dequantize,
    slices: Sequence[tuple[int, int]],
    out: Callable[[int, int], torch.Tensor],
    room: Room,
) -> Iterator[tuple[int, int]]:
    """Multiplies with slices of the weight, and yields (first row, end) after each.

    Args:
        x: [tokens, columns].
        dequantize: Writes rows of the weight.
        slices: (first row, end) of each, in order.
        out: (first row, end) → where that product goes, [tokens, rows].
        room: Where they lie.
    """
    for first, end in slices:
        part = room.place[: end - first]
        dequantize(first, end, part)
        torch.mm(x, part.t(), out=out(first, end))
        yield first, end
