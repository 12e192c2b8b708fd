"""The norm of a few tokens in CUDA C++ (cuda/norm.cu): add_rms_norm between fused products.

It is launched as they are, so that none of them waits for a launch; Triton's kernel, which serves
prompts, would break the chain.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from oomproof.kernels.module import Kernel, launch, load_modules
from oomproof.kernels.source import Source, Variant

_INPUTS = (torch.bfloat16, torch.float16)
_THREADS = 256
_MOST_COLUMNS = 8 * 8 * _THREADS


class NormParams(ctypes.Structure):
    """As `struct NormParams` in norm.cu."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("update", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("update_stride", ctypes.c_int64),
        ("columns", ctypes.c_int32),
        ("adds", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("multiplier", ctypes.c_float),
    )


NORM = Source(
    path="engine/native/cuda/norm.cu",
    headers=("kernels/cuda/sixteen_bits.cuh",),
    variants=tuple(Variant(defines={"INPUT": number}) for number in range(len(_INPUTS))),
    parameters=(NormParams,),
)


def supports_norm(hidden: torch.Tensor) -> bool:
    """Whether the kernel normalises such states [tokens, columns]."""
    columns = hidden.shape[1]
    fits = columns % 8 == 0 and columns <= _MOST_COLUMNS
    return hidden.is_cuda and hidden.dtype in _INPUTS and fits


def add_rms_norm_step(
    hidden: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    multiplier: float,
    adds: bool,
) -> None:
    """See operators.add_rms_norm.

    Raises:
        CudaError: The driver refuses the launch.
    """
    params = NormParams(
        hidden=hidden.data_ptr(),
        update=update.data_ptr(),
        weight=weight.data_ptr(),
        hidden_stride=hidden.stride(0),
        update_stride=update.stride(0),
        columns=hidden.shape[1],
        adds=adds,
        eps=eps,
        multiplier=multiplier,
    )
    kernel = _kernel(hidden.dtype, torch.cuda.get_device_capability(hidden.device))
    with torch.cuda.device(hidden.device):
        stream = torch.cuda.current_stream(hidden.device).cuda_stream
        launch(kernel, (len(hidden), 1, 1), (_THREADS, 1, 1), 0, params, stream, dependent=True)


@cache
def _kernel(dtype: torch.dtype, capability: tuple[int, int]) -> Kernel:
    variant = NORM.variants[_INPUTS.index(dtype)]
    [module] = load_modules(NORM, [variant], capability)
    return module.kernel("normalise", NormParams)
