"""How launches of the product for many tokens divide rows and columns, against what it does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import ceil_div
from oomproof.quantization.wide_launch import (
    WIDE_TEMPLATES,
    WideShape,
    depth_of,
    partial_bytes,
    warpgroups_of,
    wide_shape,
    wide_template_of,
)

H200_SHARED_BYTES = 227 << 10
MOST_COLUMNS = 53_248
"""Of Llama-3.1-405B's down projection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """What is launched, and where."""

    tokens: int
    columns: int
    tiles: int
    processors: int = 132
    shared_limit: int = H200_SHARED_BYTES
    scratch_bytes: int = 1 << 26
    warpgroups: int | None = None
    splits: int | None = None
    clustered: bool | None = None

    def shape(self) -> WideShape | None:
        return wide_shape(
            tokens=self.tokens,
            columns=self.columns,
            tiles=self.tiles,
            processors=self.processors,
            shared_limit=self.shared_limit,
            scratch_bytes=self.scratch_bytes,
            warpgroups=self.warpgroups,
            splits=self.splits,
            clustered=self.clustered,
        )


PRODUCTS = st.builds(
    Product,
    tokens=st.integers(1, WIDE_TEMPLATES[-1]),
    columns=st.integers(1, 40).map(lambda n: 128 * n)
    | st.integers(1, MOST_COLUMNS // 128).map(lambda n: 128 * n),
    tiles=st.integers(1, 40) | st.integers(1, 3500),
    processors=st.integers(1, 200),
    shared_limit=st.sampled_from([99 << 10, 163 << 10, H200_SHARED_BYTES]),
    scratch_bytes=st.sampled_from([0, 1 << 20, 1 << 26]),
)
CHOSEN = st.builds(
    replace,
    PRODUCTS,
    warpgroups=st.none() | st.sampled_from([2, 3, 4]),
    splits=st.none() | st.integers(1, 12),
    clustered=st.none() | st.booleans(),
)
"""Launches that are asked for, too."""


def ranges_of(shape: WideShape) -> list[range]:
    """The units of each block along the rows, as the kernel counts them."""
    begins = [
        block * shape.units_per_block + min(block, shape.blocks_with_more)
        for block in range(shape.blocks + 1)
    ]
    return [range(begin, end) for begin, end in pairwise(begins)]


def sums_of(units: int, steps: int, warpgroups: int) -> list[list[range]]:
    """Steps that are added up for each unit, in the kernel's order."""
    every = units * steps
    begins = [every * group // warpgroups for group in range(warpgroups + 1)]
    added: dict[int, range] = {}
    found: dict[int, list[range]] = {}
    waiting = []
    for group, (begin, end) in enumerate(pairwise(begins)):
        step = begin
        while step < end:
            unit = step // steps
            stop = min(end, (unit + 1) * steps)
            if step > unit * steps:
                # Another has begun it: there is one place for this, and one part.
                assert group > 0
                assert group - 1 not in added
                added[group - 1] = range(step, stop)
            elif stop == (unit + 1) * steps:
                found[unit] = [range(step, stop)]
            else:
                waiting.append((group, unit, range(step, stop)))
            step = stop
    for group, unit, own in waiting:
        parts = [own]
        for other in range(group + 1, warpgroups):
            if begins[other] >= (unit + 1) * steps:
                break
            if begins[other] < begins[other + 1]:
                parts.append(added[other - 1])
        found[unit] = parts
    return [found[unit] for unit in range(units)]


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_every_unit_belongs_to_one_block(product: Product) -> None:
    shape = product.shape()
    if shape is None:
        return
    found = ranges_of(shape)
    units = [unit for block in found for unit in block]
    assert units == list(range(ceil_div(product.tiles, 4)))
    assert all(found)
    assert max(map(len, found)) == shape.most_units


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_splits_cover_all_columns_and_none_is_empty(product: Product) -> None:
    shape = product.shape()
    if shape is None:
        return
    blocks = product.columns // 64
    own = [min(blocks - split * shape.steps * 4, shape.steps * 4) for split in range(shape.splits)]
    assert min(own) > 0
    assert sum(own) == blocks
    steps = [(count + 3) // 4 for count in own]
    assert steps == [shape.steps] * (shape.splits - 1) + [shape.last_steps]


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_a_launch_is_what_was_asked_for_and_fits(product: Product) -> None:
    shape = product.shape()
    if shape is None:
        return
    assert shape.template >= product.tokens
    assert shape.warpgroups == (product.warpgroups or warpgroups_of(shape.template))
    assert shape.splits == (product.splits or shape.splits)
    assert product.clustered in {None, shape.clustered}
    assert shape.blocks * shape.splits <= product.processors
    x = shape.steps * 4 * shape.template * 128
    sums = (shape.warpgroups - 1 + shape.clustered * shape.most_units) * 64 * shape.template * 4
    assert shape.shared_bytes == 1024 + 256 * 256 + x + sums <= product.shared_limit
    if shape.clustered:
        assert shape.splits in {1, 2, 4, 8}
    assert partial_bytes(shape, product.tokens, product.tiles) <= product.scratch_bytes


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_sums_of_warpgroups_add_up_to_their_units(product: Product) -> None:
    shape = product.shape()
    if shape is None:
        return
    for units in {len(block) for block in ranges_of(shape)}:
        for steps in {shape.steps, shape.last_steps}:
            for unit, parts in enumerate(sums_of(units, steps, shape.warpgroups)):
                assert [step for part in parts for step in part] == list(
                    range(unit * steps, (unit + 1) * steps)
                )


@pytest.mark.parametrize("tokens", [8, 16, 32])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        # Llama-3.1-8B and 70B: qkv, o, gate and up, down.
        *((6_144, 4_096), (4_096, 4_096), (28_672, 4_096), (4_096, 14_336)),
        *((10_240, 8_192), (8_192, 8_192), (57_344, 8_192), (8_192, 28_672)),
    ],
)
def test_llamas_keep_an_h200_busy(tokens: int, rows: int, columns: int) -> None:
    product = Product(tokens=tokens, columns=columns, tiles=rows // 16)
    shape = product.shape()
    assert shape is not None
    least = rows // 64 * ceil_div(columns, 256) / product.processors
    assert shape.most_units * shape.steps <= 1.2 * least


def test_clusters_of_more_than_two_blocks_leave_odd_processors_idle() -> None:
    def blocks_of(splits: int, *, clustered: bool) -> int:
        product = Product(tokens=8, columns=4_096, tiles=1_500, splits=splits, clustered=clustered)
        shape = product.shape()
        assert shape is not None
        return shape.blocks * shape.splits

    assert [blocks_of(splits, clustered=False) for splits in (1, 2, 4, 8)] == [132, 132, 132, 128]
    assert [blocks_of(splits, clustered=True) for splits in (2, 4, 8)] == [132, 128, 128]


def test_only_splits_that_no_cluster_adds_up_need_scratch() -> None:
    product = Product(tokens=16, columns=4_096, tiles=256, splits=2, scratch_bytes=0)
    clustered = product.shape()
    assert clustered is not None
    assert clustered.clustered
    assert partial_bytes(clustered, 16, 256) == 0
    assert replace(product, clustered=False).shape() is None
    # float32 sums of 16 tokens and 4,096 rows, twice.
    needed = 2 * 16 * 4_096 * 4
    apart = replace(product, clustered=False, scratch_bytes=needed).shape()
    assert apart is not None
    assert partial_bytes(apart, 16, 256) == needed
    assert replace(product, clustered=False, scratch_bytes=needed - 1).shape() is None


def test_there_is_no_launch_where_the_table_leaves_no_room() -> None:
    product = Product(tokens=64, columns=128, tiles=4, shared_limit=99 << 10)
    assert product.shape() is None


def test_more_warpgroups_fetch_less_far_ahead() -> None:
    assert [wide_template_of(tokens) for tokens in (1, 8, 9, 33, 64)] == [8, 8, 16, 64, 64]
    # Bytes on their way: four warps, half a KiB a block of columns, four blocks a step.
    ahead = [groups * 4 * depth_of(groups) * 4 * 512 for groups in (2, 3, 4)]
    assert min(ahead) >= 48 << 10
