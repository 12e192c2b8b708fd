"""Quantizes a weight slice by slice, row-major, and brings each slice into its tiles."""

from __future__ import annotations

import torch

from oomproof.formats import BLOCK_SIZE, Component, DType, Format
from oomproof.memory.native import TILING_BYTES
from oomproof.quantization.handlers import Handler, Parts
from oomproof.quantization.tiles import TILE_ROWS, can_tile, tile_codes, tile_scale_rows

CODES = "weight"
SCALES = frozenset({"absmax", "scale"})
"""Names of the component with a scale for each block, one of them in every format."""
TILED_COMPONENTS = SCALES | {CODES}
"""The other components stay as bitsandbytes has them."""


def tiles_weight(
    weight_format: Format, shape: tuple[int, int], components: tuple[Component, ...]
) -> bool:
    """Whether a weight of these components is held in tiles where a GPU reads it."""
    return (
        weight_format.weight_dtype is DType.UINT8
        and weight_format.block_size == BLOCK_SIZE
        and can_tile(shape)
        and components == weight_format.components(*shape)
        and _needed_bytes(weight_format, shape) <= TILING_BYTES
    )


def tiling_bytes(weight_format: Format, shape: tuple[int, int]) -> int:
    """What is between a slice and its tiles, at most TILING_BYTES; a multiple of 16.

    Row-major codes and scales of as many rows as fit; at the end all codes of doubly quantized
    absmax values, which are known no earlier.
    """
    whole = shape[0] * _row_bytes(weight_format, shape[1])
    return max(_needed_bytes(weight_format, shape), min(whole, TILING_BYTES))


def _row_bytes(weight_format: Format, columns: int) -> int:
    blocks = columns // BLOCK_SIZE
    if weight_format.double_quantized:
        return columns // 2
    scales = next(c for c in weight_format.components(1, columns) if c.name in SCALES)
    return columns // 2 + blocks * scales.dtype.itemsize


def _needed_bytes(weight_format: Format, shape: tuple[int, int]) -> int:
    rows, columns = shape
    at_once = TILE_ROWS * _row_bytes(weight_format, columns)
    return max(at_once, rows * columns // BLOCK_SIZE if weight_format.double_quantized else 0)


class TiledWriter:
    """Takes the place of a handler's `encode_slice` and `finish`.

    Args:
        held: The weight's handler.
        parts: Where it will be: codes and scales [tiles, elements of a tile], the rest flat.
        shape: Of the whole weight.
        workspace: float32: what the handler needs, then `tiling_bytes`.
    """

    def __init__(
        self, held: Handler, parts: Parts, shape: tuple[int, int], workspace: torch.Tensor
    ) -> None:
        self._handler, self._parts, self._shape = held, parts, shape
        own = held.workspace_numel(shape)
        self._absmax = workspace[:own]
        self._between = workspace[own:].view(torch.uint8)
        self._scales = next(name for name in parts if name in SCALES)

    def encode_slice(self, source: torch.Tensor, first_row: int) -> None:
        """Whole tiles from `first_row` on: [rows, columns]; slices come in order."""
        rows, columns = source.shape
        nested = self._absmax.numel() > 0
        tiled = self._parts[self._scales]
        blocks = columns // BLOCK_SIZE
        row_bytes = columns // 2 + (0 if nested else blocks * tiled.itemsize)
        step = self._between.numel() // (row_bytes * TILE_ROWS) * TILE_ROWS
        for first in range(0, rows, step):
            part = source[first : first + step]
            size = (len(part), columns)
            codes_end = size[0] * columns // 2
            codes = self._between[:codes_end]
            scales = self._between[codes_end : size[0] * row_bytes].view(tiled.dtype)
            absmax = self._absmax[(first_row + first) * blocks :] if nested else self._absmax
            between = {CODES: codes, self._scales: scales}
            self._handler.encode_slice(part, between, 0, size, absmax)
            begin = (first_row + first) // TILE_ROWS
            tiles = slice(begin, begin + size[0] // TILE_ROWS)
            tile_codes(codes.view(size[0], -1), self._parts[CODES][tiles])
            if not nested:
                tile_scale_rows(scales.view(size[0], blocks), tiled[tiles])

    def finish(self) -> None:
        """After the last slice: what depends on the whole weight."""
        if not self._absmax.numel():
            self._handler.finish(self._parts, self._shape, self._absmax)
            return
        rows, columns = self._shape
        blocks = columns // BLOCK_SIZE
        codes = self._between[: rows * blocks]
        between = {**self._parts, self._scales: codes}
        self._handler.finish(between, self._shape, self._absmax)
        tile_scale_rows(codes.view(rows, blocks), self._parts[self._scales])
