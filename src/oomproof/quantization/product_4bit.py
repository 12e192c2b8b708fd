"""The product kernel's parameters, and the variants that it is compiled in.

Named as in cuda/product_4bit.cu, whose Params says what each field is.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from oomproof.kernels.module import Kernel, load_modules
from oomproof.kernels.source import Source, Variant
from oomproof.quantization.tiled_launch import LEAST_SHARED_BYTES, TEMPLATES, warps_of

INPUTS = (torch.bfloat16, torch.float16)
SCALES = (torch.float32, torch.uint8, torch.bfloat16)
MAX_SEGMENTS = 3
_MORE_WARPS = {
    # (Tokens, scales) → what else tuning may choose. With 16 warps others spill registers on
    # compute capability 10.0 and 12.0, from 8 tokens on anything but the rule's does.
    (1, torch.float32): (8, 16),
    (1, torch.uint8): (8,),
    (2, torch.float32): (8, 16),
    (2, torch.uint8): (8, 16),
    (4, torch.float32): (8,),
    (4, torch.uint8): (8,),
}


class Segment(ctypes.Structure):
    """One linear of the set."""

    _fields_ = (
        ("nested_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("first_tile", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class Params(ctypes.Structure):
    """What both kernels take."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "codes",
                "scales",
                "nested_map",
                "x",
                "hidden",
                "update",
                "norm_weight",
                "hidden_out",
                "out",
                "partials",
                "counters",
                "squares",
            )
        ),
        ("segments", Segment * MAX_SEGMENTS),
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_segments",
                "tokens",
                "columns",
                "tiles",
                "x_stride",
                "out_stride",
                "splits",
                "steps",
                "tile_unit",
                "gated",
                "writers",
                "slots",
                "most_tiles",
                "units_per_block",
                "blocks_with_more",
            )
        ),
        ("per_step", ctypes.c_uint32),
        ("per_last_step", ctypes.c_uint32),
        ("levels", ctypes.c_uint16 * 16),
        ("level_scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("multiplier", ctypes.c_float),
    )


def warps_choices(template: int, dtype: torch.dtype, scales: torch.dtype) -> tuple[int, ...]:
    """Warps of a block that there are kernels for; the rule's first.

    Tuning has a choice where it is most worth it: with bfloat16, and scales as nf4 and fp4 have
    them. Each choice more is compiled for six architectures by every run of the tests.
    """
    more = _MORE_WARPS.get((template, scales), ()) if dtype is torch.bfloat16 else ()
    return (warps_of(template), *more)


def variant_of(template: int, dtype: torch.dtype, scales: torch.dtype, warps: int) -> Variant:
    """One of the declared variants."""
    return Variant(
        defines={
            "TOKENS": template,
            "INPUT": INPUTS.index(dtype),
            "SCALES": SCALES.index(scales),
            "WARPS": warps,
            "DEPTH": 1,
            "BLOCKS": 1,
        },
        shared_bytes=LEAST_SHARED_BYTES,
    )


PRODUCT_4BIT = Source(
    path="quantization/cuda/product_4bit.cu",
    headers=("quantization/cuda/product_4bit.cuh", "kernels/cuda/sixteen_bits.cuh"),
    variants=tuple(
        variant_of(template, dtype, scales, warps)
        for template in TEMPLATES
        for dtype in INPUTS
        for scales in SCALES
        for warps in warps_choices(template, dtype, scales)
    ),
    parameters=(Params,),
)


@cache
def kernels_of(
    template: int,
    dtype: torch.dtype,
    scales: torch.dtype,
    warps: int,
    capability: tuple[int, int],
) -> tuple[Kernel, Kernel]:
    """(The product, what adds up its splits), compiled or read, and loaded."""
    [module] = load_modules(PRODUCT_4BIT, [variant_of(template, dtype, scales, warps)], capability)
    return module.kernel("product_4bit", Params), module.kernel("finish_4bit", Params)
