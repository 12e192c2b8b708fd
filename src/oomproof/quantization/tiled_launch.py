"""How a product of a few tokens with tiled 4-bit weights is spread over a GPU.

A block of threads has whole tiles of 16 rows (or pairs of them, gate and up), and all their columns
or, where x does not fit into its shared memory, a split of them. See cuda/product_4bit.cu.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from oomproof.formats import ceil_div
from oomproof.quantization.tiles import TILE_ROWS

MAX_TOKENS = 64
"""Of a product by kernels that read tiles: 16 a launch, on Hopper all (wide_launch.py). More are
multiplied with dequantized slices."""
TEMPLATES = (1, 2, 4, 8, 16)
"""Tokens of a launch that the kernel is compiled for: what is more takes several, in turn."""
LEAST_SHARED_BYTES = 99 << 10
"""What a block may have on every GPU that the engine runs on."""
_STEP_BLOCKS = 8
_TABLE_BYTES = 256 * 256
_SYSTEM_BYTES = 1024
_MAP_BYTES = 1024
_NORM_TOKENS = 16
_ROW_BYTES = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchShape:
    """One launch."""

    template: int
    """Tokens that the kernel is compiled for, at least those that there are."""
    warps: int
    blocks: int
    """Of threads, along the rows."""
    splits: int
    """Of the columns."""
    steps: int
    """Of 512 columns, in each split but the last."""
    last_steps: int
    slots: int
    """Tiles that a warp touches at most."""
    most_tiles: int
    """Of a block, rounded up to a multiple of 4."""
    units_per_block: int
    blocks_with_more: int
    """So many, the first ones, have one unit more."""
    shared_bytes: int


def template_of(tokens: int) -> int:
    """The tokens that a launch for so many is compiled for."""
    return next(template for template in TEMPLATES if template >= tokens)


def warps_of(template: int) -> int:
    """Warps of a block, where tuning found none better (tuned.py).

    As many as the registers of their sums and scales leave room for.
    """
    return 12 if template < 8 else 8


@cache
def launch_shape(
    *,
    tokens: int,
    columns: int,
    tiles: int,
    unit: int,
    processors: int,
    shared_limit: int,
    warps: int | None = None,
    splits: int | None = None,
) -> LaunchShape | None:
    """The fewest splits with which x fits, or a choice of one's own; None where it does not fit.

    Args:
        tokens: At most the last of TEMPLATES.
        columns: A multiple of 128.
        tiles: Of all rows.
        unit: Tiles that belong together: 2 for gate and up.
        processors: Multiprocessors of the GPU: each has one block.
        shared_limit: Bytes of shared memory that a block may have.
        warps: Of a block, a multiple of 4; None for `warps_of`.
        splits: Of the columns, exactly so many; None for the fewest.
    """
    template = template_of(tokens)
    warps = warps_of(template) if warps is None else warps
    all_steps = ceil_div(columns // 64, _STEP_BLOCKS)
    units = tiles // unit
    for wanted in range(1, all_steps + 1) if splits is None else (splits,):
        steps = ceil_div(all_steps, wanted)
        # Not every number divides the columns so that none is empty.
        if ceil_div(all_steps, steps) != wanted:
            continue
        blocks = min(units, max(1, processors // wanted))
        most_tiles = ceil_div(units, blocks) * unit
        slots = min(most_tiles, (ceil_div(most_tiles * steps, warps) - 1) // steps + 2)
        shared = shared_bytes(template, warps, slots, most_tiles, steps)
        if shared <= shared_limit:
            return LaunchShape(
                template=template,
                warps=warps,
                blocks=blocks,
                splits=wanted,
                steps=steps,
                last_steps=all_steps - (wanted - 1) * steps,
                slots=slots,
                most_tiles=_to_four(most_tiles),
                units_per_block=units // blocks,
                blocks_with_more=units % blocks,
                shared_bytes=shared,
            )
    return None


def shared_bytes(template: int, warps: int, slots: int, most_tiles: int, steps: int) -> int:
    """What a block asks for: the table, the sums of its warps, and x."""
    rows = template * steps * _STEP_BLOCKS
    # With one token or two, as many rows as the table has lie in its gaps.
    x_bytes = 0 if template <= 2 and rows <= 256 else rows * _ROW_BYTES
    sums = warps * slots * TILE_ROWS * template * 4 + _to_four(most_tiles) * 4
    norms = _NORM_TOKENS * warps * 4
    return _SYSTEM_BYTES + _TABLE_BYTES + _MAP_BYTES + norms + sums + x_bytes


def partial_bytes(shape: LaunchShape, tokens: int, tiles: int) -> int:
    """Scratch that the splits of the columns write their sums to."""
    return 0 if shape.splits == 1 else shape.splits * tokens * tiles * TILE_ROWS * 4


def _to_four(count: int) -> int:
    return ceil_div(count, 4) * 4
