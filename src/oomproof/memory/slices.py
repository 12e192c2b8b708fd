"""How a prompt's products cut a quantized weight: rows that are dequantized and multiplied at once.

A slice is written, and read once by the product after it. Two things say how many rows it has: it
is still in the second cache when it is read, and its product has tiles for every multiprocessor.
"""

from __future__ import annotations

from oomproof.formats import ceil_div
from oomproof.units import MIB, round_up

SLICE_BYTES = 24 * MIB
"""Of a slice at most, where that is rows enough: about half of Hopper's second cache, for the input
and the result pass through it too."""
SLICE_RESULTS = 1 << 22
"""Values that a slice's product has at least: two rounds of 128 × 128 tiles on an H200."""
SLICE_ROWS = 2048
"""Rows of the widest weight that scratch has room for: a slice for a whole chunk."""
UP_ROWS = 4096
"""Rows of the MLP's up projection whose result waits for its gate at once: two rounds of tiles."""
_ROW_UNIT = 128
"""Slices are multiples of it, so that the tiles of a product are whole."""


def cut_rows(
    *, tokens: int, rows: int, row_bytes: int, room_bytes: int, most_rows: int | None = None
) -> int:
    """Rows of slices of about equal size: none is left over that would keep the GPU half idle.

    Args:
        tokens: Rows of the input.
        rows: Of the weight.
        row_bytes: Of a row of the weight, dequantized.
        room_bytes: Of scratch. A slice has a row at least, whether it fits or not.
        most_rows: Of a slice, for another reason; None for no other.
    """
    enough = ceil_div(SLICE_RESULTS, tokens)
    # Whole rounds of tiles: with a chunk of 2,048 tokens 1,024 rows are one on an H200.
    cached = _power_of_two(SLICE_BYTES // row_bytes)
    fit = min(max(enough, cached), room_bytes // row_bytes)
    fit = max(1, min(rows, fit, rows if most_rows is None else most_rows))
    step = ceil_div(rows, ceil_div(rows, fit))
    return min(fit, round_up(step, _ROW_UNIT))


def up_rows(hidden: int, width: int) -> int:
    """Rows of the up projection whose result waits at once.

    Args:
        hidden: Its columns.
        width: Its rows.
    """
    # A slice begins at whole blocks of its scales' scales, 64 × 256 weights: 4,096 × 4 do.
    return width if hidden % 4 else min(width, UP_ROWS)


def _power_of_two(number: int) -> int:
    """The largest that is not larger; 0 of 0."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0
