"""What kernels for tiled weights are chosen by: a GPU's kind and its limits, asked for once."""

from __future__ import annotations

from functools import cache

import torch

from oomproof.quantization.tuned import Gpu


@cache
def limits_of(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory that a block may have)."""
    properties = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return properties.multi_processor_count, shared


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Which kind of GPU it is."""
    return Gpu(
        name=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
    )
