"""SwiGLU's gate in CUDA C++ (cuda/gate.cu), whose launch costs a processor little; see silu_mul."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from oomproof.formats import ceil_div
from oomproof.kernels.module import Kernel, launch, load_modules
from oomproof.kernels.source import Source, Variant

_INPUTS = (torch.bfloat16, torch.float16)
_THREADS = 256
_VECTOR = 8


class GateParams(ctypes.Structure):
    """As `struct GateParams` in gate.cu."""

    _fields_ = (
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("gate_stride", ctypes.c_int64),
        ("up_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("width", ctypes.c_int32),
    )


GATE = Source(
    path="quantization/cuda/gate.cu",
    headers=("kernels/cuda/sixteen_bits.cuh",),
    variants=tuple(Variant(defines={"INPUT": number}) for number in range(len(_INPUTS))),
    parameters=(GateParams,),
)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """Writes silu(gate) × up to out [rows, width], which may be gate; by Triton where it must.

    Raises:
        CudaError: The driver refuses the launch.
    """
    rows, width = out.shape
    tensors = (gate, up, out)
    if not out.is_cuda or out.dtype not in _INPUTS or not _in_vectors(width, tensors):
        from oomproof.quantization import gate_triton

        gate_triton.silu_mul(gate, up, out)
        return
    params = GateParams(
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        *(tensor.stride(0) for tensor in tensors),
        width,
    )
    kernel = _kernel(out.dtype, torch.cuda.get_device_capability(out.device))
    stream = torch.cuda.current_stream(out.device).cuda_stream
    grid = (rows, ceil_div(width, _THREADS * _VECTOR), 1)
    launch(kernel, grid, (_THREADS, 1, 1), 0, params, stream)


def _in_vectors(width: int, tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether every row is whole vectors that begin aligned."""
    return width % _VECTOR == 0 and all(
        tensor.stride(0) % _VECTOR == 0 and tensor.data_ptr() % (2 * _VECTOR) == 0
        for tensor in tensors
    )


@cache
def _kernel(dtype: torch.dtype, capability: tuple[int, int]) -> Kernel:
    [module] = load_modules(GATE, [GATE.variants[_INPUTS.index(dtype)]], capability)
    return module.kernel("silu_mul", GateParams)
