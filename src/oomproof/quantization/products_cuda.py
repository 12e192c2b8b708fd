"""Products on CUDA: few tokens in one kernel, many by torch's own on slices of the weight.

Imported with the first CUDA tensor, for it imports Triton. Nothing is allocated here: slices,
quantized inputs and partial sums lie in the scratch that is handed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from oomproof.formats import BLOCK_SIZE, ceil_div
from oomproof.quantization import products_tiled
from oomproof.quantization.blocks_triton import dequantize_blocks, product_blocks
from oomproof.quantization.dequantize_cuda import dequantize_tiles, supports_rows
from oomproof.quantization.dequantize_triton import (
    FP8_FACTOR,
    INT8_FACTOR,
    FourBits,
    dequantize_4bit,
    dequantize_8bit,
    scale_product,
)
from oomproof.quantization.gate_cuda import silu_mul
from oomproof.quantization.products_triton import FEW_TOKENS, product_4bit, product_8bit
from oomproof.quantization.quantize_triton import quantize_rows_out
from oomproof.quantization.scratch import ALIGNMENT
from oomproof.quantization.slices_cuda import (
    Dequantize,
    Scratch,
    multiply,
    room_of,
    slice_after_slice,
    slices_of,
)
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiles_triton import dequantize_tiled

_TOKEN_UNIT = 128
"""Pieces are multiples of it, so that the tiles of a matrix product are whole."""
_SCALED_MM_CAPABILITY = (9, 0)
"""Where torch's row-wise scaled product is cuBLAS's and allocates nothing.

On others it is CUTLASS's, which copies the scales to padded ones that it allocates.
"""
_SCALED_MM_UNIT = 16
_WAITING_SHARE = 4
"""Slices of up that wait for their gate take so many-th a part of scratch at most."""


def linear_4bit(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    quant_map: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """See operators.linear_4bit."""
    _four_bits(x, FourBits(codes=codes, scales=absmax, table=quant_map), out, scratch)


def linear_4bit_dq(  # noqa: PLR0913, PLR0917
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_quant_map: torch.Tensor,
    offset: torch.Tensor,
    quant_map: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
    block_size: int = BLOCK_SIZE,
) -> None:
    """See operators.linear_4bit_dq."""
    nested = (nested_absmax, nested_quant_map, offset)
    weight = FourBits(
        codes=codes, scales=absmax, table=quant_map, nested=nested, block_size=block_size
    )
    _four_bits(x, weight, out, scratch)


def linear_int4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """See operators.linear_int4."""
    _four_bits(x, FourBits(codes=codes, scales=scale), out, scratch)


def linear_4bit_tiled(  # noqa: PLR0913, PLR0917 - a set's tensors
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    quant_map: torch.Tensor | None,
    codebook: str,
    nested: Sequence[torch.Tensor],
    segments: Sequence[int],
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """See operators.linear_4bit_tiled."""
    weights = TiledSet.of(codes, scales, quant_map, codebook, nested, segments)
    if products_tiled.supports(x, weights, scratch.nbytes):
        products_tiled.multiply(x, weights, out, scratch)
        return

    for _ in slice_after_slice(x, _tiles(weights), out, Scratch(scratch)):
        pass


def gated_4bit_tiled(  # noqa: PLR0913, PLR0917 - a set's tensors
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    quant_map: torch.Tensor | None,
    codebook: str,
    nested: Sequence[torch.Tensor],
    segments: Sequence[int],
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """See operators.gated_4bit_tiled.

    The gate is multiplied to where the result will be; a slice of up waits in scratch until it is
    multiplied with it, while it is in the second cache.
    """
    weights = TiledSet.of(codes, scales, quant_map, codebook, nested, segments)
    if products_tiled.gates(weights) and products_tiled.supports(x, weights, scratch.nbytes):
        products_tiled.multiply(x, weights, out, scratch, biases=biases, gated=True)
        return
    tokens, width = out.shape
    left = Scratch(scratch)
    most = max(1, left.left.numel() // _WAITING_SHARE // (tokens * x.itemsize))
    waiting = left.cut((tokens, min(width, most)), x.dtype)
    room = room_of(x, width, left, most_rows=waiting.shape[1])
    slices = slices_of(0, width, room.step) + slices_of(width, 2 * width, room.step)

    def place(first: int, end: int) -> torch.Tensor:
        return out[:, first:end] if first < width else waiting[:, : end - first]

    for first, end in multiply(x, _tiles(weights), slices, place, room):
        product = place(first, end)
        if biases:
            product.add_(torch.narrow(biases[first // width], 0, first % width, end - first))
        if first >= width:
            gate = out[:, first - width : end - width]
            silu_mul(gate, product, gate)


def _tiles(weights: TiledSet) -> Dequantize:
    def dequantize(first: int, end: int, into: torch.Tensor) -> None:
        for segment, a, b, place in weights.pieces(first, end):
            part = into[place : place + b - a]
            write = dequantize_tiles if supports_rows(part, a) else dequantize_tiled
            write(weights, segment, a, part)

    return dequantize


def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """See operators.linear_int8."""
    left = Scratch(scratch)
    if len(x) <= FEW_TOKENS:
        product_8bit(x, weight, scale, None, 1.0, out, left.left)
        return
    # Integers are exact in 16 bits, and so scaled afterwards: no weight is rounded twice.
    for first, end in slice_after_slice(x, _eight_bits(weight), out, left):
        scale_product(out[:, first:end], scale[first:end], None, INT8_FACTOR)


def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """See operators.linear_fp8."""
    few, scaled_mm = len(x) <= FEW_TOKENS, _has_scaled_mm(x, weight, out)
    held = torch.float16 if few else torch.float8_e4m3fn if scaled_mm else x.dtype
    for first, end in _pieces(x, held, scratch, whole=scaled_mm and not few):
        left = Scratch(scratch)
        result = out[first:end]
        token_scale = left.cut((end - first,), torch.float32)
        quantized = left.cut((end - first, x.shape[1]), held)
        quantize_rows_out(x[first:end], quantized, token_scale)
        if few:
            factor = FP8_FACTOR**2
            product_8bit(quantized, weight, scale, token_scale, factor, result, left.left)
        elif scaled_mm:
            # The public form of it has no `out`.
            torch._scaled_mm(  # noqa: SLF001
                quantized,
                weight.t(),
                scale_a=token_scale.unsqueeze(1),
                scale_b=scale.unsqueeze(0),
                out_dtype=result.dtype,
                out=result,
            )
        else:
            for a, b in slice_after_slice(quantized, _eight_bits(weight), result, left):
                scale_product(result[:, a:b], scale[a:b], token_scale, FP8_FACTOR**2)


def linear_fp8_block(
    x: torch.Tensor,
    weight: torch.Tensor,
    block_scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """See operators.linear_fp8_block."""
    left = Scratch(scratch)
    if len(x) <= FEW_TOKENS:
        product_blocks(x, weight, block_scale, out, left.left)
        return

    def dequantize(first: int, _end: int, into: torch.Tensor) -> None:
        dequantize_blocks(weight, block_scale, first, into)

    for _ in slice_after_slice(x, dequantize, out, left):
        pass


def _four_bits(x: torch.Tensor, weight: FourBits, out: torch.Tensor, scratch: torch.Tensor) -> None:
    tokens, columns = x.shape
    left = Scratch(scratch)
    # Else a block of a table's formats would run over the end of a row.
    if tokens <= FEW_TOKENS and columns % BLOCK_SIZE == 0:
        product_4bit(x, weight, out, left.left)
        return

    def dequantize(first: int, _end: int, into: torch.Tensor) -> None:
        dequantize_4bit(weight, first, into)

    for _ in slice_after_slice(x, dequantize, out, left):
        pass


def _has_scaled_mm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> bool:
    rows, columns = weight.shape
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and rows % _SCALED_MM_UNIT == 0
        and columns % _SCALED_MM_UNIT == 0
        and out.stride(0) % _SCALED_MM_UNIT == 0
        and out.data_ptr() % _SCALED_MM_UNIT == 0
        and torch.cuda.get_device_capability(x.device) == _SCALED_MM_CAPABILITY
    )


def _eight_bits(weight: torch.Tensor) -> Dequantize:
    def dequantize(first: int, end: int, into: torch.Tensor) -> None:
        dequantize_8bit(weight[first:end], into)

    return dequantize


def _pieces(
    x: torch.Tensor, held: torch.dtype, scratch: torch.Tensor, *, whole: bool
) -> Iterator[tuple[int, int]]:
    """(first token, end) of pieces about equal whose quantized inputs and scales fit into scratch.

    Into all of it where `whole`, else they leave half.
    """
    tokens, columns = x.shape
    room = Scratch(scratch).left.numel() - 4 * ALIGNMENT
    room = (room if whole else room // 2) // (columns * held.itemsize + 4)
    fit = max(1, room - room % _TOKEN_UNIT if room > _TOKEN_UNIT else room)
    step = ceil_div(tokens, ceil_div(tokens, fit))
    step = min(fit, ceil_div(step, _TOKEN_UNIT) * _TOKEN_UNIT)
    for first in range(0, tokens, step):
        yield first, min(first + step, tokens)
