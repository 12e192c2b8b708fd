"""CUDA kernels that write slices of a weight in 16 bits to scratch, and scale what they gave.

The same functions of codes that these kernels use are inlined in the products of few tokens
(products_triton.py), so that a weight has the same value in both.
"""

# Triton's language is not typed.
# ruff: noqa: E501, SIM108
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from oomproof.formats import BLOCK_SIZE, NESTED_BLOCK_SIZE, ceil_div
from oomproof.quantization import reference

INT8_FACTOR = 128.0
"""What products with a slice of int8 codes are multiplied by: the slice holds code / 128.

Exact in 16 bits, and float16 products stay within its range.
"""
FP8_FACTOR = 256.0
"""The same for e4m3 codes: their bits, shifted, are a float16 number of 1/256 of the value."""
_BLOCKS = 32
_ELEMENTS = 1024
_SCALED_ROWS = 512
_ALL = 1 << 40
"""More blocks than any weight has."""

_INT4_OFFSET = tl.constexpr(float(reference.INT4_OFFSET))
_2_TO_23 = tl.constexpr(8388608.0)
_INT8_STEP = tl.constexpr(1 / INT8_FACTOR)


@dataclass(frozen=True, kw_only=True, slots=True)
class FourBits:
    """The tensors of a weight with two codes to a byte."""

    codes: torch.Tensor
    scales: torch.Tensor
    """absmax [blocks], float32 or uint8 codes of it; or bfloat16 [rows, groups] of int4."""
    table: torch.Tensor | None = None
    """The codebook, float32 [16]; None for int4."""
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """nested_absmax, nested_quant_map, nested_offset."""
    block_size: int = BLOCK_SIZE
    """Weights of a scale; where it is not 64, all scales share one nested_absmax."""

    def arguments(self) -> tuple[tuple[torch.Tensor, ...], dict[str, int]]:
        """(codes, scales, table, nested absmax, nested table, offset), and compile-time flags.

        What a format does not have is a pointer that is not read.
        """
        unused = self.scales
        nested = (unused, unused, unused) if self.nested is None else self.nested
        table = unused if self.table is None else self.table
        flags = {"HAS_TABLE": self.table is not None, "NESTED": 0}
        if self.nested is not None:
            flags["NESTED"] = NESTED_BLOCK_SIZE if self.block_size == BLOCK_SIZE else _ALL
        return (self.codes, self.scales, table, *nested), flags


def dequantize_4bit(weight: FourBits, first_row: int, out: torch.Tensor) -> None:
    """Rows from `first_row` on, as many as `out` [rows, columns] (contiguous) has."""
    rows, columns = out.shape
    tensors, flags = weight.arguments()
    size = weight.block_size
    if columns % size == 0:
        first, blocks = first_row * columns // size, out.numel() // size
        _whole_blocks[(ceil_div(blocks, _BLOCKS),)](
            *tensors, out, first, blocks, SIZE=size, BLOCKS=_BLOCKS, **flags
        )
        return
    _any_shape[(rows, ceil_div(columns, _ELEMENTS))](
        *tensors, out, first_row, columns, SIZE=size, ELEMENTS=_ELEMENTS, **flags
    )


def dequantize_8bit(codes: torch.Tensor, out: torch.Tensor) -> None:
    """int8 / INT8_FACTOR or e4m3 / FP8_FACTOR, exactly: codes and out [rows, columns]."""
    is_fp8 = codes.dtype == torch.float8_e4m3fn
    numel = codes.numel()
    _eight_bits[(ceil_div(numel, _ELEMENTS),)](
        codes.view(torch.uint8) if is_fp8 else codes,
        out,
        numel,
        IS_FP8=is_fp8,
        ELEMENTS=_ELEMENTS,
    )


def scale_product(
    out: torch.Tensor,
    row_scale: torch.Tensor,
    token_scale: torch.Tensor | None,
    factor: float,
) -> None:
    """Multiplies out [tokens, rows] by a scale a row, a scale a token and a number."""
    tokens, rows = out.shape
    _scale[(tokens, ceil_div(rows, _SCALED_ROWS))](
        out,
        row_scale,
        row_scale if token_scale is None else token_scale,
        out.stride(0),
        rows,
        factor,
        BY_TOKEN=token_scale is not None,
        ROWS=_SCALED_ROWS,
    )


@triton.jit
def _whole_blocks(
    codes, scales, table, nested_absmax, nested_table, offset, out, first, blocks,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Columns are whole blocks: a block lies in one row, and begins at a byte."""
    local = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = local < blocks
    block = first + local
    scale, outer = load_scale(scales, nested_absmax, block, inside, NESTED=NESTED)
    scale = absmax_of(scale, outer, nested_table, offset, NESTED=NESTED)[:, None]
    byte = tl.arange(0, SIZE // 2)[None, :]
    packed = tl.load(codes + block[:, None] * (SIZE // 2) + byte, mask=inside[:, None], other=0)
    high = value_of(packed.to(tl.int32) >> 4, table, HAS_TABLE=HAS_TABLE) * scale
    low = value_of(packed.to(tl.int32) & 15, table, HAS_TABLE=HAS_TABLE) * scale
    pairs = tl.join(high.to(out.dtype.element_ty), low.to(out.dtype.element_ty))
    element = local[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + element, tl.reshape(pairs, (BLOCKS, SIZE)), mask=inside[:, None])


@triton.jit
def _any_shape(
    codes, scales, table, nested_absmax, nested_table, offset, out, first_row, columns,
    HAS_TABLE: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """A weight at a time: blocks run over row ends, and rows begin in the middle of bytes."""
    local_row = tl.program_id(0).to(tl.int64)
    row = first_row + local_row
    column = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = column < columns
    element = row * columns + column
    packed = tl.load(codes + element // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(element % 2 == 0, packed >> 4, packed & 15)
    if HAS_TABLE:
        block = element // SIZE
    else:
        block = row * tl.cdiv(columns, SIZE) + column // SIZE
    scale, outer = load_scale(scales, nested_absmax, block, inside, NESTED=NESTED)
    scale = absmax_of(scale, outer, nested_table, offset, NESTED=NESTED)
    value = value_of(code, table, HAS_TABLE=HAS_TABLE) * scale
    tl.store(out + local_row * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _eight_bits(codes, out, numel, IS_FP8: tl.constexpr, ELEMENTS: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < numel
    code = tl.load(codes + element, mask=inside, other=0)
    if IS_FP8:
        value = half_of_e4m3(code)
    else:
        value = code.to(tl.float32) * _INT8_STEP
    tl.store(out + element, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scale(
    out, row_scale, token_scale, stride, rows, factor,
    BY_TOKEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    scale = tl.load(row_scale + row, mask=inside, other=0.0)
    if BY_TOKEN:
        scale *= tl.load(token_scale + token)
    place = out + token * stride + row
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32) * factor * scale
    tl.store(place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def value_of(code, table, HAS_TABLE: tl.constexpr):
    """The values of codes in float32, before their scale.

    The table's 64 bytes are read from global memory for each code: they stay in L1, where one line
    serves a whole warp at once. A chain of selections would cost more instructions than all the
    rest, and `tl.gather` a barrier in every step.
    """
    if HAS_TABLE:
        value = tl.load(table + code)
    else:
        value = float_of(code, _INT4_OFFSET)
    return value


@triton.jit
def load_scale(scales, nested_absmax, block, inside, NESTED: tl.constexpr):
    """What is stored of the scales of blocks; apart from `absmax_of`, to be loaded ahead.

    NESTED is how many of them share an outer scale, 0 where there is none.
    """
    scale = tl.load(scales + block, mask=inside, other=0)
    if NESTED:
        outer = tl.load(nested_absmax + block // NESTED, mask=inside, other=0.0)
    else:
        outer = scale
    return scale, outer


@triton.jit
def absmax_of(scale, outer, nested_table, offset, NESTED: tl.constexpr):
    """Scales in float32."""
    if NESTED:
        absmax = tl.load(nested_table + scale.to(tl.int32)) * outer + tl.load(offset)
    else:
        absmax = scale.to(tl.float32)
    return absmax


@triton.jit
def float_of(code, OFFSET: tl.constexpr):
    """Integers of 0 to 255, less an offset, in float32: they are put into the last bits of 2²³.

    Conversions proper run at a quarter of the speed of other instructions.
    """
    bits = code.to(tl.int32) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (_2_TO_23 + OFFSET)


@triton.jit
def half_of_e4m3(code):
    """e4m3 bytes as float16 numbers of 1/256 of the value: both have the same layout, shifted.

    The sign bit of the byte is extended over two bits, of which one is the exponent's.
    """
    bits = code.to(tl.int8, bitcast=True).to(tl.int16) << 7
    return (bits & -0x4080).to(tl.float16, bitcast=True)
