"""Where the parameters of a layer lie: streams of tiles, in the bytes that were planned."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.engine.native.layout import Block, Placed, Tiling, lay_out_block, name_in_layer
from oomproof.memory.arena import ALIGNMENT_BYTES
from tests.engine.native.layers import Shape, layer_tensors

TILED = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int4")
OTHERS = ("bf16", "int8", "fp8")
LLAMA = (4096, 1024, 4096, 14336)


def by_name(block: Block) -> dict[str, Placed]:
    return {name_in_layer(placed.spec): placed for placed in block.placed}


def ranges_of(placed: Placed) -> list[tuple[int, int]]:
    """(begin, end) in bytes of everything that it has."""
    found = []
    for component, offset in zip(placed.held.components, placed.offsets, strict=True):
        tiling = placed.tiling
        if tiling is None or component.name not in {"weight", "absmax", "scale"}:
            found.append((offset, offset + component.size_bytes))
            continue
        tiles = placed.spec.shape[0] // 16
        size = component.size_bytes // tiles
        begins = (offset + tile * tiling.tile_stride * size for tile in range(tiles))
        found += [(begin, begin + size) for begin in begins]
    return found


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from((*TILED, *OTHERS)),
    st.tuples(*(st.sampled_from((16, 24, 48, 64, 128, 192, 256)) for _ in range(4))),
    st.booleans(),
    st.booleans(),
)
def test_nothing_overlaps_and_bytes_are_those_of_the_plan(
    format_name: str, shape: Shape, biased: bool, tiled: bool
) -> None:
    tensors = layer_tensors(shape, format_name, biased=biased)
    block = lay_out_block(tensors, format_name, tiled=tiled)
    assert block.size_bytes == sum(held.allocated_bytes(ALIGNMENT_BYTES) for _, held in tensors)
    assert sorted(p.spec.name for p in block.placed) == sorted(spec.name for spec, _ in tensors)
    ranges = sorted(span for placed in block.placed for span in ranges_of(placed))
    ends = [0, *(end for _, end in ranges)]
    assert all(begin >= end for (begin, _), end in zip(ranges, ends, strict=False))
    assert ends[-1] <= block.size_bytes


@pytest.mark.parametrize("format_name", TILED)
def test_a_projections_codes_are_one_stream_and_so_are_its_scales(format_name: str) -> None:
    found = by_name(lay_out_block(layer_tensors(LLAMA, format_name), format_name, tiled=True))
    for names, in_turn in ((("q", "k", "v"), False), (("gate", "up"), True)):
        folder = "mlp" if in_turn else "self_attn"
        members = [found[f"{folder}.{name}_proj.weight"] for name in names]
        tilings = [placed.tiling for placed in members]
        if in_turn:
            expected = [Tiling(first_tile=n, tile_stride=2, tiles=1792) for n in (0, 1)]
        else:
            expected = [Tiling(first_tile=n, tile_stride=1, tiles=384) for n in (0, 256, 320)]
        assert tilings == expected
        for index in (0, 1):
            size = members[0].held.components[index].size_bytes
            tile = size // (members[0].spec.shape[0] // 16)
            start = members[0].offsets[index]
            assert start % ALIGNMENT_BYTES == 0
            assert [placed.offsets[index] - start for placed in members] == [
                tiling.first_tile * tile for tiling in expected
            ]
    alone = found["self_attn.o_proj.weight"].tiling
    assert alone == Tiling(first_tile=0, tile_stride=1, tiles=256)


def test_scales_that_alignment_would_part_are_streams_of_their_own() -> None:
    # 48 rows of two blocks: 96 codes of absmax values a linear.
    found = by_name(lay_out_block(layer_tensors((48, 48, 128, 48), "nf4-dq"), "nf4-dq", tiled=True))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"):
        tiling = found[f"{name}.weight"].tiling
        assert tiling == Tiling(first_tile=0, tile_stride=1, tiles=3)
    # As float32 they are 384 bytes, no multiple of 256 either; with 64 rows they are.
    found = by_name(lay_out_block(layer_tensors((64, 64, 128, 64), "nf4"), "nf4", tiled=True))
    assert found["mlp.up_proj.weight"].tiling == Tiling(first_tile=1, tile_stride=2, tiles=8)


def test_what_is_no_whole_tile_stays_row_major_and_so_does_a_cpu() -> None:
    found = by_name(lay_out_block(layer_tensors((64, 24, 128, 96), "nf4"), "nf4", tiled=True))
    tiled = {name for name, placed in found.items() if placed.tiling is not None}
    # Three of the linears have a side of 24 or of 96 columns, or of 64.
    assert tiled == {
        "self_attn.q_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
    }
    on_a_cpu = lay_out_block(layer_tensors(LLAMA, "nf4"), "nf4")
    assert all(placed.tiling is None for placed in on_a_cpu.placed)
    offsets = [offset for placed in on_a_cpu.placed for offset in placed.offsets]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("format_name", OTHERS)
def test_other_formats_lie_as_they_did(format_name: str) -> None:
    tensors = layer_tensors(LLAMA, format_name, biased=True)
    assert lay_out_block(tensors, format_name, tiled=True) == lay_out_block(tensors, format_name)
