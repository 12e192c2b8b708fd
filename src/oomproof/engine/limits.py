"""What this machine can do at most, measured here and now: bandwidth, arithmetic, host link."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from oomproof.units import GIB, MIB

_REPEATS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The ceilings of one device."""

    read_bytes_per_s: float
    """Reading its memory: what a decode step is held against."""
    matmul_flops_per_s: float
    """A large product in 16 bits (float32 on a processor): what a prompt is held against."""
    host_link_bytes_per_s: float | None
    """From pinned host memory, None on a processor: what loading is held against."""


def measure_limits(device: torch.device, free_bytes: int) -> Limits:
    """Measures a device's ceilings, before a model is there.

    Args:
        device: A GPU, or the CPU.
        free_bytes: Memory that may be taken for it; given back at the end.
    """
    on_gpu = device.type == "cuda"
    size = min(2 * GIB if on_gpu else 256 * MIB, free_bytes // 4)
    size -= size % MIB
    values = torch.ones(max(MIB, size) // 4, dtype=torch.float32, device=device)
    read_s = _seconds(values.sum, device)
    side = 8192 if on_gpu else 1024
    while side > 256 and 3 * 2 * side * side > free_bytes // 2:
        side //= 2
    dtype = torch.bfloat16 if on_gpu else torch.float32
    left = torch.randn(side, side, dtype=torch.float32, device=device).to(dtype)
    right = torch.randn(side, side, dtype=torch.float32, device=device).to(dtype)
    out = torch.empty_like(left)
    product_s = _seconds(partial(torch.mm, left, right, out=out), device)
    link = None
    if on_gpu:
        target = values.view(torch.uint8)[: 256 * MIB]
        pinned = torch.ones(target.numel(), dtype=torch.uint8, pin_memory=True)
        link_s = _seconds(partial(target.copy_, pinned, non_blocking=True), device)
        link = target.numel() / link_s
    limits = Limits(
        read_bytes_per_s=values.nbytes / read_s,
        matmul_flops_per_s=2 * side**3 / product_s,
        host_link_bytes_per_s=link,
    )
    del values, left, right, out
    if on_gpu:
        torch.cuda.empty_cache()
    return limits


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call that enqueues work on a device."""
    times = []
    for _ in range(_REPEATS):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
