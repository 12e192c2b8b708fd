"""How launches of the product for many tokens divide rows and columns, against what it does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import DType, ceil_div
from oomproof.memory.native import StepShape, scratch_bytes
from oomproof.models.resolve import resolve
from oomproof.quantization.wide_launch import (
    WIDE_TEMPLATES,
    WideShape,
    depth_of,
    partial_bytes,
    warpgroups_of,
    wide_shapes,
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

    @property
    def groups(self) -> int:
        """Warpgroups, by rule where none are asked for."""
        return self.warpgroups or warpgroups_of(wide_template_of(self.tokens), 1)

    def shapes(self) -> tuple[WideShape, ...]:
        """All launches."""
        return wide_shapes(
            tokens=self.tokens,
            columns=self.columns,
            tiles=self.tiles,
            warpgroups=self.groups,
            processors=self.processors,
            shared_limit=self.shared_limit,
            scratch_bytes=self.scratch_bytes,
        )


CHOSEN = st.builds(
    Product,
    tokens=st.integers(1, WIDE_TEMPLATES[-1]),
    columns=st.integers(1, 40).map(lambda n: 128 * n)
    | st.integers(1, MOST_COLUMNS // 128).map(lambda n: 128 * n),
    tiles=st.integers(1, 40) | st.integers(1, 3500),
    processors=st.integers(1, 200),
    shared_limit=st.sampled_from([99 << 10, 163 << 10, H200_SHARED_BYTES]),
    scratch_bytes=st.sampled_from([0, 1 << 20, 1 << 26]),
    warpgroups=st.none() | st.sampled_from([2, 3, 4]),
)


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
    for shape in product.shapes():
        found = ranges_of(shape)
        units = [unit for block in found for unit in block]
        assert units == list(range(ceil_div(product.tiles, 4)))
        assert all(found)
        assert max(map(len, found)) == shape.most_units


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_splits_cover_all_columns_and_none_is_empty(product: Product) -> None:
    blocks = product.columns // 64
    for shape in product.shapes():
        most = shape.steps * 4
        own = [min(blocks - split * most, most) for split in range(shape.splits)]
        assert min(own) > 0
        assert sum(own) == blocks
        steps = [(count + 3) // 4 for count in own]
        assert steps == [shape.steps] * (shape.splits - 1) + [shape.last_steps]


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_a_launch_fits_and_no_two_are_alike(product: Product) -> None:
    shapes = product.shapes()
    assert len({shape.splits for shape in shapes}) == len(shapes)
    for shape in shapes:
        assert shape.template >= product.tokens
        assert shape.warpgroups == product.groups
        assert shape.warps == 4 * shape.warpgroups
        assert shape.blocks * shape.splits <= product.processors
        x = shape.steps * 4 * (shape.template + 1) * 128
        sums = (shape.warpgroups - 1) * 64 * shape.template * 4
        assert shape.shared_bytes == 1024 + 256 * 256 + x + sums <= product.shared_limit
        # float32 sums of whole units and all of a kernel's tokens, of one split too.
        written = shape.splits * shape.template * 64 * ceil_div(product.tiles, 4) * 4
        assert partial_bytes(shape, product.tiles) == written
        assert written <= product.scratch_bytes


@settings(max_examples=150, deadline=None)
@given(CHOSEN)
def test_sums_of_warpgroups_add_up_to_their_units(product: Product) -> None:
    # The first ones: all of them take long.
    for shape in product.shapes()[:3]:
        for units in {len(block) for block in ranges_of(shape)}:
            for steps in {shape.steps, shape.last_steps}:
                for unit, parts in enumerate(sums_of(units, steps, shape.warpgroups)):
                    assert [step for part in parts for step in part] == list(
                        range(unit * steps, (unit + 1) * steps)
                    )


LLAMAS = {
    # Rows and columns of each product.
    "8b": {
        "qkv": (6_144, 4_096),
        "o": (4_096, 4_096),
        "gate_up": (28_672, 4_096),
        "down": (4_096, 14_336),
    },
    "70b": {
        "qkv": (10_240, 8_192),
        "o": (8_192, 8_192),
        "gate_up": (57_344, 8_192),
        "down": (8_192, 28_672),
    },
}
SCRATCH_BYTES = {"8b": 56 << 20, "70b": 112 << 20}
"""What a plan gives them, see the test below."""
MEASURED: dict[tuple[int, str], tuple[dict[int, float], float]] = {
    # An 8B's in nf4-dq on an H200, µs: (tokens, product) → ({splits: of launches that add up their
    # splits by themselves}, of the fastest).
    (8, "qkv"): ({4: 9.0, 6: 9.6, 8: 9.3, 16: 9.9}, 9.0),
    (8, "o"): ({2: 8.4, 4: 7.7, 8: 7.7, 16: 8.3}, 7.7),
    (8, "gate_up"): ({2: 24.4, 4: 24.1, 8: 25.2, 16: 28.1}, 24.1),
    (8, "down"): ({4: 15.8, 8: 15.2, 12: 15.4, 14: 16.1}, 15.2),
    (16, "qkv"): ({4: 10.2, 6: 10.6, 8: 10.2, 16: 11.4}, 10.2),
    (16, "o"): ({2: 10.0, 4: 8.6, 8: 8.4, 16: 9.1}, 8.4),
    (16, "gate_up"): ({2: 27.1, 4: 26.2, 6: 29.1, 8: 27.9}, 26.2),
    (16, "down"): ({8: 16.9, 10: 17.9, 12: 17.2, 14: 17.4}, 16.9),
    (32, "qkv"): ({4: 12.5, 6: 14.0, 8: 12.1, 16: 13.4}, 12.1),
    (32, "o"): ({4: 10.6, 6: 10.4, 8: 9.9, 16: 10.4}, 9.9),
    (32, "gate_up"): ({2: 37.0, 3: 40.2, 4: 35.3, 8: 38.6}, 35.3),
    (32, "down"): ({8: 22.7, 10: 22.6, 12: 21.8, 14: 22.2}, 21.8),
    (64, "qkv"): ({4: 18.4, 6: 20.7, 8: 18.2, 16: 20.6}, 18.2),
    (64, "o"): ({4: 14.9, 6: 15.5, 8: 14.2, 16: 15.3}, 14.2),
    (64, "gate_up"): ({4: 51.9, 6: 66.9, 8: 66.6}, 51.9),
    (64, "down"): ({14: 32.1, 19: 35.1, 28: 37.1}, 32.1),
}


def llama_shapes(model: str, name: str, tokens: int) -> tuple[WideShape, ...]:
    rows, columns = LLAMAS[model][name]
    return Product(
        tokens=tokens, columns=columns, tiles=rows // 16, scratch_bytes=SCRATCH_BYTES[model]
    ).shapes()


@pytest.mark.parametrize(("tokens", "name"), MEASURED)
def test_the_rules_choice_is_as_fast_as_the_fastest_that_was_measured(
    tokens: int, name: str
) -> None:
    times, fastest = MEASURED[tokens, name]
    assert times[llama_shapes("8b", name, tokens)[0].splits] <= 1.04 * fastest


@pytest.mark.parametrize("tokens", WIDE_TEMPLATES)
@pytest.mark.parametrize("model", LLAMAS)
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
def test_llamas_have_a_launch_within_their_scratch_that_keeps_an_h200_busy(
    model: str, name: str, tokens: int
) -> None:
    shapes = llama_shapes(model, name, tokens)
    assert shapes
    rows, columns = LLAMAS[model][name]
    least = rows // 64 * ceil_div(columns, 256) / 132
    assert shapes[0].most_units * shapes[0].steps <= 1.2 * least


@pytest.mark.parametrize(("model", "name"), [("8b", "llama-3.1-8b"), ("70b", "llama-3.1-70b")])
def test_their_scratch_is_what_a_plan_gives(model: str, name: str) -> None:
    shape = StepShape(
        context=8192,
        concurrency=32,
        compute_dtype=DType.BFLOAT16,
        quantized=True,
        has_head=False,
    )
    assert scratch_bytes(resolve(name), shape) == SCRATCH_BYTES[model]


def test_less_scratch_is_fewer_splits() -> None:
    product = Product(tokens=16, columns=4_096, tiles=384)
    assert product.shapes()[0].splits == 8
    of_a_split = 16 * 6_144 * 4
    assert replace(product, scratch_bytes=8 * of_a_split - 1).shapes()[0].splits == 4
    assert [s.splits for s in replace(product, scratch_bytes=of_a_split).shapes()] == [1]
    assert replace(product, scratch_bytes=of_a_split - 1).shapes() == ()


def test_there_is_no_launch_where_the_table_leaves_no_room() -> None:
    product = Product(tokens=64, columns=128, tiles=4, shared_limit=99 << 10)
    assert product.shapes() == ()


def test_more_warpgroups_fetch_less_far_ahead() -> None:
    assert [wide_template_of(tokens) for tokens in (1, 9, 17, 33, 64)] == [8, 16, 32, 64, 64]
    assert [warpgroups_of(template, 1) for template in WIDE_TEMPLATES] == [4, 4, 3, 2]
    assert [warpgroups_of(template, 4) for template in WIDE_TEMPLATES] == [3, 3, 3, 2]
    # Bytes on their way: four warps, half a KiB a block of columns, four blocks a step.
    ahead = [groups * 4 * depth_of(groups) * 4 * 512 for groups in (2, 3, 4)]
    assert min(ahead) >= 48 << 10
