"""Products of a decode step that keep the hidden states between them normalised and updated.

Two of a layer's four products write updates of the hidden states, and the product after each takes
them normalised. Here the one adds its result to them and says how large they are, the other
normalises what it reads: no kernel is launched between (RMSNorm, arXiv:1910.07467). The reference
is what the parts compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oomproof.formats import ceil_div
from oomproof.quantization import reference
from oomproof.quantization.library import on_cuda, operator, writes_where_told
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.wide_launch import UNIT_ROWS, wide_template_of


@operator("oomproof::chained_linear_4bit", mutates_args=("out", "squares", "counters", "scratch"))
def chained_linear_4bit(  # noqa: PLR0913, PLR0917 - what is fused, and a set's tensors
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
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
    updates: bool,
    out: torch.Tensor,
    squares: torch.Tensor,
    counters: torch.Tensor | None,  # noqa: ARG001
    scratch: torch.Tensor,  # noqa: ARG001
) -> None:
    """Writes the product with a set of linears, of at most 64 tokens, or adds it to hidden states.

    Args:
        x: [tokens, columns]: the input; with `norm_weight` hidden states, to be normalised.
        norm_weight: [columns] of an RMSNorm, whose sums `squares` says; None for none.
        eps: Of the norm.
        multiplier: Of an update.
        codes: As the following five, of TiledSet.arguments.
        scales: Of all tiles.
        quant_map: None for int4.
        codebook: "nf4", "fp4" or "int4".
        nested: Three tensors a linear, or none.
        segments: Three numbers a linear.
        biases: One of each linear, or none.
        gated: Whether silu(first linear) times the second is written (arXiv:2002.05202).
        updates: Whether `multiplier` times the product is added to `out`, and `squares` written.
        out: [tokens, rows of all linears], half of them where `gated`; with `updates` the hidden
            states.
        squares: float32, sums over 64 columns each of the squares of hidden states: [parts, as many
            tokens as kernels are compiled for], from its begin on.
        counters: int32 [memory.native.PRODUCT_COUNTERS], 0 before and after; None where the sums of
            splits are added up by a kernel of their own: attention behind it, which is not one of
            these products, then begins the sooner. Never with `updates`.
        scratch: uint8.
    """
    weights = TiledSet.of(codes, scales, quant_map, codebook, nested, segments)
    tokens = len(x)
    if norm_weight is not None:
        total = _sums(squares, tokens, x.shape[1]).sum(dim=0)[:, None]
        x = norm_weight * (x.float() * torch.rsqrt(total / x.shape[1] + eps)).to(x.dtype)
    product = x.new_empty(tokens, weights.rows)
    reference.linear_4bit_tiled(x, weights, product)
    if biases:
        product += torch.cat(tuple(biases))
    if gated:
        gate, up = product.float().chunk(2, dim=1)
        product = (torch.nn.functional.silu(gate) * up).to(out.dtype)
    if not updates:
        out.copy_(product)
        return
    out.copy_(out.float() + product.float() * multiplier)
    states = torch.nn.functional.pad(out.float(), (0, -out.shape[1] % UNIT_ROWS))
    parts = states.square().view(tokens, -1, UNIT_ROWS).sum(dim=2)
    _sums(squares, tokens, out.shape[1]).copy_(parts.t())


def squares_numel(hidden: int, tokens: int) -> int:
    """Elements of `squares` that so many tokens need.

    Args:
        hidden: Columns of the hidden states.
        tokens: At most the last of WIDE_TEMPLATES.
    """
    return ceil_div(hidden, UNIT_ROWS) * wide_template_of(tokens)


def _sums(squares: torch.Tensor, tokens: int, hidden: int) -> torch.Tensor:
    """[parts, tokens]."""
    used = squares.view(-1)[: squares_numel(hidden, tokens)]
    return used.view(-1, wide_template_of(tokens))[:, :tokens]


chained_linear_4bit.register_fake(writes_where_told)
chained_linear_4bit.register_kernel("cuda")(
    on_cuda("oomproof.quantization.products_wide", "chained_linear_4bit")
)
