"""What each format means, in plain torch: any device, any shape.

The operators run this on a CPU, and every kernel is checked against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd

import torch

from oomproof.formats import BLOCK_SIZE, FP8_BLOCK, NESTED_BLOCK_SIZE, ceil_div
from oomproof.quantization.search import search_4bit, search_int4
from oomproof.quantization.tables import table_dynamic, thresholds_4bit
from oomproof.quantization.tiled import Segment, TiledSet, tiles_of_rows
from oomproof.quantization.tiles import TILE_ROWS, untile_codes, untile_scale_rows

TINY = 1e-38
INT8_MAX = 127
INT4_MAX = 7
INT4_OFFSET = 8
FP8_MAX = 448.0
"""The largest finite e4m3 value."""
SLICE_ELEMENTS = 128
"""A slice of a weight begins at a multiple of this: at a whole byte of codes, and a whole block."""
_STEP_ELEMENTS = 1 << 22
_CACHED_ELEMENTS = 1 << 17


def quantize_4bit(
    weight: torch.Tensor, quant_type: str, search: bool = False, block_size: int = BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes, and absmax of each block; see operators.quantize_4bit."""
    if search:
        codes, absmax = search_4bit(_blocks(weight, block_size), quant_type)
        return pack(codes.reshape(-1)[: weight.numel() + weight.numel() % 2]), absmax
    scaled, absmax = _scaled_blocks(weight, block_size)
    thresholds, ascending = (part.to(weight.device) for part in thresholds_4bit(quant_type))
    if quant_type == "fp4":
        magnitudes = ascending.to(torch.uint8)[_count_below(scaled.abs(), thresholds).int()]
        codes = magnitudes + 8 * (scaled < 0).to(torch.uint8)
    else:
        codes = _count_below(scaled, thresholds)  # its codes ascend by one
    codes = codes.reshape(-1)
    # What fills up the last byte is the code of 0.
    return pack(codes[: weight.numel() + weight.numel() % 2]), absmax


def quantize_absmax(
    absmax: torch.Tensor, block_size: int = NESTED_BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, their absmax, and the mean; see operators.quantize_absmax."""
    offset = absmax.mean()
    scaled, nested_absmax = _scaled_blocks(absmax - offset, block_size or absmax.numel())
    table = table_dynamic().to(absmax.device)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return codes.reshape(-1)[: absmax.numel()].clone(), nested_absmax, offset


def quantize_rows_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers, and a scale a row; see operators.quantize_rows_int8."""
    values = weight.float()
    scale = _over(values.abs().amax(dim=1), INT8_MAX)
    codes = (values / scale.clamp(min=TINY).unsqueeze(1)).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale


def quantize_rows_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values, and a scale a row; see operators.quantize_rows_fp8."""
    values = weight.float()
    scale = _over(values.abs().amax(dim=1), FP8_MAX)
    codes = (values / scale.clamp(min=TINY).unsqueeze(1)).clamp(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def quantize_groups_int4(
    weight: torch.Tensor, search: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes, and a scale a group; see operators.quantize_groups_int4."""
    codes, scale = codes_int4(weight, search)
    return pack(codes.reshape(-1)), scale


def codes_int4(weight: torch.Tensor, search: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes not yet packed, uint8 [rows, columns], and bfloat16 [rows, groups]."""
    rows, columns = weight.shape
    groups = ceil_div(columns, BLOCK_SIZE)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * BLOCK_SIZE - columns))
    blocks = padded.reshape(rows, groups, BLOCK_SIZE)
    if search:
        codes, scale = search_int4(blocks.reshape(-1, BLOCK_SIZE))
        return codes.reshape(rows, -1)[:, :columns], scale.reshape(rows, groups)
    scale = _over(blocks.abs().amax(dim=2), INT4_MAX).to(torch.bfloat16)
    codes = blocks / scale.float().clamp(min=TINY).unsqueeze(2)
    codes = codes.round().clamp(-INT4_OFFSET, INT4_MAX).reshape(rows, -1)[:, :columns]
    return (codes + INT4_OFFSET).to(torch.uint8), scale


def dequantize_4bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    quant_map: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    block_size: int = BLOCK_SIZE,
) -> torch.Tensor:
    """The weight that codes and absmax stand for, multiplied in float32 as bitsandbytes does."""
    values = quant_map[unpack(codes).int()]
    count = shape[0] * shape[1]
    scales = absmax.repeat_interleave(block_size)[:count]
    return (values[:count] * scales).to(dtype).reshape(shape)


def dequantize_absmax(
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_quant_map: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    """absmax values of double quantization: float32 [blocks]."""
    scales = nested_absmax
    if nested_absmax.numel() > 1:
        scales = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    return nested_quant_map[codes.int()] * scales + offset


def dequantize_int4(
    codes: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The weight of `quantize_groups_int4`."""
    rows, columns = shape
    values = unpack(codes)[: rows * columns].float().reshape(shape) - INT4_OFFSET
    scales = scale.float().repeat_interleave(BLOCK_SIZE, dim=1)[:, :columns]
    return (values * scales).to(dtype)


def linear_4bit(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    quant_map: torch.Tensor,
    out: torch.Tensor,
    block_size: int = BLOCK_SIZE,
) -> None:
    """See operators.linear_4bit."""
    columns = x.shape[1]

    def weight(first: int, end: int) -> torch.Tensor:
        start, stop = first * columns, end * columns
        return dequantize_4bit(
            codes[start // 2 : ceil_div(stop, 2)],
            absmax[start // block_size : ceil_div(stop, block_size)],
            quant_map,
            (end - first, columns),
            x.dtype,
            block_size,
        )

    _slice_after_slice(x, weight, out)


def linear_int4(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """See operators.linear_int4."""
    columns = x.shape[1]

    def weight(first: int, end: int) -> torch.Tensor:
        packed = codes[first * columns // 2 : ceil_div(end * columns, 2)]
        return dequantize_int4(packed, scale[first:end], (end - first, columns), x.dtype)

    _slice_after_slice(x, weight, out)


def dequantize_tiled(
    weights: TiledSet, segment: Segment, first: int, end: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows first … end - 1 of a linear, whole tiles: [end - first, columns]."""
    shape = (end - first, weights.columns)
    codes = weights.codes.new_empty(shape[0], weights.columns // 2)
    untile_codes(tiles_of_rows(weights.codes, segment, first, end), codes)
    scales = weights.scales.new_empty(shape[0], weights.blocks)
    untile_scale_rows(tiles_of_rows(weights.scales, segment, first, end), scales)
    if weights.quant_map is None:
        return dequantize_int4(codes.view(-1), scales, shape, dtype)
    absmax = scales.view(-1)
    if segment.nested is not None:
        nested_absmax, nested_quant_map, offset = segment.nested
        block = torch.arange(absmax.numel(), device=absmax.device) + first * weights.blocks
        outer = nested_absmax[block // NESTED_BLOCK_SIZE]
        absmax = nested_quant_map[absmax.int()] * outer + offset
    return dequantize_4bit(codes.view(-1), absmax, weights.quant_map, shape, dtype)


def linear_4bit_tiled(x: torch.Tensor, weights: TiledSet, out: torch.Tensor) -> None:
    """See operators.linear_4bit_tiled."""
    begin = 0
    for segment in weights.segments:
        tiles = slices_of(segment.rows // TILE_ROWS, TILE_ROWS * weights.columns)
        for first, end in ((TILE_ROWS * a, TILE_ROWS * b) for a, b in tiles):
            weight = dequantize_tiled(weights, segment, first, end, x.dtype)
            out[:, begin + first : begin + end] = torch.mm(x, weight.t())
        begin += segment.rows


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """See operators.linear_int8."""
    wide = x.float()
    for first, end in slices_of(weight.shape[0], weight.shape[1]):
        product = torch.mm(wide, weight[first:end].float().t())
        out[:, first:end] = product * scale[first:end]


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor
) -> None:
    """See operators.linear_fp8."""
    quantized, token_scale = quantize_rows_fp8(x)
    wide = quantized.float()
    for first, end in slices_of(weight.shape[0], weight.shape[1]):
        product = torch.mm(wide, weight[first:end].float().t())
        out[:, first:end] = product * token_scale.unsqueeze(1) * scale[first:end]


def dequantize_blocks(
    weight: torch.Tensor, block_scale: torch.Tensor, first: int, end: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows first … end - 1 of a weight with a scale for each square of 128 × 128."""
    rows = torch.arange(first, end, device=weight.device) // FP8_BLOCK
    scales = block_scale[rows].repeat_interleave(FP8_BLOCK, dim=1)[:, : weight.shape[1]]
    return (weight[first:end].float() * scales).to(dtype)


def linear_fp8_block(
    x: torch.Tensor, weight: torch.Tensor, block_scale: torch.Tensor, out: torch.Tensor
) -> None:
    """See operators.linear_fp8_block."""
    _slice_after_slice(
        x, lambda first, end: dequantize_blocks(weight, block_scale, first, end, x.dtype), out
    )


def slices_of(rows: int, columns: int, elements: int = _STEP_ELEMENTS) -> Iterator[tuple[int, int]]:
    """(first row, end) of slices of about that many elements, whole blocks and bytes but the last.

    A whole weight in float32 beside its codes is what a machine that needs them has no room for.
    """
    unit = SLICE_ELEMENTS // gcd(SLICE_ELEMENTS, columns)
    step = max(1, elements // (columns * unit)) * unit
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes, two to a byte, the first in the high half."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[0::2] << 4) | codes[1::2]


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The codes of `pack`, one to a byte."""
    return torch.stack((packed >> 4, packed & 0xF), dim=1).reshape(-1)


def _slice_after_slice(
    x: torch.Tensor, weight: Callable[[int, int], torch.Tensor], out: torch.Tensor
) -> None:
    for first, end in slices_of(out.shape[1], x.shape[1]):
        out[:, first:end] = torch.mm(x, weight(first, end).t())


def _count_below(values: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """How many thresholds are below each value, uint8: `torch.bucketize`, several times as fast.

    A few values at a time, which stay in a processor's cache for all comparisons.
    """
    counts = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    bounds = thresholds.tolist()
    for part, count in zip(
        values.reshape(-1).split(_CACHED_ELEMENTS),
        counts.view(-1).split(_CACHED_ELEMENTS),
        strict=True,
    ):
        for bound in bounds:
            count.add_(part > bound)
    return counts


def _over(values: torch.Tensor, number: float) -> torch.Tensor:
    """A quotient rounded once on any device; torch multiplies by 1 / number on CUDA."""
    return values / torch.full_like(values, number)


def _scaled_blocks(values: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values over the largest magnitude of their block, float32 [blocks, size], and those [blocks].

    Whole blocks are multiplied by the reciprocal, a last short one is divided, as bitsandbytes
    does: the codes of values between two table entries depend on it.
    """
    blocks = _blocks(values, size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)
    if values.numel() % size:
        scaled[-1] = blocks[-1] / absmax[-1].clamp(min=TINY)
    return scaled.clamp(-1, 1), absmax


def _blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """float32 [blocks, size], the last one filled up with zeros."""
    flat = values.reshape(-1).float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).reshape(-1, size)
