"""Scratch: the memory that a product may write to besides its result. Free of torch."""

from __future__ import annotations

from oomproof.formats import ceil_div

ALIGNMENT = 256
"""Bytes: every tensor that is cut out of scratch begins at a multiple of this."""


def aligned(size_bytes: int) -> int:
    """A size rounded up so that what follows it begins aligned."""
    return ceil_div(size_bytes, ALIGNMENT) * ALIGNMENT


def least_scratch_bytes(
    format_name: str, tokens: int, rows: int, columns: int, *, itemsize: int = 2
) -> int:
    """Bytes of scratch without which a product does not run; more only makes it faster.

    Args:
        format_name: A key of HANDLERS.
        tokens: Rows of the input. Not needed by any format now: what grows with the tokens is
            worked off in pieces.
        rows: Rows of the weight.
        columns: Columns of the weight.
        itemsize: Bytes of one element of the input.
    """
    del tokens, rows
    # One row of the weight in the type of the input. An aligned row leaves room for the start of
    # scratch itself to be unaligned.
    row = aligned(columns * itemsize) + ALIGNMENT
    # FP8 holds one token's input in e4m3 or in its own type too, with its scale.
    return row + aligned(columns * itemsize) + ALIGNMENT if format_name == "fp8" else row
