"""How a product of 5 to 64 tokens with tiled 4-bit weights is spread over a Hopper GPU.

A block of threads has whole units of 64 rows, and a split of the columns. See
cuda/product_4bit_wide.cu.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from oomproof.formats import ceil_div
from oomproof.quantization.tiles import TILE_ROWS

WIDE_TEMPLATES = (8, 16, 32, 64)
"""Tokens of a launch that the kernel is compiled for."""
UNIT_TILES = 4
"""Of a warpgroup."""
UNIT_ROWS = UNIT_TILES * TILE_ROWS
_WARPGROUPS = {8: 4, 16: 4, 32: 3, 64: 2}
_MOST_WITH_FLOAT32 = 3
_FEW_WARPGROUPS = 2
_WARPS = 4
_STEP_BLOCKS = 4
_TABLE_BYTES = 256 * 256
_SYSTEM_BYTES = 1024
_ROW_BYTES = 128
# What a launch is compared with another by, fitted to what an H200 took for the products of an 8B
# and a 70B in nf4-dq while a kernel of its own added up splits. With 3 µs more it meets the 8B's
# times since within a sixth; tests/quantization/test_wide_launch.py holds what it chooses.
_STEP_NS, _TOKEN_NS = 344.0, 3.5
"""Of each step that a multiprocessor has, and for each of its tokens."""
_X_BYTES = 24.0
"""A nanosecond, of x into a multiprocessor's shared memory: all of them ask for the same."""
_PARTIAL_BYTES = 3000.0
"""A nanosecond, of sums to the second cache and back, of the whole GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WideShape:
    """One launch."""

    template: int
    """Tokens that the kernel is compiled for, at least those that there are."""
    warpgroups: int
    blocks: int
    """Of threads, along the rows."""
    splits: int
    """Of the columns."""
    steps: int
    """Of 256 columns, in each split but the last."""
    last_steps: int
    units_per_block: int
    """Of 64 rows."""
    blocks_with_more: int
    """So many, the first ones, have one unit more."""
    shared_bytes: int

    @property
    def warps(self) -> int:
        """Of a block."""
        return _WARPS * self.warpgroups

    @property
    def most_units(self) -> int:
        """Of a block."""
        return self.units_per_block + (self.blocks_with_more > 0)


def wide_template_of(tokens: int) -> int:
    """The tokens that a launch for so many is compiled for."""
    return next(template for template in WIDE_TEMPLATES if template >= tokens)


def warpgroups_of(template: int, scale_bytes: int) -> int:
    """Warpgroups of a block: as many as their registers leave room for.

    Args:
        template: One of WIDE_TEMPLATES.
        scale_bytes: Of a stored scale: those of 4 bytes wait in more registers.
    """
    most = _MOST_WITH_FLOAT32 if scale_bytes == 4 else max(_WARPGROUPS.values())
    return min(most, _WARPGROUPS[template])


def depth_of(warpgroups: int) -> int:
    """Steps that each fetches ahead: together they keep memory busy."""
    return 2 if warpgroups > _FEW_WARPGROUPS else 4


@cache
def wide_shapes(
    *,
    tokens: int,
    columns: int,
    tiles: int,
    warpgroups: int,
    processors: int,
    shared_limit: int,
    scratch_bytes: int,
) -> tuple[WideShape, ...]:
    """Every launch that fits, what should take the least time first.

    Args:
        tokens: At most the last of WIDE_TEMPLATES.
        columns: A multiple of 128.
        tiles: Of all rows; an even number where gate and up take turns.
        warpgroups: Of a block; see `warpgroups_of`.
        processors: Multiprocessors of the GPU: each has one block.
        shared_limit: Bytes of shared memory that a block may have.
        scratch_bytes: What splits are written to.
    """
    template = wide_template_of(tokens)
    all_steps = ceil_div(columns // 64, _STEP_BLOCKS)
    found = []
    for splits in range(1, min(all_steps, processors) + 1):
        steps = ceil_div(all_steps, splits)
        shared = shared_bytes(template, warpgroups, steps)
        # Not every number divides the columns so that none is empty.
        if ceil_div(all_steps, steps) != splits or shared > shared_limit:
            continue
        units = ceil_div(tiles, UNIT_TILES)
        blocks = min(units, processors // splits)
        shape = WideShape(
            template=template,
            warpgroups=warpgroups,
            blocks=blocks,
            splits=splits,
            steps=steps,
            last_steps=all_steps - (splits - 1) * steps,
            units_per_block=units // blocks,
            blocks_with_more=units % blocks,
            shared_bytes=shared,
        )
        if partial_bytes(shape, tiles) <= scratch_bytes:
            found.append(shape)
    return tuple(sorted(found, key=lambda shape: _cost_ns(shape, tiles)))


def partial_bytes(shape: WideShape, tiles: int) -> int:
    """Scratch that the splits of the columns write their sums to, one split too."""
    return shape.splits * ceil_div(tiles, UNIT_TILES) * UNIT_ROWS * shape.template * 4


def shared_bytes(template: int, warpgroups: int, steps: int) -> int:
    """What a block asks for: the table, x, its norm's weights, and sums that warpgroups share."""
    x_bytes = steps * _STEP_BLOCKS * (template + 1) * _ROW_BYTES
    unit_bytes = UNIT_ROWS * template * 4
    return _SYSTEM_BYTES + _TABLE_BYTES + x_bytes + (warpgroups - 1) * unit_bytes


def _cost_ns(shape: WideShape, tiles: int) -> float:
    """About how long a launch takes; only differences matter."""
    # A warpgroup that has a step more than the others is waited for.
    steps = ceil_div(shape.most_units * shape.steps, shape.warpgroups) * shape.warpgroups
    x_bytes = shape.steps * _STEP_BLOCKS * shape.template * _ROW_BYTES
    written = partial_bytes(shape, tiles)
    step_ns = _STEP_NS + _TOKEN_NS * shape.template
    return steps * step_ns + x_bytes / _X_BYTES + written / _PARTIAL_BYTES
