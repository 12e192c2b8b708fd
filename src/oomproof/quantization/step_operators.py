"""The product of a decode step with tiled 4-bit weights, and what is fused with it.

In front of it the normalisation of its input, behind it biases and SwiGLU's gate: what would be
launches and round trips through memory of their own. The reference is what the parts compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oomproof.quantization import reference
from oomproof.quantization.library import on_cuda, operator, writes_where_told
from oomproof.quantization.tiled import TiledSet


@operator("oomproof::step_linear_4bit", mutates_args=("hidden_out", "out", "scratch"))
def step_linear_4bit(  # noqa: PLR0913, PLR0917 - what is fused, and a set's tensors
    x: torch.Tensor,
    update: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    hidden_out: torch.Tensor | None,
    eps: float,
    multiplier: float,
    codes: torch.Tensor,
    scales: torch.Tensor,
    quant_map: torch.Tensor | None,
    codebook: str,
    nested: Sequence[torch.Tensor],
    segments: Sequence[int],
    biases: Sequence[torch.Tensor],
    gated: bool,
    out: torch.Tensor,
    scratch: torch.Tensor,  # noqa: ARG001
) -> None:
    """Writes the product with a set of linears, of few tokens.

    Args:
        x: [tokens, columns]: the input; or the hidden states, where they are normalised.
        update: Added to the hidden states, times `multiplier`, or None.
        norm_weight: [columns] of an RMSNorm (arXiv:1910.07467) of the sum; None where x is the
            input already.
        hidden_out: The sum; another tensor than x.
        eps: Of the norm.
        multiplier: Of the update.
        codes: As the following five, of TiledSet.arguments.
        scales: Of all tiles.
        quant_map: None for int4.
        codebook: "nf4", "fp4" or "int4".
        nested: Three tensors a linear, or none.
        segments: Three numbers a linear.
        biases: One of each linear, or none.
        gated: Whether silu(first linear) times the second is written (arXiv:2002.05202).
        out: [tokens, rows of all linears], half of them where `gated`.
        scratch: uint8.
    """
    weights = TiledSet.of(codes, scales, quant_map, codebook, nested, segments)
    if norm_weight is not None:
        assert hidden_out is not None
        total = x.float() if update is None else x.float() + update.float() * multiplier
        hidden_out.copy_(total)
        wide = hidden_out.float()
        scale = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)
        x = norm_weight * (wide * scale).to(x.dtype)
    product = x.new_empty(len(x), weights.rows)
    reference.linear_4bit_tiled(x, weights, product)
    if biases:
        product += torch.cat(tuple(biases))
    if gated:
        gate, up = product.float().chunk(2, dim=1)
        product = torch.nn.functional.silu(gate) * up
    out.copy_(product)


step_linear_4bit.register_fake(writes_where_told)
step_linear_4bit.register_kernel("cuda")(
    on_cuda("oomproof.quantization.products_tiled", "step_linear_4bit")
)
