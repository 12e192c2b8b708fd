"""How launches of the tiled product divide tiles and columns, against what the kernel does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import ceil_div
from oomproof.quantization.products_tiled import _reciprocal
from oomproof.quantization.tiled_launch import (
    LEAST_SHARED_BYTES,
    TEMPLATES,
    LaunchShape,
    launch_shape,
    partial_bytes,
    warps_of,
)

MOST_COLUMNS = 53_248
"""Of Llama-3.1-405B's down projection."""
MOST_STEPS = MOST_COLUMNS // 512
TILES_OF_A_BLOCK = 400
"""Whose sums are sure to have room: 6,400 rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """What is launched, and where."""

    tokens: int
    columns: int
    units: int
    unit: int
    processors: int
    shared_limit: int
    warps: int | None = None
    splits: int | None = None

    @property
    def tiles(self) -> int:
        return self.units * self.unit

    def shape(self) -> LaunchShape | None:
        return launch_shape(
            tokens=self.tokens,
            columns=self.columns,
            tiles=self.tiles,
            unit=self.unit,
            processors=self.processors,
            shared_limit=self.shared_limit,
            warps=self.warps,
            splits=self.splits,
        )


PRODUCTS = st.builds(
    Product,
    tokens=st.integers(1, TEMPLATES[-1]),
    columns=st.integers(1, MOST_COLUMNS // 128).map(lambda n: 128 * n),
    units=st.integers(1, 40) | st.integers(1, 3500),
    unit=st.sampled_from([1, 2]),
    processors=st.integers(1, 200),
    shared_limit=st.sampled_from([99 << 10, 163 << 10, 227 << 10]),
)
CHOSEN = st.builds(
    replace,
    PRODUCTS,
    warps=st.none() | st.sampled_from([8, 12, 16]),
    splits=st.none() | st.integers(1, 12),
)
"""Launches that tuning may ask for, too."""


def ranges_of(shape: LaunchShape, unit: int) -> list[range]:
    """The tiles of each block."""
    found = []
    for block in range(shape.blocks):
        begin = block * shape.units_per_block + min(block, shape.blocks_with_more)
        count = shape.units_per_block + (block < shape.blocks_with_more)
        found.append(range(begin * unit, (begin + count) * unit))
    return found


def steps_of(shape: LaunchShape, columns: int) -> list[int]:
    """The steps of each split, as the kernel counts them."""
    blocks = columns // 64
    found = []
    for split in range(shape.splits):
        own = min(blocks - split * shape.steps * 8, shape.steps * 8)
        found.append((own + 7) >> 3)
    return found


def divided(step: int, steps: int) -> int:
    """Step / steps, as the kernel divides: __umulhi, and by 1 not at all."""
    return (step * _reciprocal(steps) >> 32) + (step if steps == 1 else 0)


def sums_of(tiles: int, steps: int, warps: int) -> tuple[dict[tuple[int, int], range], list[range]]:
    """(Steps whose sum is in slot (warp, n), steps that are added up for each tile)."""
    all_steps = tiles * steps
    begins = [all_steps * warp // warps for warp in range(warps + 1)]
    slots: dict[tuple[int, int], range] = {}
    owners = {}
    for warp, (begin, end) in enumerate(pairwise(begins)):
        first_tile = divided(begin, steps)
        assert first_tile == begin // steps
        step, slot = begin, 0
        while step < end:
            tile = first_tile + slot
            stop = min(end, (tile + 1) * steps)
            if step == tile * steps:
                owners[tile] = warp, slot
            slots[warp, slot] = range(step, stop)
            step, slot = stop, slot + 1
    totals = []
    for tile in range(tiles):
        warp, slot = owners[tile]
        total = slots[warp, slot]
        for other in range(warp + 1, warps):
            if begins[other] >= (tile + 1) * steps:
                break
            if begins[other] < begins[other + 1]:
                assert slots[other, 0].start == total.stop
                total = range(total.start, slots[other, 0].stop)
        totals.append(total)
    return slots, totals


def addressed_bytes(shape: LaunchShape, steps: int) -> int:
    """The end of what a block of the kernel touches in its shared memory."""
    table, nested_map, norms = 256 * 256, 1024, 16 * shape.warps * 4
    sums = shape.warps * shape.slots * 16 * shape.template * 4
    owners = shape.most_tiles * 4
    rows = shape.template * steps * 8
    in_gaps = shape.template <= 2 and rows <= 256
    return 1024 + table + nested_map + norms + sums + owners + (0 if in_gaps else rows * 128)


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_every_tile_belongs_to_one_block(product: Product) -> None:
    shape = product.shape()
    if shape is None:
        return
    found = ranges_of(shape, product.unit)
    assert [tile for tiles in found for tile in tiles] == list(range(product.tiles))
    assert all(tiles and len(tiles) % product.unit == 0 for tiles in found)
    assert max(map(len, found)) <= shape.most_tiles
    assert shape.most_tiles % 4 == 0


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_splits_cover_all_columns_and_none_is_empty(product: Product) -> None:
    shape = product.shape()
    if shape is None:
        return
    found = steps_of(shape, product.columns)
    assert found == [shape.steps] * (shape.splits - 1) + [shape.last_steps]
    assert min(found) >= 1
    assert sum(found) == ceil_div(product.columns, 512)


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_a_launch_fits_the_gpu(product: Product) -> None:
    shape = product.shape()
    if shape is None:
        return
    assert shape.template >= product.tokens
    assert shape.warps == (product.warps or warps_of(shape.template))
    assert shape.splits == (product.splits or shape.splits)
    assert shape.shared_bytes <= product.shared_limit
    for steps in {shape.steps, shape.last_steps}:
        assert addressed_bytes(shape, steps) <= shape.shared_bytes
    if product.processors >= shape.splits:
        assert shape.blocks * shape.splits <= product.processors
    else:
        assert shape.blocks == 1


@settings(max_examples=100, deadline=None)
@given(CHOSEN)
def test_sums_have_a_slot_each_and_add_up_to_their_tiles(product: Product) -> None:
    shape = product.shape()
    if shape is None:
        return
    sizes = {len(tiles) for tiles in ranges_of(shape, product.unit)}
    for tiles in sizes:
        for steps in {shape.steps, shape.last_steps}:
            slots, totals = sums_of(tiles, steps, shape.warps)
            assert max(slot for _, slot in slots) < shape.slots
            assert totals == [range(tile * steps, (tile + 1) * steps) for tile in range(tiles)]


@settings(max_examples=100, deadline=None)
@given(PRODUCTS)
def test_columns_are_split_no_more_than_shared_memory_demands(product: Product) -> None:
    limits = (product.shared_limit, product.shared_limit + (64 << 10), 1 << 30)
    shapes = [
        launch_shape(
            tokens=product.tokens,
            columns=product.columns,
            tiles=product.tiles,
            unit=product.unit,
            processors=product.processors,
            shared_limit=limit,
        )
        for limit in limits
    ]
    splits = [shape.splits for shape in shapes if shape is not None]
    assert splits == sorted(splits, reverse=True)
    assert splits[-1] == 1
    whole = shapes[-1]
    assert whole is not None
    assert whole.shared_bytes > product.shared_limit or splits[0] == 1


@pytest.mark.parametrize("processors", [4, 16, 20, 66, 128, 132])
@pytest.mark.parametrize("unit", [1, 2])
def test_one_token_always_fits(processors: int, unit: int) -> None:
    for columns in range(128, MOST_COLUMNS + 1, 128):
        # Four splits are the most that one token takes.
        for blocks in (1, processors // 4):
            shape = Product(
                tokens=1,
                columns=columns,
                units=TILES_OF_A_BLOCK // unit * blocks,
                unit=unit,
                processors=processors,
                shared_limit=LEAST_SHARED_BYTES,
            ).shape()
            assert shape is not None, columns
            assert shape.splits <= 4
            # Few columns lie in the gaps of the table, and are never split.
            assert shape.splits == 1 or columns > 16_384


@pytest.mark.parametrize(
    ("rows", "columns", "unit"),
    [
        # Llama-3.1-8B, 70B and 405B: qkv, o, gate and up, down.
        *((6_144, 4_096, 1), (4_096, 4_096, 1), (28_672, 4_096, 2), (4_096, 14_336, 1)),
        *((10_240, 8_192, 1), (8_192, 8_192, 1), (57_344, 8_192, 2), (8_192, 28_672, 1)),
        *((18_432, 16_384, 1), (16_384, 16_384, 1), (106_496, 16_384, 2), (16_384, 53_248, 1)),
    ],
)
def test_llamas_fit_on_small_and_large_gpus(rows: int, columns: int, unit: int) -> None:
    for processors in (16, 20, 84, 108, 132, 188):
        shape = Product(
            tokens=1,
            columns=columns,
            units=rows // 16 // unit,
            unit=unit,
            processors=processors,
            shared_limit=LEAST_SHARED_BYTES,
        ).shape()
        assert shape is not None, processors


def test_the_kernels_division_is_exact() -> None:
    # It never falls as the dividend grows: wherever the quotient changes is enough.
    for steps in range(1, MOST_STEPS + 1):
        assert 0 <= _reciprocal(steps) < 1 << 32
        for quotient in range(4097):
            assert divided(quotient * steps, steps) == quotient
            assert divided(quotient * steps + steps - 1, steps) == quotient


def test_only_splits_need_scratch() -> None:
    def bytes_of(columns: int) -> tuple[int, int]:
        shape = Product(
            tokens=2, columns=columns, units=64, unit=2, processors=132, shared_limit=99 << 10
        ).shape()
        assert shape is not None
        return shape.splits, partial_bytes(shape, 2, 128)

    assert bytes_of(8_192) == (1, 0)
    # float32 sums of two tokens and 2,048 rows.
    assert bytes_of(14_336) == (2, 2 * 2 * 2_048 * 4)
