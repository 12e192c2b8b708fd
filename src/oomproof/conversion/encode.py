"""Where the loader brings the tensors of one output shard: quantized, or cast, and written.

One weight at a time is held: its codes and scales until they are complete. What it is made from
comes in slices and is never whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd

import torch

from oomproof.conversion.layout import Conversion, Output, OutputShard, quant_state
from oomproof.conversion.writing import LIMITS, ShardFile
from oomproof.errors import CheckpointError
from oomproof.formats import ceil_div
from oomproof.loading.targets import Target
from oomproof.models.stored_parts import bitsandbytes_parts
from oomproof.quantization.handlers import Handler, handler
from oomproof.units import MIB

_BLOCK_ELEMENTS = 128
"""Slices of a 4-bit weight begin at whole blocks and whole bytes: multiples of this."""
_CPU = torch.device("cpu")

CPU_SLICE_FACTOR = 24
"""Copies and indices: what the reference codec takes for each byte of a slice, about."""
OVERHEAD_BYTES = LIMITS.pinned_bytes + CPU_SLICE_FACTOR * LIMITS.piece_bytes + 160 * MIB
"""Host memory beside the largest weight's codes: buffers, temporaries, allocator, headers."""


def host_bytes(output: Output) -> int:
    """A bound of the host memory that quantizing takes beside the process's libraries."""
    weight_format = output.format
    sizes = (
        weight_format.stored_bytes(*one.source.shape)
        + 4 * ceil_div(one.source.shape[0] * one.source.shape[1], 64)
        for shard in output.shards
        for one in shard.conversions
        if one.quantized
    )
    return OVERHEAD_BYTES + max(sizes, default=0)


class ShardEncoder:
    """The targets of one shard, which write to its file.

    Args:
        output: What is written.
        shard: Its part.
        file: Where to.
        device: That quantizes.
    """

    def __init__(
        self, output: Output, shard: OutputShard, file: ShardFile, device: torch.device
    ) -> None:
        self._output, self._shard, self._file, self._device = output, shard, file, device
        self._dtype: torch.dtype = getattr(torch, output.dtype.value)

    def targets(self) -> list[Target]:
        """One for each tensor of the source."""
        return [
            self._quantized(one) if one.quantized else self._cast(one)
            for one in self._shard.conversions
        ]

    def _cast(self, one: Conversion) -> Target:
        def store(values: torch.Tensor, first_row: int) -> None:
            self._file.write_rows(one, self._within_range(values, one), first_row)

        return Target(name=one.source.name, shape=one.source.shape, device=_CPU, store=store)

    def _quantized(self, one: Conversion) -> Target:
        rows, columns = one.source.shape
        held = handler(self._output.format.name, search=self._output.search)
        weight = _Weight(held, self._output, one, self._device)

        def store(values: torch.Tensor, first_row: int) -> None:
            weight.encode(self._within_range(values, one), first_row)

        return Target(
            name=one.source.name,
            shape=(rows, columns),
            device=self._device,
            store=store,
            finish=partial(weight.finish, self._file.write_all),
            rows_multiple=_BLOCK_ELEMENTS // gcd(_BLOCK_ELEMENTS, columns),
        )

    def _within_range(self, values: torch.Tensor, one: Conversion) -> torch.Tensor:
        """The values in the output's dtype, which may hold less than the source's."""
        cast = values.to(self._dtype)
        if self._dtype is torch.float16 and values.dtype is not torch.float16 and values.numel():
            largest = float(values.abs().amax())
            # What is not finite in the source itself is the loader's to refuse.
            if largest > torch.finfo(torch.float16).max and largest != float("inf"):
                raise CheckpointError(
                    one.source.file,
                    f"{one.source.name!r} holds {largest:g}, float16 ends at 65504",
                    remedy="use --dtype bfloat16",
                )
        return cast


class _Weight:
    """The parts of one weight while its slices come."""

    def __init__(
        self, held: Handler, output: Output, one: Conversion, device: torch.device
    ) -> None:
        self._handler, self._output, self._one, self._device = held, output, one, device
        self._shape = (one.source.shape[0], one.source.shape[1])
        self._parts: dict[str, torch.Tensor] = {}
        self._workspace = torch.empty(0)

    def encode(self, values: torch.Tensor, first_row: int) -> None:
        if not self._parts:
            self._allocate()
        self._handler.encode_slice(values, self._parts, first_row, self._shape, self._workspace)

    def finish(self, write: Callable[[str, torch.Tensor], None]) -> None:
        if not self._parts:  # a weight without elements
            self._allocate()
        self._handler.finish(self._parts, self._shape, self._workspace)
        weight_format, source = self._output.format, self._one.source
        nested = self._parts.get("nested_offset")
        offset = None if nested is None else float(nested.reshape(-1)[0])
        for part in bitsandbytes_parts(source.name, source.shape, weight_format):
            if part.component == "quant_state":
                raw = quant_state(weight_format, self._output.dtype, source.shape, offset)
                write(part.name, torch.frombuffer(bytearray(raw), dtype=torch.uint8))
            else:
                write(part.name, self._parts[part.component])
        self._parts, self._workspace = {}, torch.empty(0)

    def _allocate(self) -> None:
        for part in self._output.format.components(*self._shape):
            dtype: torch.dtype = getattr(torch, part.dtype.value)
            self._parts[part.name] = torch.empty(part.numel, dtype=dtype, device=self._device)
        numel = self._handler.workspace_numel(self._shape)
        self._workspace = torch.empty(numel, dtype=torch.float32, device=self._device)
