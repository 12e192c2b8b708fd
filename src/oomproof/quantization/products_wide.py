"""Products of 5 to 64 tokens with tiled 4-bit weights on Hopper (cuda/product_4bit_wide.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oomproof.kernels.source import SM_90A
from oomproof.memory.native import PRODUCT_COUNTERS
from oomproof.quantization.gpus import gpu_of, limits_of
from oomproof.quantization.product_4bit import Params
from oomproof.quantization.product_4bit_wide import launch_wide, wide_kernels
from oomproof.quantization.product_params import product_key, product_params
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiled_launch import template_of
from oomproof.quantization.tuned import Gpu, tuned_launch
from oomproof.quantization.wide_launch import (
    WIDE_TEMPLATES,
    WideShape,
    warpgroups_of,
    wide_shapes,
    wide_template_of,
)

_MOST_CHAINED_UNITS = 32
"""Of a block: their squares wait where the block's input was."""
WIDE_TOKENS = 5
"""From so many on: fewer are normalised by the kernel for few tokens itself."""


def has_wide(gpu: Gpu) -> bool:
    """Whether the GPU has the instructions."""
    return gpu.capability == SM_90A.capability


def is_wide(tokens: int, gpu: Gpu) -> bool:
    """Whether a product of so many tokens is launched here, where there is scratch for it."""
    return has_wide(gpu) and WIDE_TOKENS <= tokens <= WIDE_TEMPLATES[-1]


def used_template(tokens: int, gpu: Gpu) -> int:
    """The tokens that a launch for so many is compiled for, by this kernel or the other."""
    return wide_template_of(tokens) if is_wide(tokens, gpu) else template_of(tokens)


def wide_pieces(
    tokens: int,
    weights: TiledSet,
    gpu: Gpu,
    processors: int,
    shared_limit: int,
    scratch_bytes: int,
) -> list[tuple[int, int, WideShape]]:
    """(First token, end, launch) of the pieces of a product; none where it is not launched here.

    One piece, or as few as scratch and shared memory leave room for.

    Args:
        tokens: How many.
        weights: The set.
        gpu: Which kind it is.
        processors: Multiprocessors.
        shared_limit: Bytes of shared memory that a block may have.
        scratch_bytes: For the sums of splits.
    """
    if not is_wide(tokens, gpu):
        return []
    for piece in (tokens, *(size for size in reversed(WIDE_TEMPLATES) if size < tokens)):
        key = product_key(wide_template_of(piece), weights, processors, normed=False)
        shapes = wide_shapes(
            tokens=piece,
            columns=key.columns,
            tiles=key.tiles,
            warpgroups=warpgroups_of(key.template, weights.scales.itemsize),
            processors=processors,
            shared_limit=shared_limit,
            scratch_bytes=scratch_bytes,
        )
        if shapes:
            tuned = tuned_launch(gpu, key)
            wanted = None if tuned is None else (tuned.warps, tuned.splits)
            # What was tuned for another kernel, or finds no room here, is none of them.
            same = (shape for shape in shapes if (shape.warps, shape.splits) == wanted)
            shape = next(same, shapes[0])
            return [(first, min(first + piece, tokens), shape) for first in range(0, tokens, piece)]
    return []


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainEnds:
    """What links a product with those around it; see chained_operators."""

    counters: torch.Tensor | None
    """int32 [PRODUCT_COUNTERS]: with it the launch adds up its splits by itself."""
    squares: torch.Tensor
    norm_weight: torch.Tensor | None = None
    """What is multiplied are hidden states, and this normalises them."""
    updates: bool = False
    """What is written is added to hidden states."""
    eps: float = 0.0
    multiplier: float = 1.0

    @classmethod
    def alone(cls, device: torch.device) -> ChainEnds:
        """Of a product that only adds up its splits by itself."""
        counters = torch.zeros(PRODUCT_COUNTERS, dtype=torch.int32, device=device)
        return cls(counters=counters, squares=counters.view(torch.float32))

    def tell(self, params: Params, out: torch.Tensor) -> None:
        """Into a launch's parameters."""
        if self.counters is not None:
            params.counters = self.counters.data_ptr()
        params.squares = self.squares.data_ptr()
        params.eps, params.multiplier = self.eps, self.multiplier
        if self.norm_weight is not None:
            params.norm_weight = self.norm_weight.data_ptr()
        if self.updates:
            params.hidden = params.hidden_out = out.data_ptr()


def chains(tokens: int, weights: TiledSet, device: torch.device, scratch_bytes: int) -> bool:
    """Whether `chained_linear_4bit` computes a product: at once, here."""
    processors, shared_limit = limits_of(device)
    if processors > PRODUCT_COUNTERS:
        return False
    pieces = wide_pieces(tokens, weights, gpu_of(device), processors, shared_limit, scratch_bytes)
    return len(pieces) == 1 and pieces[0][2].most_units <= _MOST_CHAINED_UNITS


def chained_linear_4bit(  # noqa: PLR0913, PLR0917 - as the operator
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
    counters: torch.Tensor | None,
    scratch: torch.Tensor,
) -> None:
    """See chained_operators.chained_linear_4bit.

    Raises:
        CudaError: The driver refuses a launch.
        ValueError: It is not computed at once (see `chains`), or updates without counters.
    """
    if updates and counters is None:
        raise ValueError("only blocks that wait for each other update hidden states")
    weights = TiledSet.of(codes, scales, quant_map, codebook, nested, segments)
    gpu, limits = gpu_of(x.device), limits_of(x.device)
    pieces = wide_pieces(len(x), weights, gpu, *limits, scratch.nbytes)
    if len(pieces) != 1:
        raise ValueError(f"no launch multiplies {len(x)} tokens at once; see chains")
    chain = ChainEnds(
        counters=counters,
        squares=squares,
        norm_weight=norm_weight,
        updates=updates,
        eps=eps,
        multiplier=multiplier,
    )
    [(_, _, shape)] = pieces
    launch_wide_product(x, weights, out, scratch, shape, biases, gated=gated, chain=chain)


def launch_wide_product(
    x: torch.Tensor,
    weights: TiledSet,
    out: torch.Tensor,
    scratch: torch.Tensor,
    shape: WideShape,
    biases: Sequence[torch.Tensor] = (),
    *,
    gated: bool = False,
    chain: ChainEnds | None = None,
) -> None:
    """Launches the kernel once, as is said.

    Args:
        x: As for products_tiled.multiply, and not normalised.
        weights: The set.
        out: As for products_tiled.multiply.
        scratch: uint8, at least wide_launch.partial_bytes(shape, …).
        shape: For as many tokens at least.
        biases: As for products_tiled.multiply.
        gated: As for products_tiled.multiply.
        chain: What links it with the products around it; None where it stands alone.

    Raises:
        CudaError: The driver refuses a launch.
    """
    params = product_params(x, weights, out, scratch, biases, gated=gated)
    if chain is not None:
        chain.tell(params, out)
    stream = torch.cuda.current_stream(out.device).cuda_stream
    kernels = wide_kernels(shape.template, x.dtype, weights.scales.dtype)
    launch_wide(*kernels, params, shape, stream)
