"""e4m3 numbers in Triton, as bytes with integer arithmetic, which any GPU has."""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

FLOAT8 = torch.float8_e4m3fn


@triton.jit
def to_e4m3(values):
    """The bits of the nearest e4m3 value (ties to even), the largest one where it is too large."""
    bits = values.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(values), 448.0)
    wide = magnitude.to(tl.uint32, bitcast=True)
    # 20 of float32's 23 fraction bits are dropped, and the exponent's bias goes from 127 to 7.
    rounded = (wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20
    normal = rounded - (120 << 3)
    # Below 2^-6 values are multiples of 2^-9: adding 2^14 leaves exactly these bits, rounded.
    small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, small, normal)
    return (sign | code).to(tl.uint8)


@triton.jit
def from_e4m3(codes):
    """float32 of e4m3 bits."""
    # The sign goes to the top and is copied below it; the copies are cut away. As float32 bits the
    # exponent's bias is 127 instead of 7: the value is 2^120 times too small.
    wide = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x7810_0000
    return wide.to(tl.float32, bitcast=True) * 1.329227995784916e36


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """As bytes where it is float8, which kernels read and write as integers."""
    return values.view(torch.uint8) if values.dtype is FLOAT8 else values
