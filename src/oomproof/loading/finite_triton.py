"""Finds NaN and infinity in memory that is on a GPU, without allocating or waiting."""

# Triton's language is not typed.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 8192
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXPONENTS = {
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2: 0x7C,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
"""The bits that are all set in NaN and infinity, and in nothing else (IEEE 754, OCP OFP8)."""


@triton.jit(do_not_specialize=["index", "count", "exponent"])
def _mark(words, flags, index, count, exponent, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= count:  # without a mask, loads are wide
        bits = tl.load(words + offsets)
    else:
        bits = tl.load(words + offsets, mask=offsets < count, other=0)
    found = tl.max(((bits & exponent) == exponent).to(tl.int32), axis=0)
    tl.store(flags + index, 1, mask=found > 0)


def mark_non_finite(values: torch.Tensor, flags: torch.Tensor, index: int) -> None:
    """Sets `flags[index]` to 1 where a value is NaN or infinite, else leaves it.

    Args:
        values: Contiguous, of a float type.
        flags: int32.
        index: Of the flag.
    """
    count = values.numel()
    words = values.view(_WORDS[values.element_size()])
    grid = (triton.cdiv(count, _BLOCK),)
    _mark[grid](words, flags, index, count, _EXPONENTS[values.dtype], BLOCK=_BLOCK, num_warps=8)
