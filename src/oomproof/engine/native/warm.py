"""What a first CUDA kernel waits for, done beside everything else that loading begins with."""

from __future__ import annotations

import threading

import torch


def start_warming(device: torch.device) -> threading.Thread | None:
    """Begins in a thread, on a GPU; join it before the first kernel is launched.

    A process's first Triton kernel imports the compiler and makes a digest of its files, under
    which compiled kernels are cached: together half a second. None on a processor.
    """
    if device.type != "cuda":
        return None
    thread = threading.Thread(target=_warm, args=(device,), name="oomproof-warm", daemon=True)
    thread.start()
    return thread


def _warm(device: torch.device) -> None:
    try:
        from oomproof.engine.native import kernels_triton
        from oomproof.loading import finite_triton  # noqa: F401 - imports are part of the wait
        from oomproof.quantization import products_cuda  # noqa: F401
    except ImportError:
        # Whoever needs it will say what is missing, in a thread that is listened to.
        return
    gate_up = torch.zeros((1, 2), dtype=torch.bfloat16, device=device)
    with torch.cuda.device(device):
        kernels_triton.silu_mul(gate_up, gate_up[:, :1].clone())
        # cuBLAS makes its handle at the first product.
        torch.mm(gate_up.t(), gate_up)
        torch.cuda.synchronize(device)
