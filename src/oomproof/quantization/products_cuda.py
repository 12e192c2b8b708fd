"""Products on CUDA: few tokens in one kernel, many by torch's own on slices of the weight.

Imported with the first CUDA tensor, for it imports Triton. Nothing is allocated here: slices,
quantized inputs and partial sums lie in the scratch that is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from oomproof.formats import BLOCK_SIZE, ceil_div
from oomproof.quantization import products_tiled
from oomproof.quantization.dequantize_cuda import dequantize_tiles, supports_rows
from oomproof.quantization.dequantize_triton import (
    FP8_FACTOR,
    INT8_FACTOR,
    FourBits,
    dequantize_4bit,
    dequantize_8bit,
    scale_product,
)
from oomproof.quantization.products_triton import FEW_TOKENS, product_4bit, product_8bit
from oomproof.quantization.quantize_triton import quantize_rows_out
from oomproof.quantization.scratch import ALIGNMENT, aligned
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiles_triton import dequantize_tiled

_ROW_UNIT = 128
"""Slices are multiples of it, so that the tiles of a matrix product are whole."""
_SCALED_MM_CAPABILITY = (9, 0)
"""Where torch's row-wise scaled product is cuBLAS's and allocates nothing.

On others it is CUTLASS's, which copies the scales to padded ones that it allocates.
"""
_SCALED_MM_UNIT = 16


class _Scratch:
    """Cuts tensors out of scratch, one after the other, each aligned."""

    def __init__(self, scratch: torch.Tensor) -> None:
        self._left = scratch[-scratch.data_ptr() % ALIGNMENT :]

    @property
    def left(self) -> torch.Tensor:
        """What has not been cut off."""
        return self._left

    def room(self, size_bytes: int) -> int:
        """How many of a size fit."""
        return self._left.numel() // size_bytes

    def cut(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor.

        Raises:
            ValueError: It does not fit.
        """
        numel = 1
        for size in shape:
            numel *= size
        size_bytes = numel * dtype.itemsize
        if size_bytes > self._left.numel():
            raise ValueError(
                f"scratch has {self._left.numel()} bytes left, {shape} of {dtype} needs "
                f"{size_bytes}: see least_scratch_bytes"
            )
        cut = self._left[:size_bytes].view(dtype).view(shape)
        self._left = self._left[aligned(size_bytes) :]
        return cut


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
) -> None:
    """See operators.linear_4bit_dq."""
    nested = (nested_absmax, nested_quant_map, offset)
    weight = FourBits(codes=codes, scales=absmax, table=quant_map, nested=nested)
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

    def dequantize(first: int, end: int, into: torch.Tensor) -> None:
        for segment, a, b, place in weights.pieces(first, end):
            part = into[place : place + b - a]
            write = dequantize_tiles if supports_rows(part, a) else dequantize_tiled
            write(weights, segment, a, part)

    for _ in _slice_after_slice(x, dequantize, out, _Scratch(scratch)):
        pass


def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """See operators.linear_int8."""
    left = _Scratch(scratch)
    if len(x) <= FEW_TOKENS:
        product_8bit(x, weight, scale, None, 1.0, out, left.left)
        return
    # Integers are exact in 16 bits, and so scaled afterwards: no weight is rounded twice.
    for first, end in _slice_after_slice(x, _eight_bits(weight), out, left):
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
    for first, end in _pieces(x, held, scratch):
        left = _Scratch(scratch)
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
            for a, b in _slice_after_slice(quantized, _eight_bits(weight), result, left):
                scale_product(result[:, a:b], scale[a:b], token_scale, FP8_FACTOR**2)


def _four_bits(x: torch.Tensor, weight: FourBits, out: torch.Tensor, scratch: torch.Tensor) -> None:
    tokens, columns = x.shape
    left = _Scratch(scratch)
    # Else a block of a table's formats would run over the end of a row.
    if tokens <= FEW_TOKENS and columns % BLOCK_SIZE == 0:
        product_4bit(x, weight, out, left.left)
        return

    def dequantize(first: int, _end: int, into: torch.Tensor) -> None:
        dequantize_4bit(weight, first, into)

    for _ in _slice_after_slice(x, dequantize, out, left):
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


def _eight_bits(weight: torch.Tensor) -> Callable[[int, int, torch.Tensor], None]:
    def dequantize(first: int, end: int, into: torch.Tensor) -> None:
        dequantize_8bit(weight[first:end], into)

    return dequantize


def _slice_after_slice(
    x: torch.Tensor,
    dequantize: Callable[[int, int, torch.Tensor], None],
    out: torch.Tensor,
    scratch: _Scratch,
) -> Iterator[tuple[int, int]]:
    """Multiplies with slices of the weight, and yields (first row, end) after each.

    Args:
        x: [tokens, columns].
        dequantize: (first row, end, slice) writes those rows to the slice [rows, columns].
        out: [tokens, rows].
        scratch: Room for the slice.
    """
    rows, columns = out.shape[1], x.shape[1]
    fit = max(1, min(rows, scratch.room(columns * x.itemsize)))
    # Slices of one size: none is left over that would keep the GPU half idle.
    step = ceil_div(rows, ceil_div(rows, fit))
    step = min(fit, ceil_div(step, _ROW_UNIT) * _ROW_UNIT)
    whole = scratch.cut((step, columns), x.dtype)
    for first in range(0, rows, step):
        end = min(first + step, rows)
        part = whole[: end - first]
        dequantize(first, end, part)
        torch.mm(x, part.t(), out=out[:, first:end])
        yield first, end


def _pieces(x: torch.Tensor, held: torch.dtype, scratch: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(first token, end) of pieces whose quantized inputs and scales leave half of the scratch."""
    tokens, columns = x.shape
    half = _Scratch(scratch).left.numel() // 2 - 2 * ALIGNMENT
    room = max(1, half // (columns * held.itemsize + 4))
    step = min(tokens, room - room % _ROW_UNIT if room > _ROW_UNIT else room)
    for first in range(0, tokens, step):
        yield first, min(first + step, tokens)
