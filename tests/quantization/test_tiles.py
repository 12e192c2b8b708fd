"""The tiled order, against loops that follow its definition element by element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.quantization import tiles

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 11))
"""Tiles, and pairs of blocks."""
DTYPES = st.sampled_from([torch.uint8, torch.float32, torch.bfloat16])


def slowly_tiled_codes(codes: torch.Tensor) -> list[int]:
    """A byte of the tiled order after the other."""
    rows, width = codes.shape
    blocks = width // 32
    found = [-1] * (rows * width)
    for i in range(rows // 16):
        for kb in range(blocks):
            fragment = (i * blocks + kb) * 512
            for lane in range(32):
                g, t = divmod(lane, 4)
                for j in range(4):
                    for pair in range(2):
                        for half in range(2):
                            column = 64 * kb + 16 * t + 4 * j + 2 * pair
                            byte = codes[16 * i + g + 8 * half, column // 2]
                            found[fragment + 16 * lane + 4 * j + 2 * pair + half] = int(byte)
    return found


def slowly_tiled_scales(scales: torch.Tensor) -> list[float]:
    """An element of the tiled order after the other."""
    rows, blocks = scales.shape
    found = [float("nan")] * (rows * blocks)
    for row in range(rows):
        i, (half, g) = row // 16, divmod(row % 16, 8)
        for kb in range(blocks):
            group, b = divmod(kb, 8)
            start = i * 16 * blocks + 16 * 8 * group
            size = min(8, blocks - 8 * group)
            place = start + g * 2 * size + (b >> 1) * 4 + half * 2 + (b & 1)
            found[place] = float(scales[row, kb])
    return found


def numbered(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 256, shape, generator=generator).to(dtype)


@settings(max_examples=30, deadline=None)
@given(SIZES)
def test_codes_lie_where_the_definition_says(size: tuple[int, int]) -> None:
    count, pairs = size
    codes = numbered(16 * count, 64 * pairs)
    tiled = torch.zeros(count, tiles.tile_bytes(128 * pairs), dtype=torch.uint8)
    tiles.tile_codes(codes, tiled)
    assert tiled.flatten().tolist() == slowly_tiled_codes(codes)
    back = torch.zeros_like(codes)
    tiles.untile_codes(tiled, back)
    assert torch.equal(back, codes)


@settings(max_examples=30, deadline=None)
@given(SIZES, DTYPES)
def test_scales_lie_where_the_definition_says(size: tuple[int, int], dtype: torch.dtype) -> None:
    count, pairs = size
    scales = numbered(16 * count, 2 * pairs, dtype=dtype)
    tiled = torch.zeros(count, tiles.tile_scales(128 * pairs), dtype=dtype)
    tiles.tile_scale_rows(scales, tiled)
    assert tiled.flatten().tolist() == slowly_tiled_scales(scales)
    back = torch.zeros_like(scales)
    tiles.untile_scale_rows(tiled, back)
    assert torch.equal(back, scales)


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(0, 3), st.integers(1, 3), st.data())
def test_a_part_of_the_rows_goes_to_its_tiles_of_a_stream(
    size: tuple[int, int], first: int, stride: int, data: st.DataObject
) -> None:
    count, pairs = size
    codes = numbered(16 * count, 64 * pairs)
    tile = tiles.tile_bytes(128 * pairs)
    stream = torch.zeros(first + count * stride + 2, tile, dtype=torch.uint8)
    place = tiles.tiles_of(stream.view(-1), tile, count, first=first, stride=stride)
    begin = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(begin + 1, count))
    tiles.tile_codes(codes[16 * begin : 16 * end], place[begin:end])
    expected = torch.zeros_like(stream)
    whole = torch.tensor(slowly_tiled_codes(codes), dtype=torch.uint8).view(count, tile)
    for number in range(begin, end):
        expected[first + stride * number] = whole[number]
    assert torch.equal(stream, expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 128), True),
        ((48, 384), True),
        ((8, 128), False),
        ((16, 64), False),
        ((17, 128), False),
        ((16, 192), False),
        ((0, 128), False),
    ],
)
def test_whole_tiles_and_pairs_of_blocks_can_be_tiled(
    shape: tuple[int, int], expected: bool
) -> None:
    assert tiles.can_tile(shape) is expected
