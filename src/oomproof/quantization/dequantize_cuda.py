"""Whole tiles of 4-bit weights to 16 bits in CUDA C++ (cuda/dequantize_tiles.cu)."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from oomproof.formats import ceil_div
from oomproof.kernels.module import Kernel, Launch, load_modules
from oomproof.kernels.source import Source, Variant
from oomproof.quantization.tables import codebook_of
from oomproof.quantization.tiled import Segment, TiledSet
from oomproof.quantization.tiles import TILE_ROWS

_OUTPUTS = (torch.bfloat16, torch.float16)
_SCALES = (torch.float32, torch.uint8, torch.bfloat16)
_WARPS = 8
_STEP_BLOCKS = 4
_BLOCKS_EACH = 16
"""Blocks of threads for each multiprocessor, at most: as many as it has room for."""


class DequantizeParams(ctypes.Structure):
    """As `struct DequantizeParams` in dequantize_tiles.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "scales", "nested_map", "nested_absmax", "offset", "out")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("blocks", "steps", "units", "first_tile", "tile_stride", "first_row")
        ),
        ("per_steps", ctypes.c_uint32),
        ("levels", ctypes.c_float * 16),
    )


def _variant(dtype: torch.dtype, scales: torch.dtype) -> Variant:
    return Variant(defines={"OUTPUT": _OUTPUTS.index(dtype), "SCALES": _SCALES.index(scales)})


DEQUANTIZE = Source(
    path="quantization/cuda/dequantize_tiles.cu",
    headers=("kernels/cuda/sixteen_bits.cuh",),
    variants=tuple(_variant(dtype, scales) for dtype in _OUTPUTS for scales in _SCALES),
    parameters=(DequantizeParams,),
)


def supports_rows(out: torch.Tensor, first_row: int) -> bool:
    """Whether the kernel writes such rows: whole tiles, in 16 bits."""
    whole = first_row % TILE_ROWS == 0 and len(out) % TILE_ROWS == 0
    return out.is_cuda and out.dtype in _OUTPUTS and whole


def dequantize_tiles(
    weights: TiledSet, segment: Segment, first_row: int, out: torch.Tensor
) -> None:
    """As tiles_triton.dequantize_tiled, whose bits it writes.

    Raises:
        CudaError: The driver refuses the launch.
    """
    stream = torch.cuda.current_stream(out.device).cuda_stream
    prepared_tiles(weights, segment, first_row, out).put_on(stream)


def prepared_tiles(
    weights: TiledSet, segment: Segment, first_row: int, out: torch.Tensor
) -> Launch:
    """`dequantize_tiles`, to be put on a stream again and again while the tensors last."""
    steps = ceil_div(weights.blocks, _STEP_BLOCKS)
    units = len(out) // TILE_ROWS * steps
    params = DequantizeParams(
        codes=weights.codes.data_ptr(),
        scales=weights.scales.data_ptr(),
        out=out.data_ptr(),
        blocks=weights.blocks,
        steps=steps,
        units=units,
        first_tile=segment.first_tile + first_row // TILE_ROWS * segment.tile_stride,
        tile_stride=segment.tile_stride,
        first_row=first_row,
        per_steps=-(-(1 << 32) // steps) & 0xFFFFFFFF,
        levels=_levels(weights.codebook),
    )
    if segment.nested is not None:
        absmax, nested_map, offset = segment.nested
        params.nested_absmax, params.nested_map = absmax.data_ptr(), nested_map.data_ptr()
        params.offset = offset.data_ptr()
    processors, capability = _device(out.device)
    grid = min(ceil_div(units, _WARPS), _BLOCKS_EACH * processors)
    kernel = _kernel(out.dtype, weights.scales.dtype, capability)
    return Launch(kernel, (grid, 1, 1), (32 * _WARPS, 1, 1), 0, params, dependent=True)


def prepare_rows(dtype: torch.dtype, scales: torch.dtype, device: torch.device) -> None:
    """Compiles (or reads) and loads the kernel."""
    if dtype in _OUTPUTS:
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)
            _kernel(dtype, scales, _device(device)[1]).prepare()


@cache
def _levels(codebook: str) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * 16)(*codebook_of(codebook).tolist())


@cache
def _kernel(dtype: torch.dtype, scales: torch.dtype, capability: tuple[int, int]) -> Kernel:
    [module] = load_modules(DEQUANTIZE, [_variant(dtype, scales)], capability)
    return module.kernel("dequantize_tiles", DequantizeParams)


@cache
def _device(device: torch.device) -> tuple[int, tuple[int, int]]:
    """(multiprocessors, compute capability)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)
