"""Linears whose codes and scales lie in tiles, one after the other in one stream (tiles.py)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from oomproof.formats import BLOCK_SIZE, NESTED_BLOCK_SIZE
from oomproof.quantization.tiles import FRAGMENT_BYTES, TILE_ROWS

Nested = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""nested_absmax float32 [ceil(rows * columns / 64 / 256)], as it is in row-major order;
nested_quant_map float32 [256]; nested_offset float32 []."""
_NUMBERS = 3
"""Of a segment, among an operator's arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One linear of a set."""

    rows: int
    """A multiple of 16."""
    first_tile: int = 0
    """In the set's stream."""
    tile_stride: int = 1
    """From one of its tiles to the next: 2 where gate and up take turns."""
    nested: Nested | None = None
    """What absmax codes stand for; None where scales are stored as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TiledSet:
    """One linear, or several with a common input, in one format.

    The product has the rows of its segments side by side, in their order, wherever their tiles lie.
    """

    codes: torch.Tensor
    """uint8 [tiles, 8 * columns], contiguous."""
    scales: torch.Tensor
    """[tiles, columns / 4], contiguous: absmax in float32, its codes in uint8 (then segments are
    nested), or int4's bfloat16."""
    quant_map: torch.Tensor | None
    """The codebook, float32 [16]; None for int4."""
    codebook: str
    """Its name: "nf4", "fp4" or "int4"."""
    segments: tuple[Segment, ...]

    @property
    def blocks(self) -> int:
        """Blocks of 64 columns in a row."""
        return self.codes.shape[1] // FRAGMENT_BYTES

    @property
    def columns(self) -> int:
        """Of each linear."""
        return self.blocks * BLOCK_SIZE

    @property
    def rows(self) -> int:
        """Of all linears."""
        return sum(segment.rows for segment in self.segments)

    def pieces(self, first: int, end: int) -> Iterator[tuple[Segment, int, int, int]]:
        """Rows first … end - 1 of the product: (segment, its rows from, to, place in the range)."""
        begin = 0
        for segment in self.segments:
            inner, outer = max(first, begin), min(end, begin + segment.rows)
            if inner < outer:
                yield segment, inner - begin, outer - begin, inner - first
            begin += segment.rows

    def arguments(
        self,
    ) -> tuple[
        torch.Tensor,
        torch.Tensor,
        torch.Tensor | None,
        str,
        Sequence[torch.Tensor],
        Sequence[int],
    ]:
        """As operators take them; see `of`."""
        nested = [part for segment in self.segments for part in segment.nested or ()]
        numbers = [
            number
            for segment in self.segments
            for number in (segment.rows, segment.first_tile, segment.tile_stride)
        ]
        return self.codes, self.scales, self.quant_map, self.codebook, nested, numbers

    @classmethod
    def of(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        quant_map: torch.Tensor | None,
        codebook: str,
        nested: Sequence[torch.Tensor],
        segments: Sequence[int],
    ) -> TiledSet:
        """The set of `arguments`.

        Args:
            codes: See the field.
            scales: See the field.
            quant_map: See the field.
            codebook: See the field.
            nested: nested_absmax, nested_quant_map and nested_offset of each segment, or nothing.
            segments: rows, first tile and tile stride of each.
        """
        count = len(segments) // _NUMBERS
        found = []
        for index in range(count):
            rows, first_tile, tile_stride = segments[_NUMBERS * index : _NUMBERS * (index + 1)]
            own = tuple(nested[_NUMBERS * index : _NUMBERS * (index + 1)]) if nested else None
            found.append(
                Segment(
                    rows=rows,
                    first_tile=first_tile,
                    tile_stride=tile_stride,
                    nested=None if own is None else (own[0], own[1], own[2]),
                )
            )
        return cls(
            codes=codes,
            scales=scales,
            quant_map=quant_map,
            codebook=codebook,
            segments=tuple(found),
        )


def tiles_of_rows(stream: torch.Tensor, segment: Segment, first: int, end: int) -> torch.Tensor:
    """The tiles [tiles, elements] of rows first … end - 1, whole tiles, of a set's codes or scales.

    Args:
        stream: TiledSet.codes or TiledSet.scales.
        segment: The linear.
        first: A multiple of 16.
        end: A multiple of 16.
    """
    begin = segment.first_tile + first // TILE_ROWS * segment.tile_stride
    last = segment.first_tile + (end // TILE_ROWS - 1) * segment.tile_stride
    return stream[begin : last + 1 : segment.tile_stride]


def set_of_rows(weights: TiledSet, first: int, end: int) -> tuple[TiledSet, int, int]:
    """(rows first … end - 1 of a product as a set, which linear's they are, the first in it).

    Args:
        weights: The whole set, whose stream the part keeps.
        first: A multiple of 16, and its linear's rows before it are whole blocks of 256 scales.
        end: In the same linear, a multiple of 16 too.

    Raises:
        ValueError: The rows cannot be cut so.
    """
    ends = tuple(accumulate(segment.rows for segment in weights.segments))
    number = bisect_right(ends[:-1], first)
    segment = weights.segments[number]
    begin = ends[number] - segment.rows
    inner, outer = first - begin, end - begin
    blocks = inner * weights.blocks
    nested = segment.nested
    aligned = inner % TILE_ROWS == outer % TILE_ROWS == 0
    if outer > segment.rows or not aligned or (nested and blocks % NESTED_BLOCK_SIZE):
        raise ValueError(f"rows {first} to {end} are no set of their own")
    part = replace(
        segment,
        rows=outer - inner,
        first_tile=segment.first_tile + inner // TILE_ROWS * segment.tile_stride,
        nested=None if nested is None else (nested[0][blocks // NESTED_BLOCK_SIZE :], *nested[1:]),
    )
    return replace(weights, segments=(part,)), number, inner
