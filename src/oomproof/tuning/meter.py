"""The memory that training takes, measured as the plan counts it."""

from __future__ import annotations

import os

import psutil
import torch


class MemoryMeter:
    """Bytes beside what the process held before it loaded anything.

    On a GPU the most that torch reserved; on a processor the growth of the resident set, read at
    every step.

    Args:
        device: Where training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process(os.getpid())
        self._before = self._allocated_before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_reserved(device)
            self._allocated_before = torch.cuda.memory_allocated(device)
        else:
            self._before = self._now()
        self._most = 0

    def read(self) -> int:
        """The most so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) - self._before
        self._most = max(self._most, self._now() - self._before)
        return self._most

    def read_allocated(self) -> int:
        """The same of tensors alone, without what torch's allocator caches."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._allocated_before
        return self.read()

    def _now(self) -> int:
        return int(self._process.memory_info().rss)
