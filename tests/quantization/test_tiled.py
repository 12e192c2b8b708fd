"""Weights that are quantized into tiles, and products with sets of them, in plain torch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.library import opcheck

from oomproof.formats import FORMATS
from oomproof.memory.native import TILING_BYTES
from oomproof.quantization import operators, tiled_writer
from oomproof.quantization.handlers import handler
from oomproof.quantization.reference import dequantize_tiled
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiled_writer import TiledWriter, tiles_weight, tiling_bytes
from oomproof.quantization.tiles import untile_codes, untile_scale_rows
from tests.quantization.weights import (
    PRODUCT_ERRORS,
    empty_parts,
    random_input,
    random_weight,
    same_bits,
    tiled_set,
)

TILED = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int4")


def written(
    format_name: str, weight: torch.Tensor, cuts: list[int]
) -> tuple[dict[str, torch.Tensor], TiledSet]:
    """(Flat parts, row-major again; the set) of a weight that came in slices."""
    rows, columns = weight.shape
    found, weight_format = handler(format_name), FORMATS[format_name]
    parts = empty_parts(format_name, (rows, columns))
    name = "scale" if format_name == "int4" else "absmax"
    for tiled in ("weight", name):
        parts[tiled] = parts[tiled].view(rows // 16, -1)
    size = found.workspace_numel((rows, columns))
    size += tiling_bytes(weight_format, (rows, columns)) // 4
    workspace = torch.full((size,), float("nan"))
    writer = TiledWriter(found, parts, (rows, columns), workspace)
    for first, end in pairwise(cuts):
        writer.encode_slice(weight[first:end], first)
    writer.finish()
    row_major = dict(parts)
    row_major["weight"] = torch.empty(rows, columns // 2, dtype=torch.uint8)
    untile_codes(parts["weight"], row_major["weight"])
    row_major[name] = torch.empty(rows, columns // 64, dtype=parts[name].dtype)
    untile_scale_rows(parts[name], row_major[name])
    row_major = {part: tensor.view(-1) for part, tensor in row_major.items()}
    whole = tiled_set(format_name, [row_major], columns, in_turn=False)
    assert same_bits(whole.codes, parts["weight"])
    return row_major, whole


@pytest.mark.parametrize("format_name", TILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("limit", [1, 5000, TILING_BYTES])
def test_a_weight_in_tiles_has_the_bits_of_a_row_major_one(
    format_name: str, dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With less memory between, a slice is quantized piece by piece.
    monkeypatch.setattr(tiled_writer, "TILING_BYTES", limit)
    weight = random_weight((112, 384), dtype)
    expected = handler(format_name).encode(weight)
    for cuts in ([0, 112], [0, 16, 64, 112]):
        parts, _ = written(format_name, weight, cuts)
        assert parts.keys() == expected.keys()
        for name, part in parts.items():
            assert same_bits(part, expected[name]), (name, cuts)


@pytest.mark.parametrize("format_name", TILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_are_dequantized_to_the_bits_of_a_row_major_weight(
    format_name: str, dtype: torch.dtype
) -> None:
    parts, weights = written(format_name, random_weight((64, 640)), [0, 64])
    expected = handler(format_name).decode(parts, (64, 640), dtype)
    for first, end in ((0, 64), (16, 48), (48, 64)):
        found = dequantize_tiled(weights, weights.segments[0], first, end, dtype)
        assert same_bits(found, expected[first:end])


@pytest.mark.parametrize("format_name", TILED)
@pytest.mark.parametrize("tokens", [1, 7, 33, 100])
def test_a_sets_product_is_exact_to_rounding(format_name: str, tokens: int) -> None:
    columns = 384
    for rows, in_turn in (((64, 16, 32), False), ((48, 48), True)):
        weights = [random_weight((n, columns), seed=i) for i, n in enumerate(rows)]
        encoded = [handler(format_name).encode(weight) for weight in weights]
        tiled = tiled_set(format_name, encoded, columns, in_turn=in_turn)
        exact = torch.cat(
            [
                handler(format_name).decode(parts, (n, columns), torch.float32).double()
                for n, parts in zip(rows, encoded, strict=True)
            ]
        )
        for dtype in (torch.float32, torch.bfloat16):
            x = random_input(tokens, columns, dtype)
            out = torch.full((tokens, sum(rows) + 2), float("nan"), dtype=dtype)
            scratch = torch.empty(0, dtype=torch.uint8)
            operators.linear_4bit_tiled(x, *tiled.arguments(), out[:, 1:-1], scratch)
            expected = x.double() @ exact.t()
            error = (out[:, 1:-1].double() - expected).norm() / expected.norm()
            assert float(error) < PRODUCT_ERRORS[dtype]
            assert bool(out[:, [0, -1]].isnan().all())


@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq", "int4"])
def test_the_operator_passes_torchs_own_checks(format_name: str) -> None:
    encoded = [handler(format_name).encode(random_weight((32, 128), seed=n)) for n in (0, 1)]
    tiled = tiled_set(format_name, encoded, 128, in_turn=True)
    x, out = random_input(3, 128), torch.zeros(3, 64)
    scratch = torch.zeros(64, dtype=torch.uint8)
    opcheck(operators.linear_4bit_tiled._call, (x, *tiled.arguments(), out, scratch))


@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq", "int4"])
def test_a_set_survives_being_an_operators_arguments(format_name: str) -> None:
    encoded = [handler(format_name).encode(random_weight((n, 128))) for n in (32, 16, 48)]
    tiled = tiled_set(format_name, encoded, 128, in_turn=False)
    again = TiledSet.of(*tiled.arguments())
    assert again.rows == 96
    assert again.columns == 128
    for one, other in zip(tiled.segments, again.segments, strict=True):
        assert (one.rows, one.first_tile, one.tile_stride) == (
            other.rows,
            other.first_tile,
            other.tile_stride,
        )
        assert (one.nested is None) == (other.nested is None)


def test_rows_of_a_product_are_found_in_their_linears() -> None:
    encoded = [handler("nf4").encode(random_weight((n, 128))) for n in (32, 16, 48)]
    tiled = tiled_set("nf4", encoded, 128, in_turn=False)
    first, second, third = tiled.segments
    assert list(tiled.pieces(0, 96)) == [(first, 0, 32, 0), (second, 0, 16, 32), (third, 0, 48, 48)]
    assert list(tiled.pieces(30, 50)) == [
        (first, 30, 32, 0),
        (second, 0, 16, 2),
        (third, 0, 2, 18),
    ]
    assert list(tiled.pieces(60, 61)) == [(third, 12, 13, 0)]


def test_only_whole_tiles_of_four_bits_are_tiled() -> None:
    def is_tiled(name: str, shape: tuple[int, int]) -> bool:
        return tiles_weight(FORMATS[name], shape, FORMATS[name].components(*shape))

    assert all(is_tiled(name, (4096, 14336)) for name in TILED)
    assert not is_tiled("nf4", (4100, 4096))
    assert not is_tiled("nf4", (4096, 4160))
    assert not any(is_tiled(name, (4096, 4096)) for name in ("int8", "fp8", "bf16", "llm-int8"))
    # Someone else's components.
    assert not tiles_weight(FORMATS["nf4"], (64, 128), FORMATS["int4"].components(64, 128))


def test_what_lies_between_a_slice_and_its_tiles_is_bounded() -> None:
    for name in TILED:
        assert tiling_bytes(FORMATS[name], (14336, 4096)) <= TILING_BYTES
        assert tiling_bytes(FORMATS[name], (53248, 16384)) == TILING_BYTES
        assert tiling_bytes(FORMATS[name], (16, 128)) <= 16 * (64 + 8)
    # All codes of absmax values are between at once.
    assert tiles_weight(
        FORMATS["nf4-dq"], (65536, 16384), FORMATS["nf4-dq"].components(65536, 16384)
    )
    assert not tiles_weight(
        FORMATS["nf4-dq"], (65552, 16384), FORMATS["nf4-dq"].components(65552, 16384)
    )
