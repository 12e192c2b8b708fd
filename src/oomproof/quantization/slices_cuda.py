"""Products of torch's own with a weight that is dequantized to scratch, slice after slice.

Where two slices fit, the next one is written on a second stream while the present one is read: a
product's tiles seldom fill every multiprocessor to its end. Nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from oomproof.memory.slices import cut_rows
from oomproof.quantization.scratch import ALIGNMENT, aligned

_OVERLAPS = True
"""Whether the next slice is written beside a product, at all."""

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
    """Where slices lie."""

    step: int
    """Rows of each but the last."""
    places: tuple[torch.Tensor, ...]
    """One or two [step, columns], which slices take in turn."""


def room_of(x: torch.Tensor, rows: int, scratch: Scratch, *, most_rows: int | None = None) -> Room:
    """Room for slices of a weight of so many rows, and as many columns as x has.

    Raises:
        ValueError: Not even a row fits.
    """
    columns = x.shape[1]
    cut = cut_rows(
        tokens=len(x),
        rows=rows,
        row_bytes=columns * x.itemsize,
        # Halves that begin aligned.
        room_bytes=scratch.left.numel() // (2 * ALIGNMENT) * (2 * ALIGNMENT),
        most_rows=most_rows,
    )
    in_turn = cut.twice and cut.rows < rows and _may_overlap(x)
    return Room(
        step=cut.rows,
        places=tuple(scratch.cut((cut.rows, columns), x.dtype) for _ in range(1 + in_turn)),
    )


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
    if len(room.places) == 1:
        for first, end in slices:
            part = room.places[0][: end - first]
            dequantize(first, end, part)
            torch.mm(x, part.t(), out=out(first, end))
            yield first, end
        return
    main, side = torch.cuda.current_stream(x.device), _side(x.device)
    # Everything that scratch or the weight was last used for is before this.
    side.begun.record(main)
    side.stream.wait_event(side.begun)

    def write(number: int) -> None:
        first, end = slices[number]
        place = number % 2
        # As torch.cuda.stream does, for a third of the processor's time.
        torch.cuda.set_stream(side.stream)
        try:
            dequantize(first, end, room.places[place][: end - first])
        finally:
            torch.cuda.set_stream(main)
        side.written[place].record(side.stream)

    write(0)
    for number, (first, end) in enumerate(slices):
        place = number % 2
        main.wait_event(side.written[place])
        torch.mm(x, room.places[place][: end - first].t(), out=out(first, end))
        side.read[place].record(main)
        if number + 1 < len(slices):
            # Behind the product, so that the product's tiles are placed first.
            if number:
                side.stream.wait_event(side.read[1 - place])
            write(number + 1)
        yield first, end


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """A second stream of a device, and what the two wait for."""

    stream: torch.cuda.Stream
    begun: torch.cuda.Event
    written: tuple[torch.cuda.Event, torch.cuda.Event]
    read: tuple[torch.cuda.Event, torch.cuda.Event]


@cache
def _side(device: torch.device) -> _Side:
    return _Side(
        stream=torch.cuda.Stream(device=device),
        begun=torch.cuda.Event(),
        written=(torch.cuda.Event(), torch.cuda.Event()),
        read=(torch.cuda.Event(), torch.cuda.Event()),
    )


def _may_overlap(x: torch.Tensor) -> bool:
    return _OVERLAPS and x.is_cuda
