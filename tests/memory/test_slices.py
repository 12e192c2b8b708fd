"""How weights are cut into slices: for the second cache, for the GPU's tiles, for scratch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import DType, ceil_div
from oomproof.memory.native import CHUNK_TOKENS, StepShape, scratch_bytes
from oomproof.memory.slices import SLICE_BYTES, SLICE_RESULTS, cut_rows, up_rows
from oomproof.models.resolve import resolve
from oomproof.units import MIB

law = settings(derandomize=True, deadline=None, max_examples=300)


def cut(rows: int, columns: int, *, tokens: int = CHUNK_TOKENS, room: int = 56 * MIB) -> int:
    return cut_rows(tokens=tokens, rows=rows, row_bytes=2 * columns, room_bytes=room)


@pytest.mark.parametrize(
    ("rows", "columns", "step"),
    [(6144, 4096, 2048), (4096, 4096, 2048), (14_336, 4096, 2048), (4096, 14_336, 2048)],
)
def test_a_whole_chunk_has_slices_of_two_rounds_of_tiles(
    rows: int, columns: int, step: int
) -> None:
    assert cut(rows, columns) == step


def test_few_tokens_have_as_few_slices_as_fit() -> None:
    # 14,336 rows of 8 KiB in two; 1,024 rows would keep a quarter of the GPU busy.
    assert cut(14_336, 4096, tokens=100) == 7168
    assert cut(4096, 14_336, tokens=1024) == 2048


def test_slices_of_a_weight_are_about_equal() -> None:
    # Not 2,048 three times and 1,024.
    assert cut(7168, 4096) == 1792


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "llama-3.1-8b", "qwen3-14b", "llama-3.1-70b", "llama-3.1-405b"]
)
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT32])
def test_planned_scratch_holds_a_wide_slice_of_any_weight(name: str, dtype: DType) -> None:
    spec = resolve(name)
    room = scratch_bytes(
        spec,
        StepShape(context=8192, concurrency=1, compute_dtype=dtype, quantized=True, has_head=False),
    )
    for tensor in spec.tensors:
        if tensor.role != "linear":
            continue
        rows, columns = tensor.shape
        found = cut_rows(
            tokens=CHUNK_TOKENS,
            rows=rows,
            row_bytes=columns * dtype.itemsize,
            room_bytes=room,
        )
        assert found >= min(rows, 1024 + 128)


@law
@given(
    tokens=st.integers(1, 5000),
    rows=st.integers(1, 30_000),
    row_bytes=st.integers(2, 120_000),
    room=st.integers(1, 256 * MIB),
    most=st.none() | st.integers(1, 5000),
)
def test_slices_fit_and_leave_nothing_over(
    tokens: int, rows: int, row_bytes: int, room: int, most: int | None
) -> None:
    found = cut_rows(tokens=tokens, rows=rows, row_bytes=row_bytes, room_bytes=room, most_rows=most)
    assert 1 <= found <= rows
    assert most is None or found <= most
    assert found == 1 or found * row_bytes <= room
    if most is None and found > 1:
        limit = max(SLICE_BYTES, ceil_div(SLICE_RESULTS, tokens) * row_bytes)
        assert found * row_bytes <= limit


@pytest.mark.parametrize(
    ("hidden", "width", "rows"),
    [(4096, 14_336, 4096), (2048, 4096, 4096), (64, 96, 96), (4094, 14_336, 14_336)],
)
def test_up_waits_in_slices_that_begin_at_whole_blocks(hidden: int, width: int, rows: int) -> None:
    assert up_rows(hidden, width) == rows
    assert rows == width or rows * hidden % (64 * 256) == 0
