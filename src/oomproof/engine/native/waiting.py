"""Whose kernels may wait for each other on a GPU: one engine's at a time.

Blocks of a chained product (quantization/chained_operators.py) hold their multiprocessors until all
of them have come. Two such launches at once could each hold a part of the GPU and wait for the rest
of it forever. Launches of one engine follow each other; those of a second engine in the process, or
of other processes that share the GPU's multiprocessors (MPS), do not: they do without.
"""

from __future__ import annotations

import threading
from weakref import ReferenceType, ref

import torch

_HOLDERS: dict[int, ReferenceType[object]] = {}
_LOCK = threading.Lock()


def may_wait(device: torch.device, owner: object) -> bool:
    """Whether an owner's kernels may wait for each other there from now on, until it is gone.

    Args:
        device: Where it launches them, in one stream.
        owner: Who asks; at most one that lives is told yes.
    """
    if device.type != "cuda" or shares_multiprocessors(device.index):
        return False
    with _LOCK:
        holder = _HOLDERS.get(device.index)
        if holder is not None and holder() not in {None, owner}:
            return False
        _HOLDERS[device.index] = ref(owner)
        return True


def shares_multiprocessors(index: int) -> bool:
    """Whether kernels of other processes may run beside ours on a GPU: under NVIDIA's MPS.

    True where the driver does not say.
    """
    from cuda.bindings import driver

    done = driver.CUresult.CUDA_SUCCESS
    status, device = driver.cuDeviceGet(index)
    if status != done:
        return True
    asked = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MPS_ENABLED
    status, enabled = driver.cuDeviceGetAttribute(asked, device)
    return bool(status != done or enabled)
