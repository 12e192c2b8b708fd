"""LoRA's products on a GPU: Triton for a decode step's few tokens, cuBLAS for a prompt's many.

See lora_operators.py. Both add Bᵀ's product in float32 and round once. Nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oomproof.engine.native.lora_operators import low_rank, placed
from oomproof.engine.native.operators import silu_mul
from oomproof.memory.adapter import LORA_STEP_TOKENS


def lora_down(x: torch.Tensor, a: torch.Tensor, scratch: torch.Tensor) -> None:
    """See lora_operators.lora_down; of few tokens, parts of the sums are left in float32."""
    if len(x) <= LORA_STEP_TOKENS:
        from oomproof.engine.native import lora_triton

        lora_triton.down(x, a, scratch)
        return
    torch.mm(x, a.t(), out=low_rank(scratch, len(x), len(a), x.dtype))


def lora_up(
    scratch: torch.Tensor,
    rank: int,
    b: Sequence[torch.Tensor],
    places: Sequence[int],
    out: torch.Tensor,
) -> None:
    """See lora_operators.lora_up."""
    if len(out) <= LORA_STEP_TOKENS:
        from oomproof.engine.native import lora_triton

        lora_triton.up(scratch, rank, b, tuple(placed(places)), out)
        return
    down = low_rank(scratch, len(out), rank, out.dtype)
    for factor, (column, first, ranks) in zip(b, placed(places), strict=True):
        part = out[:, column : column + len(factor)]
        part.addmm_(down[:, first : first + ranks], factor.t())


def lora_up_gated(
    scratch: torch.Tensor,
    rank: int,
    b: Sequence[torch.Tensor],
    places: Sequence[int],
    gate_up: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See lora_operators.lora_up_gated."""
    if len(out) <= LORA_STEP_TOKENS:
        from oomproof.engine.native import lora_triton

        lora_triton.up_gated(scratch, rank, b, tuple(placed(places)), gate_up, out)
        return
    lora_up(scratch, rank, b, places, gate_up)
    width = out.shape[1]
    silu_mul(gate_up[:, :width], gate_up[:, width:], out)
