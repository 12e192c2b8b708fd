"""One allocation for many buffers: aligned, phases over each other, nothing else overlaps."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import DType
from oomproof.memory.arena import ALIGNMENT_BYTES, Buffer, Layout, lay_out
from oomproof.units import round_up

law = settings(derandomize=True, deadline=None, max_examples=150)

SHAPES = st.lists(st.integers(0, 300), max_size=3).map(tuple)
PHASES = st.none() | st.sampled_from(["attention", "mlp", "head"])


@st.composite
def lists_of_buffers(draw: st.DrawFn) -> list[Buffer]:
    parts = draw(st.lists(st.tuples(SHAPES, st.sampled_from(list(DType)), PHASES), max_size=12))
    return [
        Buffer(name=f"buffer {number}", shape=shape, dtype=dtype, phase=phase)
        for number, (shape, dtype, phase) in enumerate(parts)
    ]


def bytes_of(layout: Layout, name: str) -> tuple[int, int]:
    """(first byte, the one after the last) of a buffer."""
    start = layout.offsets[name]
    return start, start + layout.buffers[name].size_bytes


def overlap(layout: Layout, one: str, other: str) -> bool:
    (first, end), (other_first, other_end) = bytes_of(layout, one), bytes_of(layout, other)
    return max(first, other_first) < min(end, other_end)


def buffer(name: str, size_bytes: int, phase: str | None = None) -> Buffer:
    return Buffer(name=name, shape=(size_bytes,), dtype=DType.UINT8, phase=phase)


@pytest.mark.parametrize(
    ("shape", "dtype", "size_bytes"),
    [
        ((3, 5), DType.FLOAT32, 60),
        ((7,), DType.INT64, 56),
        ((2, 3, 4), DType.BFLOAT16, 48),
        ((4, 0), DType.FLOAT32, 0),
        ((), DType.INT32, 4),
    ],
)
def test_a_buffer_takes_its_elements_times_their_size(
    shape: tuple[int, ...], dtype: DType, size_bytes: int
) -> None:
    assert Buffer(name="x", shape=shape, dtype=dtype).size_bytes == size_bytes


def test_what_is_always_alive_comes_first_and_the_phases_share_what_follows() -> None:
    layout = lay_out(
        [
            buffer("mlp", 1000, "mlp"),
            buffer("hidden", 300),
            buffer("queries", 200, "attention"),
            buffer("inputs", 1),
            buffer("attended", 100, "attention"),
        ]
    )
    assert dict(layout.offsets) == {
        "hidden": 0,
        "inputs": 512,
        "mlp": 768,
        "queries": 768,
        "attended": 1024,
    }
    assert layout.size_bytes == 768 + 1024


def test_no_buffers_take_no_memory() -> None:
    layout = lay_out([])
    assert (dict(layout.offsets), layout.size_bytes) == ({}, 0)


def test_buffers_may_come_from_an_iterator() -> None:
    assert lay_out(iter([buffer("a", 1), buffer("b", 1, "mlp")])).size_bytes == 512


@law
@given(lists_of_buffers())
def test_every_buffer_is_aligned_and_inside_the_arena(buffers: list[Buffer]) -> None:
    layout = lay_out(buffers)
    assert list(layout.buffers.values()) == buffers
    assert layout.offsets.keys() == layout.buffers.keys()
    for name in layout.buffers:
        first, end = bytes_of(layout, name)
        assert first % ALIGNMENT_BYTES == 0
        assert 0 <= first <= end <= layout.size_bytes


@law
@given(lists_of_buffers())
def test_only_buffers_of_different_phases_overlap(buffers: list[Buffer]) -> None:
    layout = lay_out(buffers)
    for one, other in combinations(buffers, 2):
        if one.phase is None or other.phase is None or one.phase == other.phase:
            assert not overlap(layout, one.name, other.name)


@law
@given(lists_of_buffers())
def test_all_phases_begin_at_the_same_byte(buffers: list[Buffer]) -> None:
    layout = lay_out(buffers)
    always = sum(round_up(one.size_bytes, ALIGNMENT_BYTES) for one in buffers if one.phase is None)
    first = {one.phase: one.name for one in reversed(buffers) if one.phase is not None}
    assert {layout.offsets[name] for name in first.values()} <= {always}


@law
@given(lists_of_buffers())
def test_the_arena_is_what_always_lives_and_the_largest_phase(buffers: list[Buffer]) -> None:
    sizes: dict[str | None, int] = {}
    for one in buffers:
        aligned = round_up(one.size_bytes, ALIGNMENT_BYTES)
        sizes[one.phase] = sizes.get(one.phase, 0) + aligned
    always = sizes.pop(None, 0)
    assert lay_out(buffers).size_bytes == always + max(sizes.values(), default=0)


@law
@given(lists_of_buffers(), st.integers(0, 11), st.integers(1, 5000))
def test_a_larger_buffer_never_makes_a_smaller_arena(
    buffers: list[Buffer], which: int, more: int
) -> None:
    grown = [
        buffer(one.name, one.size_bytes + more, one.phase) if number == which else one
        for number, one in enumerate(buffers)
    ]
    assert lay_out(grown).size_bytes >= lay_out(buffers).size_bytes
