"""How a product of 5 to 64 tokens with tiled 4-bit weights is spread over a Hopper GPU.

A block of threads has whole units of 64 rows, and a split of the columns. Splits are added up by a
cluster of blocks, or from memory, by a kernel of its own. See cuda/product_4bit_wide.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from oomproof.formats import ceil_div
from oomproof.quantization.tiles import TILE_ROWS

WIDE_TEMPLATES = (8, 16, 32, 64)
"""Tokens of a launch that the kernel is compiled for."""
UNIT_TILES = 4
"""Of a warpgroup: 64 rows."""
_FEW_WARPGROUPS = 2
_CLUSTERS = (1, 2, 4, 8)
"""Splits that a cluster of blocks adds up: more than 8 blocks do not run everywhere."""
_PAIR_OF_PROCESSORS = 2
_NEIGHBOURS = 16
"""Multiprocessors that are close enough for clusters of more than two blocks: some parts of a GPU
have a pair more than that, which such clusters leave idle."""
_STEP_BLOCKS = 4
_TABLE_BYTES = 256 * 256
_SYSTEM_BYTES = 1024
_ROW_BYTES = 128
_STEP_BYTES = UNIT_TILES * _STEP_BLOCKS * 528
"""Codes and scales of a unit's step."""
# What a launch is compared with another by, as measured on an H200: bytes a nanosecond that a
# multiprocessor has of memory and of the second cache, and nanoseconds.
_MEMORY_BYTES, _CACHE_BYTES = 33.0, 42.0
_LOOKUPS_NS, _TOKEN_NS = 165.0, 2.3
"""Of a unit's step: shared memory that weights are looked up in, and that tokens are read from."""
_CLUSTER_NS, _FINISH_NS = 300.0, 2500.0


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
    clustered: bool
    """Whether a cluster of blocks adds up the splits, and no other kernel."""
    steps: int
    """Of 256 columns, in each split but the last."""
    last_steps: int
    units_per_block: int
    """Of 64 rows."""
    blocks_with_more: int
    """So many, the first ones, have one unit more."""
    shared_bytes: int

    @property
    def most_units(self) -> int:
        """Of a block."""
        return self.units_per_block + (self.blocks_with_more > 0)


def wide_template_of(tokens: int) -> int:
    """The tokens that a launch for so many is compiled for."""
    return next(template for template in WIDE_TEMPLATES if template >= tokens)


def warpgroups_of(template: int) -> int:
    """Warpgroups of a block: as many as their registers leave room for."""
    return 3 if template < WIDE_TEMPLATES[-1] else 2


def depth_of(warpgroups: int) -> int:
    """Steps that each fetches ahead: together they keep memory busy."""
    return 2 if warpgroups > _FEW_WARPGROUPS else 4


@cache
def wide_shape(  # noqa: PLR0913
    *,
    tokens: int,
    columns: int,
    tiles: int,
    processors: int,
    shared_limit: int,
    scratch_bytes: int,
    warpgroups: int | None = None,
    splits: int | None = None,
    clustered: bool | None = None,
) -> WideShape | None:
    """The launch that should take the least time; None where x and sums do not fit.

    Args:
        tokens: At most the last of WIDE_TEMPLATES.
        columns: A multiple of 128.
        tiles: Of all rows; an even number where gate and up take turns.
        processors: Multiprocessors of the GPU: each has one block.
        shared_limit: Bytes of shared memory that a block may have.
        scratch_bytes: What splits may be written to.
        warpgroups: Of a block; None for `warpgroups_of`.
        splits: Of the columns, exactly so many; None for the best.
        clustered: Whether a cluster adds up the splits; None for what is better.
    """
    template = wide_template_of(tokens)
    warpgroups = warpgroups_of(template) if warpgroups is None else warpgroups
    all_steps = ceil_div(columns // 64, _STEP_BLOCKS)
    choices = [
        shape
        for wanted in (range(1, all_steps + 1) if splits is None else (splits,))
        for shape in _of_splits(template, warpgroups, wanted, all_steps, tiles, processors)
        if clustered in {None, shape.clustered}
        and shape.shared_bytes <= shared_limit
        and partial_bytes(shape, tokens, tiles) <= scratch_bytes
    ]
    return min(choices, key=lambda shape: _cost_ns(shape, tiles), default=None)


def partial_bytes(shape: WideShape, tokens: int, tiles: int) -> int:
    """Scratch that the splits of the columns write their sums to."""
    return 0 if shape.clustered else shape.splits * tokens * tiles * TILE_ROWS * 4


def shared_bytes(template: int, warpgroups: int, steps: int, held_units: int) -> int:
    """What a block asks for: the table, x, and sums of units that are shared or held."""
    x_bytes = steps * _STEP_BLOCKS * template * _ROW_BYTES
    unit_bytes = UNIT_TILES * TILE_ROWS * template * 4
    return _SYSTEM_BYTES + _TABLE_BYTES + x_bytes + (warpgroups - 1 + held_units) * unit_bytes


def _of_splits(
    template: int, warpgroups: int, splits: int, all_steps: int, tiles: int, processors: int
) -> Iterator[WideShape]:
    """The launches with so many splits, whether they fit or not."""
    steps = ceil_div(all_steps, splits)
    # Not every number divides the columns so that none is empty.
    if ceil_div(all_steps, steps) != splits:
        return
    units = ceil_div(tiles, UNIT_TILES)
    for clustered in (True, False) if splits in _CLUSTERS else (False,):
        usable = processors
        if clustered and splits > _PAIR_OF_PROCESSORS:
            usable = max(processors - processors % _NEIGHBOURS, min(processors, splits))
        if splits > usable:
            continue
        blocks = min(units, usable // splits)
        held = ceil_div(units, blocks) if clustered else 0
        yield WideShape(
            template=template,
            warpgroups=warpgroups,
            blocks=blocks,
            splits=splits,
            clustered=clustered,
            steps=steps,
            last_steps=all_steps - (splits - 1) * steps,
            units_per_block=units // blocks,
            blocks_with_more=units % blocks,
            shared_bytes=shared_bytes(template, warpgroups, steps, held),
        )


def _cost_ns(shape: WideShape, tiles: int) -> float:
    """About how long a launch takes; only differences matter."""
    step = max(_STEP_BYTES / _MEMORY_BYTES, _LOOKUPS_NS + _TOKEN_NS * shape.template)
    # A warpgroup that has a step more than the others is waited for.
    steps = ceil_div(shape.most_units * shape.steps, shape.warpgroups) * shape.warpgroups
    x = shape.steps * _STEP_BLOCKS * shape.template * _ROW_BYTES / _CACHE_BYTES
    if shape.clustered:
        after = _CLUSTER_NS * shape.splits.bit_length()
    else:
        written = partial_bytes(shape, shape.template, tiles) / (shape.blocks * shape.splits)
        after = _FINISH_NS + 2 * written / _MEMORY_BYTES
    return (0.5 * steps + 0.5 * shape.most_units * shape.steps) * step + x + after
