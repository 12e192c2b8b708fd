"""Rows of a weight as a weight of their own, row-major and in tiles."""

from __future__ import annotations

import pytest
import torch

from oomproof.quantization import operators
from oomproof.quantization.handlers import HANDLERS, handler
from oomproof.quantization.rows import parts_of_rows
from oomproof.quantization.tiled import set_of_rows
from tests.quantization.weights import random_input, random_weight, same_bits, tiled_set

NO_SCRATCH = torch.empty(0, dtype=torch.uint8)


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
@pytest.mark.parametrize("columns", [64, 256, 129])
def test_rows_decode_to_what_they_are_in_the_whole(format_name: str, columns: int) -> None:
    # 512 rows of 64 or 256 columns are whole blocks of 256 scales; of 129 a scale's, of a row.
    if columns % 64 and format_name[:3] in {"nf4", "fp4"}:
        pytest.skip("a block goes on in the next row")
    found, shape = handler(format_name), (1300, columns)
    parts = found.encode(random_weight(shape))
    whole = found.decode(parts, shape, torch.float32)
    for first, end in ((0, 512), (512, 1024), (1024, 1300)):
        own = parts_of_rows(parts, shape, first, end)
        decoded = found.decode(own, (end - first, columns), torch.float32)
        assert same_bits(decoded, whole[first:end].contiguous())
        for name, part in own.items():
            # Views: nothing is copied.
            start, stop = parts[name].data_ptr(), parts[name].data_ptr() + parts[name].nbytes
            assert start <= part.data_ptr() <= part.data_ptr() + part.nbytes <= stop


def test_rows_of_squares_have_the_scales_of_their_squares() -> None:
    codes = random_weight((300, 200)).to(torch.float8_e4m3fn)
    parts = {"weight": codes.view(-1), "block_scale": torch.rand(3 * 2)}
    found = handler("fp8-block")
    whole = found.decode(parts, (300, 200), torch.float32)
    for first, end in ((0, 128), (128, 300), (256, 300), (0, 300)):
        own = parts_of_rows(parts, (300, 200), first, end)
        assert own["block_scale"].untyped_storage().data_ptr() == (
            parts["block_scale"].untyped_storage().data_ptr()
        )
        decoded = found.decode(own, (end - first, 200), torch.float32)
        assert same_bits(decoded, whole[first:end].contiguous())
    with pytest.raises(ValueError, match="row 64 begins within its block_scale"):
        parts_of_rows(parts, (300, 200), 64, 300)


def test_rows_that_begin_within_a_block_are_refused() -> None:
    parts = handler("nf4-dq").encode(random_weight((600, 64)))
    with pytest.raises(ValueError, match="row 100 of 64 columns begins within its nested_absmax"):
        parts_of_rows(parts, (600, 64), 100, 600)
    parts = handler("nf4").encode(random_weight((9, 33)))
    with pytest.raises(ValueError, match="begins within its"):
        parts_of_rows(parts, (9, 33), 1, 9)


@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq", "int4"])
@pytest.mark.parametrize("in_turn", [False, True])
def test_rows_of_a_set_have_their_part_of_its_product(format_name: str, in_turn: bool) -> None:
    encoded = [handler(format_name).encode(random_weight((528, 128), seed=n)) for n in (0, 1)]
    weights = tiled_set(format_name, encoded, 128, in_turn=in_turn)
    x, whole = random_input(3, 128), torch.empty(3, 1056)
    operators.linear_4bit_tiled(x, *weights.arguments(), whole, NO_SCRATCH)
    for first, end, number in ((0, 128, 0), (128, 528, 0), (528, 1056, 1), (784, 800, 1)):
        part, linear, place = set_of_rows(weights, first, end)
        assert (linear, place, part.rows) == (number, first - 528 * number, end - first)
        out = torch.empty(3, end - first)
        operators.linear_4bit_tiled(x, *part.arguments(), out, NO_SCRATCH)
        torch.testing.assert_close(out, whole[:, first:end], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("first", "end"), [(0, 1056), (8, 528), (0, 520), (144, 528)])
def test_rows_of_several_linears_or_within_a_tile_or_a_block_are_refused(
    first: int, end: int
) -> None:
    encoded = [handler("nf4-dq").encode(random_weight((528, 128), seed=n)) for n in (0, 1)]
    weights = tiled_set("nf4-dq", encoded, 128, in_turn=True)
    with pytest.raises(ValueError, match=f"rows {first} to {end} are no set of their own"):
        set_of_rows(weights, first, end)
