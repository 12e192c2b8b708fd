"""One lane a device: what arrives there is copied, checked, converted, in order.

On a GPU, two streams overlap: one copies into a ring of staging slots, the other converts from
there. Neither makes the host wait; the host waits only for the buffers that it reads into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from oomproof.loading.slices import Batch, Limits, Piece, Slice, Way
from oomproof.loading.sources import Buffer, flat_bytes
from oomproof.units import round_up

_SLOT_ALIGNMENT = 512
FLOATS_8BIT = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""The bits that are all set in NaN and infinity, and in nothing else."""


class Lane(Protocol):
    """What a device does with the pieces that are for it."""

    staging_bytes: int
    """Memory taken beside the final places."""

    def receive(self, piece: Piece, buffer: Buffer | None) -> None:
        """Takes the next piece; when its batch is complete, its slices are converted."""

    def damaged(self) -> list[int]:
        """Waits for all that was received; numbers of the tensors with NaN or infinity."""

    def close(self) -> None:
        """Waits until nothing writes to the staging memory, and gives it back."""


class CpuLane:
    """Converts where the bytes were read to.

    Args:
        tensors: Number of all tensors that are loaded.
    """

    def __init__(self, tensors: int) -> None:
        self.staging_bytes = 0
        self._flags = torch.zeros(tensors, dtype=torch.int32)

    def receive(self, piece: Piece, buffer: Buffer | None) -> None:
        """Converts in the thread that calls."""
        if piece.is_last:
            batch = piece.batch
            region = place_of(*batch.slices) if buffer is None else buffer.memory
            for one in batch.slices:
                _deliver(one, region, self._flags)

    def damaged(self) -> list[int]:
        """Nothing to wait for."""
        return _marked(self._flags)

    def close(self) -> None:
        """Nothing to give back."""


class CudaLane:
    """Copies on one stream, converts on another.

    Args:
        device: With its index.
        batches: Those for this device.
        tensors: Number of all tensors that are loaded.
    """

    def __init__(
        self, device: torch.device, batches: Sequence[Batch], tensors: int, limits: Limits
    ) -> None:
        staged = [batch.size_bytes for batch in batches if batch.way is Way.STAGED]
        self._slot_bytes = round_up(max(staged, default=0), _SLOT_ALIGNMENT)
        slots = min(len(staged), max(1, limits.staging_bytes // max(1, self._slot_bytes)))
        self.staging_bytes = slots * self._slot_bytes
        with torch.cuda.device(device):
            self._flags = torch.zeros(tensors, dtype=torch.int32, device=device)
            self._staging = torch.empty(self.staging_bytes, dtype=torch.uint8, device=device)
            self._copying = torch.cuda.Stream()
            self._converting = torch.cuda.Stream()
            # What the caller still does to the final places, and whoever had the staging memory.
            current = torch.cuda.current_stream()
            self._copying.wait_stream(current)
            self._converting.wait_stream(current)
            self._arrived = torch.cuda.Event()
            self._converted = [torch.cuda.Event() for _ in range(slots)]
        self._slot = -1
        self._region = self._staging

    def receive(self, piece: Piece, buffer: Buffer | None) -> None:
        """Enqueues the copy, and behind the last of a batch its conversion."""
        if buffer is None:
            raise ValueError("a piece for a GPU comes in a buffer")
        batch, begin, end = piece.batch, piece.begin_bytes, piece.end_bytes
        staged = batch.way is Way.STAGED
        with torch.cuda.stream(self._copying):
            if piece.is_first:
                self._region = self._next_slot() if staged else place_of(*batch.slices)
            self._region[begin:end].copy_(buffer.memory[: end - begin], non_blocking=True)
            buffer.sent(self._copying)
        if not piece.is_last:
            return
        self._arrived.record(self._copying)
        with torch.cuda.stream(self._converting):
            self._converting.wait_event(self._arrived)
            for one in batch.slices:
                _deliver(one, self._region, self._flags)
            if staged:
                self._converted[self._slot].record(self._converting)

    def damaged(self) -> list[int]:
        """Waits for the converting stream, which waits for the other."""
        self._converting.synchronize()
        return _marked(self._flags)

    def close(self) -> None:
        """Frees the memory even where the traceback of an error holds views of it."""
        self._copying.synchronize()
        self._converting.synchronize()
        for memory in (self._staging, self._flags):
            memory.untyped_storage().resize_(0)

    def _next_slot(self) -> torch.Tensor:
        """A staging slot; the copying stream waits until it has been converted from."""
        self._slot = (self._slot + 1) % len(self._converted)
        self._copying.wait_event(self._converted[self._slot])
        begin = self._slot * self._slot_bytes
        return self._staging[begin : begin + self._slot_bytes]


def place_of(one: Slice) -> torch.Tensor:
    """The bytes of the final place that a slice goes to as it is."""
    if one.pair.place is None:
        raise ValueError(f"{one.pair.target.name} has no place")
    return flat_bytes(one.pair.place)[one.begin_bytes : one.begin_bytes + one.size_bytes]


def _deliver(one: Slice, region: torch.Tensor, flags: torch.Tensor) -> None:
    """Checks a slice that has arrived in its batch's memory, and hands it to its target."""
    pair, target = one.pair, one.pair.target
    values = region[one.offset_bytes : one.offset_bytes + one.size_bytes].view(pair.dtype)
    if pair.dtype.is_floating_point:
        _check(values, flags, one.number)
    if pair.place is None:
        target.store(values.view(one.shape), one.first_row)
    if one.is_last and target.finish is not None:
        target.finish()


def _check(values: torch.Tensor, flags: torch.Tensor, number: int) -> None:
    if values.is_cuda:
        from oomproof.loading.finite_triton import mark_non_finite

        mark_non_finite(values, flags, number)
    elif values.dtype in FLOATS_8BIT:
        bits = FLOATS_8BIT[values.dtype]
        # A piece at a time, which stays in a processor's cache.
        if any(bool(((p & bits) == bits).any()) for p in values.view(torch.uint8).split(1 << 17)):
            flags[number] = 1
    # Minimum and maximum carry NaN and infinity along, and need no memory of the slice's size.
    elif not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        flags[number] = 1


def _marked(flags: torch.Tensor) -> list[int]:
    return [number for number, flag in enumerate(flags.tolist()) if flag]
