"""SwiGLU's gate in Triton; it writes into what it is given, allocates nothing and does not wait."""

# Triton's language is not typed.
# ruff: noqa: E501
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl


def silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """A program a block of a row."""
    rows, width = out.shape
    block = 1024
    _silu_mul[(rows, triton.cdiv(width, block))](
        gate,
        up,
        out,
        gate.stride(0),
        up.stride(0),
        out.stride(0),
        width,
        BLOCK=block,
        num_warps=4,
    )


@triton.jit
def _silu_mul(gate, up, out, gate_stride, up_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    left = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    result = left / (1.0 + tl.exp(-left)) * right
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=inside)
