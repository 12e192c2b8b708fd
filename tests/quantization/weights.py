"""Weights, inputs and exact products for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oomproof.formats import FORMATS
from oomproof.quantization.handlers import handler
from oomproof.quantization.reference import quantize_rows_fp8
from oomproof.quantization.tiled import Segment, TiledSet
from oomproof.quantization.tiles import (
    TILE_ROWS,
    tile_bytes,
    tile_codes,
    tile_scale_rows,
    tile_scales,
    tiles_of,
)

SHAPES = ((64, 64), (96, 160), (8, 1), (1, 1), (3, 21), (65, 63), (33, 192))
PRODUCT_ERRORS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Most relative error of a product in a type: rounded weights and a rounded result."""


def random_weight(
    shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> torch.Tensor:
    """[rows, columns] as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    return (0.02 * torch.randn(shape, generator=generator)).to(dtype)


def random_input(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[tokens, columns], a view into a wider tensor, so that its rows are not contiguous."""
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, columns + 16, generator=generator).to(dtype)
    return wide[:, 8 : 8 + columns]


def empty_parts(
    format_name: str, shape: tuple[int, int], device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """The parts of a weight as a loader has them: flat, of the planned bytes, with old contents."""
    parts = {}
    for component in FORMATS[format_name].components(*shape):
        dtype = getattr(torch, component.dtype)
        raw = torch.full((component.size_bytes,), 0xA5, dtype=torch.uint8, device=device)
        parts[component.name] = raw.view(dtype)
    return parts


def encode_in_slices(
    format_name: str, weight: torch.Tensor, rows_of_slice: int, *, search: bool = False
) -> dict[str, torch.Tensor]:
    """Parts that were written slice after slice."""
    found = handler(format_name, search=search)
    rows, columns = weight.shape
    parts = empty_parts(format_name, (rows, columns), str(weight.device))
    workspace = torch.full(
        (found.workspace_numel((rows, columns)),), float("nan"), device=weight.device
    )
    for first in range(0, rows, rows_of_slice):
        source = weight[first : first + rows_of_slice]
        found.encode_slice(source, parts, first, (rows, columns), workspace)
    found.finish(parts, (rows, columns), workspace)
    return parts


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of a type are equal as bytes, -0 and NaN too."""
    one, other = one.reshape(-1), other.reshape(-1)
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def product_error(
    format_name: str,
    x: torch.Tensor,
    parts: dict[str, torch.Tensor],
    shape: tuple[int, int],
    scratch_bytes: int,
) -> float:
    """Relative error of a product against float64; it is written between columns of others."""
    out = torch.full((len(x), shape[0] + 32), float("nan"), dtype=x.dtype, device=x.device)
    scratch = torch.full((scratch_bytes,), 0xA5, dtype=torch.uint8, device=x.device)
    handler(format_name).multiply(x, parts, shape, out[:, 16:-16], scratch)
    assert out[:, :16].isnan().all()
    assert out[:, -16:].isnan().all()
    exact = x.double()
    if format_name == "fp8":
        codes, scale = quantize_rows_fp8(x)
        exact = codes.double() * scale.double().unsqueeze(1)
    expected = exact @ handler(format_name).decode(parts, shape, torch.float32).double().t()
    return float((out[:, 16:-16].double() - expected).norm() / expected.norm())


def tiled_set(
    format_name: str, encoded: Sequence[dict[str, torch.Tensor]], columns: int, *, in_turn: bool
) -> TiledSet:
    """Weights that were encoded row by row, as one stream of tiles."""
    codes = [parts["weight"].view(-1, columns // 2) for parts in encoded]
    name = "scale" if format_name == "int4" else "absmax"
    scales = [parts[name].view(-1, columns // 64) for parts in encoded]
    counts = [len(rows) // TILE_ROWS for rows in codes]
    all_codes = codes[0].new_empty(sum(counts) * tile_bytes(columns))
    all_scales = scales[0].new_empty(sum(counts) * tile_scales(columns))
    segments = []
    for number, (count, parts) in enumerate(zip(counts, encoded, strict=True)):
        first, stride = (number, len(counts)) if in_turn else (sum(counts[:number]), 1)
        place = {"count": count, "first": first, "stride": stride}
        tile_codes(codes[number], tiles_of(all_codes, tile_bytes(columns), **place))
        tile_scale_rows(scales[number], tiles_of(all_scales, tile_scales(columns), **place))
        nested = None
        if format_name.endswith("-dq"):
            offset = parts["nested_offset"].view(())
            nested = (parts["nested_absmax"], parts["nested_quant_map"], offset)
        segments.append(
            Segment(rows=count * TILE_ROWS, first_tile=first, tile_stride=stride, nested=nested)
        )
    return TiledSet(
        codes=all_codes.view(sum(counts), -1),
        scales=all_scales.view(sum(counts), -1),
        quant_map=encoded[0].get("quant_map"),
        codebook=format_name.removesuffix("-dq"),
        segments=tuple(segments),
    )
