"""Products of 9 to 64 tokens with tiled 4-bit weights on Hopper (cuda/product_4bit_wide.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oomproof.kernels.source import SM_90A
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

WIDE_TOKENS = 9
"""From so many on: for 8 it is hardly faster than the kernel for few tokens."""


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


def launch_wide_product(
    x: torch.Tensor,
    weights: TiledSet,
    out: torch.Tensor,
    scratch: torch.Tensor,
    shape: WideShape,
    biases: Sequence[torch.Tensor] = (),
    *,
    gated: bool = False,
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

    Raises:
        CudaError: The driver refuses a launch.
    """
    params = product_params(x, weights, out, scratch, biases, gated=gated)
    stream = torch.cuda.current_stream(out.device).cuda_stream
    kernels = wide_kernels(shape.template, x.dtype, weights.scales.dtype)
    launch_wide(*kernels, params, shape, stream)
