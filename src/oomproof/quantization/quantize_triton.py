"""CUDA kernels that quantize, in Triton: the codes and scales of reference.py, bit for bit.

Quotients are rounded as IEEE 754 says (`tl.div_rn`), but where bitsandbytes' own kernel does not: `/`
would be an approximation everywhere. Peaks are found
in the bit patterns of magnitudes, where NaN is the largest: a NaN reaches the scale, as it does in
torch, instead of vanishing.
"""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oomproof.formats import BLOCK_SIZE, NESTED_BLOCK_SIZE, ceil_div
from oomproof.quantization import reference
from oomproof.quantization.dequantize_triton import half_of_e4m3
from oomproof.quantization.tables import FP4_CODES, thresholds_4bit

_VALUES = 4096
"""Weights a program, in whole blocks."""
_NESTED_BLOCKS = 4
_COLUMNS = 2048
_GROUPS = 16
_BYTES = 512

_SIZE = tl.constexpr(BLOCK_SIZE)
_NESTED_SIZE = tl.constexpr(NESTED_BLOCK_SIZE)
_TINY = tl.constexpr(reference.TINY)
_INT8_MAX = tl.constexpr(float(reference.INT8_MAX))
_INT4_MAX = tl.constexpr(float(reference.INT4_MAX))
_INT4_OFFSET = tl.constexpr(float(reference.INT4_OFFSET))
_FP8_MAX = tl.constexpr(reference.FP8_MAX)
_FP4_CODES = tl.constexpr(sum(code << 4 * rank for rank, code in enumerate(FP4_CODES)))
# Adding and subtracting 1.5 × 2²³ rounds to the nearest integer, ties to even.
_ROUNDER = tl.constexpr(12582912.0)
_LEAST_NORMAL = tl.constexpr(2.0**-126)
_INT4 = ()
"""No thresholds: the codes are integers."""


def quantize_4bit_out(
    weight: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    search: bool = False,
    block_size: int = BLOCK_SIZE,
) -> None:
    """See operators.quantize_4bit_out."""
    if search:
        from oomproof.quantization.search_triton import search_4bit_out

        search_4bit_out(weight, codes, absmax, quant_type, block_size)
        return
    thresholds = tuple(thresholds_4bit(quant_type)[0].tolist())
    _quantize_blocks(weight.view(-1), codes, absmax, thresholds, block_size)


def quantize_absmax_out(
    absmax: torch.Tensor,
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    offset: torch.Tensor,
    nested_quant_map: torch.Tensor,
    block_size: int = NESTED_BLOCK_SIZE,
) -> None:
    """See operators.quantize_absmax_out."""
    # bitsandbytes takes torch's own mean, so the order of its sum is torch's.
    torch.mean(absmax, dim=0, out=offset)
    if not block_size:
        blocks = ceil_div(absmax.numel(), NESTED_BLOCK_SIZE * _NESTED_BLOCKS)
        nested_absmax.zero_()
        peak = nested_absmax.view(torch.int32)
        _peak_of_all[(blocks,)](absmax, peak, offset, absmax.numel(), BLOCKS=_NESTED_BLOCKS)
        _absmax_of_all[(blocks,)](
            absmax,
            codes,
            nested_absmax,
            offset,
            nested_quant_map,
            absmax.numel(),
            BLOCKS=_NESTED_BLOCKS,
        )
        return
    whole, rest = divmod(absmax.numel(), NESTED_BLOCK_SIZE)
    for first, blocks, divides in ((0, whole, False), (whole, min(rest, 1), True)):
        if blocks:
            start = first * NESTED_BLOCK_SIZE
            _absmax[(ceil_div(blocks, _NESTED_BLOCKS),)](
                absmax[start:],
                codes[start:],
                nested_absmax[first:],
                offset,
                nested_quant_map,
                (absmax.numel() if divides else whole * NESTED_BLOCK_SIZE) - start,
                DIVIDES=divides,
                BLOCKS=_NESTED_BLOCKS,
            )


def quantize_rows_out(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """See operators.quantize_rows_out: int8 or e4m3, by the type of `codes`.

    Into floating codes go the values of e4m3 over FP8_FACTOR, as `half_of_e4m3` gives them.
    """
    rows, columns = weight.shape
    _rows[(rows,)](
        weight,
        codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes,
        scale,
        weight.stride(0),
        codes.stride(0),
        columns,
        IS_FP8=codes.dtype != torch.int8,
        DECODES=codes.dtype.itemsize > 1,
        COLUMNS=_COLUMNS,
        num_warps=8,
    )


def quantize_groups_int4_out(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    starts_low: bool,
    search: bool = False,
) -> None:
    """See operators.quantize_groups_int4_out."""
    if search:
        from oomproof.quantization.search_triton import search_groups_int4_out

        search_groups_int4_out(weight, codes, scale, starts_low)
        return
    rows, columns = weight.shape
    bits = scale.view(torch.int16)
    if columns % BLOCK_SIZE == 0:
        _quantize_blocks(weight.view(-1), codes, bits.view(-1), _INT4)
        return
    groups = scale.shape[1]
    _group_scales[(rows, ceil_div(groups, _GROUPS))](
        weight, bits, weight.stride(0), columns, groups, GROUPS=_GROUPS
    )
    _group_codes[(ceil_div(codes.numel(), _BYTES),)](
        weight,
        bits,
        codes,
        weight.stride(0),
        columns,
        groups,
        weight.numel(),
        codes.numel(),
        STARTS_LOW=starts_low,
        BYTES=_BYTES,
    )


def _quantize_blocks(
    values: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    thresholds: tuple[float, ...],
    size: int = BLOCK_SIZE,
) -> None:
    """Whole blocks, then a last short one.

    The values of that one are divided (reference._scaled_blocks), but where APPROXIMATES.
    """
    whole, rest = divmod(values.numel(), size)
    at_once = _VALUES // size
    for first, blocks, divides in ((0, whole, False), (whole, min(rest, 1), True)):
        if blocks:
            start = first * size
            _blocks[(ceil_div(blocks, at_once),)](
                values[start:],
                codes[start // 2 :],
                scales[first:],
                (values.numel() if divides else whole * size) - start,
                THRESHOLDS=thresholds,
                DIVIDES=divides,
                # bitsandbytes' kernels are compiled with fast arithmetic. fp4's thresholds are
                # fractions of small numbers, which 16-bit weights meet exactly: there it tells.
                APPROXIMATES=values.is_cuda and len(thresholds) == len(FP4_CODES) - 1,
                SIZE=size,
                BLOCKS=at_once,
            )


@triton.jit
def _blocks(
    values, codes, scales, numel,
    THRESHOLDS: tl.constexpr, DIVIDES: tl.constexpr, APPROXIMATES: tl.constexpr,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    element = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(values + element, mask=element < numel, other=0.0).to(tl.float32)
    peak = tl.max(_magnitude(value), axis=1).to(tl.float32, bitcast=True)
    is_block = block * SIZE < numel
    if len(THRESHOLDS) == 0:
        bits = _scale_int4(peak)
        tl.store(scales + block, bits, mask=is_block)
        code = _code_int4(value, _wide(bits)[:, None])
    else:
        tl.store(scales + block, peak, mask=is_block)
        # Fast arithmetic takes what is below the least normal number for 0, which has no sign: what
        # goes into a product, and what comes out.
        if APPROXIMATES:
            value = tl.where(tl.abs(value) >= _LEAST_NORMAL, value, 0.0)
            inverse = tl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [_at_least_tiny(peak)],
                dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
            scaled = value * inverse[:, None]
            scaled = tl.where(tl.abs(scaled) >= _LEAST_NORMAL, scaled, 0.0)
        elif DIVIDES:
            scaled = tl.div_rn(value, _at_least_tiny(peak)[:, None] + tl.zeros_like(value))
        else:
            scaled = (
                value
                * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), _at_least_tiny(peak))[:, None]
            )
        if len(THRESHOLDS) == 15:
            code = _code_nf4(scaled, THRESHOLDS)
        else:
            code = _code_fp4(scaled, THRESHOLDS)
    high, low = tl.split(tl.reshape(code, (BLOCKS, SIZE // 2, 2)))
    byte = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    tl.store(codes + byte, ((high << 4) | low).to(tl.uint8), mask=byte * 2 < numel)


@triton.jit
def _code_nf4(value, T: tl.constexpr):
    """How many of the 15 thresholds are below: a search of four steps, without branches.

    One comparison a threshold would be bound by arithmetic, and not by memory. After each step the
    half of the thresholds that is left is selected, so that no comparison is needed twice.
    """
    above = value > T[7]
    code = tl.where(above, 8, 0)
    t0 = tl.where(above, T[8], T[0])
    t1 = tl.where(above, T[9], T[1])
    t2 = tl.where(above, T[10], T[2])
    t3 = tl.where(above, T[11], T[3])
    t4 = tl.where(above, T[12], T[4])
    t5 = tl.where(above, T[13], T[5])
    t6 = tl.where(above, T[14], T[6])
    return code + _rank_of_8(value, t0, t1, t2, t3, t4, t5, t6)


@triton.jit
def _code_fp4(value, T: tl.constexpr):
    """The rank of the magnitude among 7 thresholds, as a code; 8 is the sign."""
    size = tl.abs(value)
    rank = _rank_of_8(size, T[0], T[1], T[2], T[3], T[4], T[5], T[6])
    return ((_FP4_CODES >> (rank * 4)) & 7) | tl.where(value < 0, 8, 0)


@triton.jit
def _rank_of_8(value, t0, t1, t2, t3, t4, t5, t6):
    above = value > t3
    code = tl.where(above, 4, 0)
    t0 = tl.where(above, t4, t0)
    t1 = tl.where(above, t5, t1)
    t2 = tl.where(above, t6, t2)
    above = value > t1
    code += tl.where(above, 2, 0)
    return code + tl.where(value > tl.where(above, t2, t0), 1, 0)


@triton.jit
def _absmax(
    absmax, codes, nested_absmax, offset, table, numel,
    DIVIDES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * _NESTED_SIZE + tl.arange(0, _NESTED_SIZE)[None, :]
    inside = element < numel
    value = tl.load(absmax + element, mask=inside, other=0.0) - tl.load(offset)
    value = tl.where(inside, value, 0.0)
    peak = tl.max(_magnitude(value), axis=1).to(tl.float32, bitcast=True)
    tl.store(nested_absmax + block, peak, mask=block * _NESTED_SIZE < numel)
    divisor = _at_least_tiny(peak)[:, None] + tl.zeros_like(value)
    if DIVIDES:
        scaled = tl.div_rn(value, divisor)
    else:
        scaled = value * tl.div_rn(tl.full(value.shape, 1.0, tl.float32), divisor)
    tl.store(codes + element, _code_of_absmax(scaled, table).to(tl.uint8), mask=inside)


@triton.jit
def _peak_of_all(absmax, peak, offset, numel, BLOCKS: tl.constexpr):
    """The largest magnitude of all, as bits: the order in which it is found does not matter."""
    size: tl.constexpr = BLOCKS * _NESTED_SIZE
    element = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = element < numel
    value = tl.load(absmax + element, mask=inside, other=0.0) - tl.load(offset)
    tl.atomic_max(peak, tl.max(tl.where(inside, _magnitude(value), 0), axis=0))


@triton.jit
def _absmax_of_all(absmax, codes, nested_absmax, offset, table, numel, BLOCKS: tl.constexpr):
    size: tl.constexpr = BLOCKS * _NESTED_SIZE
    element = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = element < numel
    value = tl.load(absmax + element, mask=inside, other=0.0) - tl.load(offset)
    divisor = _at_least_tiny(tl.load(nested_absmax) + tl.zeros((size,), tl.float32))
    scaled = value * tl.div_rn(tl.full((size,), 1.0, tl.float32), divisor)
    tl.store(codes + element, _code_of_absmax(scaled, table).to(tl.uint8), mask=inside)


@triton.jit
def _code_of_absmax(scaled, table):
    """How many midpoints of neighbours in the table are below."""
    code = tl.zeros(scaled.shape, tl.int32)
    for step in tl.static_range(8):
        further = code + (128 >> step)
        middle = (tl.load(table + further - 1) + tl.load(table + further)) * 0.5
        code = tl.where(scaled > middle, further, code)
    return code


@triton.jit
def _rows(
    values, codes, scales, stride, codes_stride, columns,
    IS_FP8: tl.constexpr, DECODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program a row, read twice: the second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    peaks = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, columns, COLUMNS):
        value = tl.load(
            values + row * stride + first + column, mask=first + column < columns, other=0.0
        )
        peaks = tl.maximum(peaks, _magnitude(value.to(tl.float32)))
    peak = tl.max(peaks, axis=0).to(tl.float32, bitcast=True)
    largest: tl.constexpr = _FP8_MAX if IS_FP8 else _INT8_MAX
    scale = tl.div_rn(peak, largest)
    tl.store(scales + row, scale)
    divisor = _at_least_tiny(scale) + tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        inside = first + column < columns
        value = tl.load(values + row * stride + first + column, mask=inside, other=0.0)
        quotient = tl.div_rn(value.to(tl.float32), divisor)
        if IS_FP8:
            code = _e4m3(tl.minimum(tl.maximum(quotient, -largest), largest)).to(tl.uint8)
            if DECODES:
                code = half_of_e4m3(code).to(codes.dtype.element_ty)
        else:
            code = tl.minimum(tl.maximum(_rounded(quotient), -largest), largest).to(tl.int8)
        tl.store(codes + row * codes_stride + first + column, code, mask=inside)


@triton.jit
def _group_scales(values, bits, stride, columns, groups, GROUPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * _SIZE + tl.arange(0, _SIZE)[None, :]
    value = tl.load(values + row * stride + column, mask=column < columns, other=0.0)
    peak = tl.max(_magnitude(value.to(tl.float32)), axis=1).to(tl.float32, bitcast=True)
    tl.store(bits + row * groups + group, _scale_int4(peak), mask=group < groups)


@triton.jit
def _group_codes(
    values, bits, codes, stride, columns, groups, numel, size,
    STARTS_LOW: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = byte < size
    high = _code_at(byte * 2 - STARTS_LOW, values, bits, stride, columns, groups, numel)
    low = _code_at(byte * 2 + 1 - STARTS_LOW, values, bits, stride, columns, groups, numel)
    if STARTS_LOW:
        # The high half of the first byte belongs to the slice before.
        before = tl.load(codes + byte, mask=byte == 0, other=0).to(tl.int32) >> 4
        high = tl.where(byte == 0, before, high)
    tl.store(codes + byte, ((high << 4) | low).to(tl.uint8), mask=inside)


@triton.jit
def _code_at(element, values, bits, stride, columns, groups, numel):
    inside = (element >= 0) & (element < numel)
    row, column = element // columns, element % columns
    value = tl.load(values + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(bits + row * groups + column // _SIZE, mask=inside, other=0)
    return tl.where(inside, _code_int4(value, _wide(scale)), 0)


@triton.jit
def _scale_int4(peak):
    """The bits of peak / 7 in bfloat16, ties to even."""
    bits = tl.div_rn(peak, tl.full(peak.shape, _INT4_MAX, tl.float32)).to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding up must not make infinity of a NaN.
    return tl.where(bits > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def _wide(bits):
    """bfloat16 bits as float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _code_int4(value, scale):
    # A searched scale may be negative.
    divisor = tl.where(tl.abs(scale) >= _TINY, scale, _TINY)
    quotient = tl.div_rn(value, divisor + tl.zeros_like(value))
    code = tl.minimum(tl.maximum(_rounded(quotient), -_INT4_OFFSET), _INT4_MAX)
    return (code + _INT4_OFFSET).to(tl.int32)


@triton.jit
def _magnitude(value):
    """The bits of |value|: integers in the order of magnitudes, NaN above all."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _at_least_tiny(value):
    return tl.maximum(value, tl.full(value.shape, _TINY, tl.float32))


@triton.jit
def _rounded(value):
    """To the nearest integer, ties to even; right up to 2²², and beyond what codes clamp to."""
    return (value + _ROUNDER) - _ROUNDER


@triton.jit
def _e4m3(value):
    """The byte of an e4m3 number, ties to even; magnitudes are 448 at most."""
    bits = value.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # The exponent's bias goes from 127 to 7; what is cut off rounds by the carry.
    normal = (size - (120 << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20
    # Below 2⁻⁶ steps are 2⁻⁹: those of float32 numbers about 2¹⁴.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    return tl.where(size < (121 << 23), small, normal) | ((bits >> 24) & 0x80)
