"""Products with a LoRA adapter's two factors, declared once as torch operators.

y += x Aᵀ Bᵀ (arXiv:2106.09685), in two steps with scratch between them, because linears that share
an input share the first. What is in scratch between the two is theirs: `lora_up` and
`lora_up_gated` must have the rows and the rank of the `lora_down` before them. Each operator is its
own plain-torch reference, for the CPU, and to check lora_cuda.py's kernels.

A place is three numbers for each B: the first column of the result, the first rank of x Aᵀ, and
how many ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from oomproof.quantization.library import on_cuda, operator, writes_where_told

PLACE = 3
"""Numbers of a place."""


@operator("oomproof::lora_down", mutates_args=("scratch",))
def lora_down(x: torch.Tensor, a: torch.Tensor, scratch: torch.Tensor) -> None:
    """Writes x Aᵀ.

    Args:
        x: [tokens, columns].
        a: [rank, columns], of all linears that share the input.
        scratch: uint8; see memory.adapter.lora_scratch_bytes.
    """
    low_rank(scratch, len(x), len(a), x.dtype).copy_(x.float() @ a.float().t())


@operator("oomproof::lora_up", mutates_args=("out",))
def lora_up(
    scratch: torch.Tensor,
    rank: int,
    b: Sequence[torch.Tensor],
    places: Sequence[int],
    out: torch.Tensor,
) -> None:
    """Adds x Aᵀ Bᵀ, rounded once.

    Args:
        scratch: What `lora_down` wrote.
        rank: Rows of its A.
        b: [rows, ranks] of each linear, times its scale.
        places: Where each of them is.
        out: [tokens, columns]; out.stride(1) == 1.
    """
    down = low_rank(scratch, len(out), rank, out.dtype).float()
    for factor, (column, first, ranks) in zip(b, placed(places), strict=True):
        part = out[:, column : column + len(factor)]
        part.copy_(part.float() + down[:, first : first + ranks] @ factor.float().t())


@operator("oomproof::lora_up_gated", mutates_args=("gate_up", "out"))
def lora_up_gated(
    scratch: torch.Tensor,
    rank: int,
    b: Sequence[torch.Tensor],
    places: Sequence[int],
    gate_up: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """As `lora_up` of gate and up, then SwiGLU's gate (arXiv:2002.05202).

    Args:
        scratch: As for `lora_up`, as the following three.
        rank: Rows of A.
        b: Of gate, up, or both.
        places: Up's columns begin where gate's end.
        gate_up: [tokens, 2 × width]; what is in it is lost.
        out: [tokens, width].
    """
    lora_up(scratch, rank, b, places, gate_up)
    gate, up = gate_up.float().chunk(2, dim=1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def low_rank(scratch: torch.Tensor, tokens: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """X Aᵀ in scratch: [tokens, rank]."""
    return scratch[: tokens * rank * dtype.itemsize].view(dtype).view(tokens, rank)


def placed(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(First column, first rank, ranks) of each B."""
    for number in range(0, len(places), PLACE):
        yield places[number], places[number + 1], places[number + 2]


for _operator, _function in (
    (lora_down, "lora_down"),
    (lora_up, "lora_up"),
    (lora_up_gated, "lora_up_gated"),
):
    _operator.register_fake(writes_where_told)
    _operator.register_kernel("cuda")(on_cuda("oomproof.engine.native.lora_cuda", _function))
