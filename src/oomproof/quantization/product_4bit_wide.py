"""The product kernel for 5 to 64 tokens on Hopper: its variants, and its launch.

Its parameters are product_4bit's, with the meanings that cuda/product_4bit_wide.cu says.
"""

from __future__ import annotations

from functools import cache

import torch

from oomproof.kernels.module import Kernel, launch, load_modules
from oomproof.kernels.source import SM_90A, Source, Variant
from oomproof.quantization.product_4bit import INPUTS, SCALES, Params
from oomproof.quantization.tiles import TILE_ROWS
from oomproof.quantization.wide_launch import (
    WIDE_TEMPLATES,
    WideShape,
    depth_of,
    warpgroups_of,
)

SHARED_BYTES = 227 << 10
"""What a block may have on Hopper."""
_WARP_THREADS = 32
_FINISH_THREADS = 256


def wide_variant(template: int, dtype: torch.dtype, scales: torch.dtype) -> Variant:
    """One of the declared variants."""
    warpgroups = warpgroups_of(template, scales.itemsize)
    return Variant(
        defines={
            "TOKENS": template,
            "INPUT": INPUTS.index(dtype),
            "SCALES": SCALES.index(scales),
            "WARPGROUPS": warpgroups,
            "DEPTH": depth_of(warpgroups),
        },
        shared_bytes=SHARED_BYTES,
    )


PRODUCT_4BIT_WIDE = Source(
    path="quantization/cuda/product_4bit_wide.cu",
    headers=("quantization/cuda/product_4bit.cuh", "kernels/cuda/sixteen_bits.cuh"),
    variants=tuple(
        wide_variant(template, dtype, scales)
        for template in WIDE_TEMPLATES
        for dtype in INPUTS
        for scales in SCALES
    ),
    parameters=(Params,),
    only=SM_90A,
)


@cache
def wide_kernels(template: int, dtype: torch.dtype, scales: torch.dtype) -> tuple[Kernel, Kernel]:
    """(The product, what adds up its splits), compiled or read, and loaded."""
    variant = wide_variant(template, dtype, scales)
    [module] = load_modules(PRODUCT_4BIT_WIDE, [variant], SM_90A.capability)
    return module.kernel("product_4bit_wide", Params), module.kernel("finish_4bit_wide", Params)


def prepare_wide(dtype: torch.dtype, scales: torch.dtype, shared_limit: int) -> None:
    """Compiles (or reads) and loads the kernels for these types, onto the current device.

    Args:
        dtype: Of inputs.
        scales: Of stored scales.
        shared_limit: Bytes of shared memory that a block may have.

    Raises:
        CudaError: The driver refuses the machine code.
        KernelCompileError: NVRTC refuses the source.
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
    """
    variants = [wide_variant(template, dtype, scales) for template in WIDE_TEMPLATES]
    load_modules(PRODUCT_4BIT_WIDE, variants, SM_90A.capability)
    for template in WIDE_TEMPLATES:
        product, finish = wide_kernels(template, dtype, scales)
        product.prepare(shared_limit)
        finish.prepare()


def launch_wide(
    product: Kernel, finish: Kernel, params: Params, shape: WideShape, stream: int
) -> None:
    """Launches the kernel once, and what adds up its splits.

    Args:
        product: See `wide_kernels`.
        finish: Likewise.
        params: All but what the shape says; `partials` is scratch.
        shape: For as many tokens at least.
        stream: Where.

    Raises:
        CudaError: The driver refuses a launch.
    """
    params.splits, params.steps = shape.splits, shape.steps
    params.units_per_block = shape.units_per_block
    params.blocks_with_more = shape.blocks_with_more
    grid = (shape.blocks * shape.splits, 1, 1)
    block = (_WARP_THREADS * shape.warps, 1, 1)
    launch(product, grid, block, shape.shared_bytes, params, stream, dependent=True)
    if not params.counters:
        quads = shape.template * TILE_ROWS * params.tiles // params.tile_unit // 4
        grid = (-(-quads // _FINISH_THREADS), 1, 1)
        launch(finish, grid, (_FINISH_THREADS, 1, 1), 0, params, stream, dependent=True)
