"""Cuts a checkpoint into what is read, what travels and what is converted at a time.

A slice is some rows of one tensor: what one call of a target's `store` gets. A batch is what lies
side by side on a device while it is converted: one slice, or several small ones that follow each
other in the file. A piece is what one read brings: a contiguous range of a file, part of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

import torch

from oomproof.errors import LoadError
from oomproof.formats import ceil_div
from oomproof.loading.targets import Pair
from oomproof.memory.native import DEVICE_STAGING_BYTES, PINNED_BYTES, TILING_BYTES
from oomproof.models.spec import CheckpointTensor
from oomproof.units import MIB, format_bytes, round_up

_ALIGNMENT = 256
"""Slices begin at multiples of this many bytes, as a device's own allocations do, so that kernels
need no variant for what the file's offsets happen to be."""
_MAX_PARTS = 512
"""Parts of a piece; POSIX lets one read fill 1,024."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How large things may be on the way."""

    piece_bytes: int = 8 * MIB
    """One read, and one copy to a device."""
    slice_bytes: int = 32 * MIB
    """One slice and one batch, unless `Target.rows_multiple` rows are more."""
    pinned_bytes: int = PINNED_BYTES
    staging_bytes: int = DEVICE_STAGING_BYTES - TILING_BYTES
    """Of each device; the rest is for targets that hold 4-bit weights in tiles."""


DEFAULT_LIMITS = Limits()


class Way(Enum):
    """How bytes get from the file to their final place."""

    PLACED = "placed"
    """Into the place as they are: read there on the CPU, copied there on a GPU."""
    STAGED = "staged"
    """Through page-locked memory into a GPU's staging, converted from there."""
    HOST = "host"
    """Read into host memory, converted from there on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Some rows of one tensor."""

    pair: Pair
    number: int
    """Index of the tensor among all that are loaded."""
    first_row: int
    shape: tuple[int, ...]
    begin_bytes: int
    """From the beginning of the tensor."""
    size_bytes: int
    is_last: bool
    """Whether it is the tensor's last."""
    offset_bytes: int = 0
    """From the beginning of its batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A range of bytes of one slice, contiguous in its file and in its batch."""

    source: CheckpointTensor
    file_bytes: int
    """Where it begins in the file."""
    batch_bytes: int
    """Where it begins in the batch."""
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Slices that are converted together."""

    way: Way
    device: torch.device
    slices: tuple[Slice, ...]

    @property
    def size_bytes(self) -> int:
        """Of all slices, with the gaps between them."""
        last = self.slices[-1]
        return last.offset_bytes + last.size_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one read brings: parts of one batch that follow each other in a file."""

    batch: Batch
    parts: tuple[Part, ...]
    is_first: bool
    """Of its batch."""
    is_last: bool

    @property
    def is_buffered(self) -> bool:
        """Whether it is read into a buffer, not to where it stays."""
        return self.batch.way is not Way.PLACED or self.batch.device.type != "cpu"

    @property
    def begin_bytes(self) -> int:
        """Where it begins in the batch."""
        return self.parts[0].batch_bytes

    @property
    def end_bytes(self) -> int:
        """Where it ends in the batch."""
        return self.parts[-1].batch_bytes + self.parts[-1].size_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of the file, without the gaps between parts."""
        return sum(part.size_bytes for part in self.parts)


def cut_rows(
    shape: tuple[int, ...], itemsize: int, *, rows_multiple: int, limit_bytes: int
) -> Iterator[tuple[int, int]]:
    """(first row, rows) of slices of about equal size, within the limit where that is possible.

    Each begins at a multiple of `rows_multiple`; a scalar is one row. Nothing for an empty tensor.
    """
    rows = shape[0] if shape else 1
    group_bytes = prod(shape[1:]) * itemsize * rows_multiple
    if not rows or not group_bytes:
        return
    groups = ceil_div(rows, rows_multiple)
    count = ceil_div(groups, max(1, limit_bytes // group_bytes))
    step = ceil_div(groups, count) * rows_multiple
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def cut_slices(pair: Pair, number: int, limits: Limits) -> list[Slice]:
    """The slices of one tensor, in order of rows.

    Raises:
        LoadError: The rows that must stay together are more than what may be held at a time.
    """
    way, shape, itemsize = way_of(pair), pair.target.shape, pair.dtype.itemsize
    host = way is Way.HOST
    limit = min(limits.slice_bytes, limits.piece_bytes) if host else limits.slice_bytes
    most = limits.pinned_bytes if host else limits.staging_bytes
    row_bytes = prod(shape[1:]) * itemsize
    multiple = pair.target.rows_multiple
    slices = []
    for first, rows in cut_rows(
        shape, itemsize, rows_multiple=multiple, limit_bytes=min(limit, most)
    ):
        size = rows * row_bytes
        if size > most and way is not Way.PLACED:
            raise LoadError(
                f"{pair.target.name}: {rows} of its rows are converted together and take "
                f"{format_bytes(size)}, at most {format_bytes(most)} are staged",
                remedy="load the model with the transformers engine",
            )
        slices.append(
            Slice(
                pair=pair,
                number=number,
                first_row=first,
                shape=(rows, *shape[1:]) if shape else (),
                begin_bytes=first * row_bytes,
                size_bytes=size,
                is_last=first + rows == (shape[0] if shape else 1),
            )
        )
    return slices


def way_of(pair: Pair) -> Way:
    """How the tensor's bytes get to their final place."""
    if pair.place is not None:
        return Way.PLACED
    return Way.HOST if pair.device.type == "cpu" else Way.STAGED


def plan_batches(pairs: Sequence[Pair], limits: Limits) -> list[Batch]:
    """All slices of all tensors, in the order given; small neighbours share a batch.

    Raises:
        LoadError: As `cut_slices`.
    """
    most_bytes = min(limits.slice_bytes, limits.staging_bytes)
    groups: list[list[Slice]] = []
    for number, pair in enumerate(pairs):
        for one in cut_slices(pair, number, limits):
            last = groups[-1][-1] if groups else one
            begin = round_up(last.offset_bytes + last.size_bytes, _ALIGNMENT)
            if (
                groups
                and begin + one.size_bytes <= most_bytes
                and way_of(pair) is way_of(last.pair) is Way.STAGED
                and pair.device == last.pair.device
            ):
                groups[-1].append(replace(one, offset_bytes=begin))
            else:
                groups.append([one])
    return [
        Batch(way=way_of(group[0].pair), device=group[0].pair.device, slices=tuple(group))
        for group in groups
    ]


def cut_pieces(batch: Batch, limits: Limits) -> list[Piece]:
    """The reads that bring a batch; one alone where it is converted from the buffer itself."""
    limit = batch.size_bytes if batch.way is Way.HOST else limits.piece_bytes
    groups: list[list[Part]] = []
    for part in _parts(batch, limit):
        group = groups[-1] if groups else []
        if (
            not group
            or not _follows(group[-1], part)
            or len(group) == _MAX_PARTS
            or part.batch_bytes + part.size_bytes - group[0].batch_bytes > limit
        ):
            groups.append([part])
        else:
            group.append(part)
    return [
        Piece(
            batch=batch,
            parts=tuple(group),
            is_first=index == 0,
            is_last=index == len(groups) - 1,
        )
        for index, group in enumerate(groups)
    ]


def _parts(batch: Batch, limit_bytes: int) -> Iterator[Part]:
    for one in batch.slices:
        source = one.pair.source
        if source is None:
            raise ValueError(f"{one.pair.target.name} has no file to be read from")
        count = ceil_div(one.size_bytes, limit_bytes)
        step = min(limit_bytes, round_up(ceil_div(one.size_bytes, count), _ALIGNMENT))
        for begin in range(0, one.size_bytes, step):
            yield Part(
                source=source,
                file_bytes=source.offset_bytes + one.begin_bytes + begin,
                batch_bytes=one.offset_bytes + begin,
                size_bytes=min(step, one.size_bytes - begin),
            )


def _follows(before: Part, after: Part) -> bool:
    return (
        before.source.file == after.source.file
        and before.file_bytes + before.size_bytes == after.file_bytes
    )
