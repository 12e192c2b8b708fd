"""What a transformers model really takes, under the names of the plan's terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import psutil
import torch

from oomproof.compat.verify import parameter_bytes
from oomproof.hardware.spec import Hardware
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import Plan


class MemoryMeter:
    """Measures each device of a plan, from before the model is loaded.

    On a GPU, weights and cache are the bytes that torch's allocator was asked for, workspace and
    staging are the high-water mark of what it reserved above them, and the context is what the
    driver lost besides. On the CPU, weights and cache are counted tensor by tensor, and workspace
    and staging are the process's peak of resident memory above them and its size before loading.

    Args:
        plan: Its devices are measured.
        hardware: Probed before this process touched a GPU.
    """

    def __init__(self, plan: Plan, hardware: Hardware) -> None:
        free_bytes = {device.index: device.free_bytes for device in hardware.devices}
        self._meters: dict[int, _DeviceMeter] = {
            device.index: _CpuMeter()
            if device.kind == "cpu"
            else _CudaMeter(torch.device("cuda", device.index), free_bytes[device.index])
            for device in plan.devices_in_use
        }

    def weights_loaded(self, model: torch.nn.Module) -> None:
        """Notes the weights, when loading is over and nothing else is allocated."""
        for meter in self._meters.values():
            meter.weights_loaded(model)

    def cache_allocated(self, tensors: Iterable[torch.Tensor]) -> None:
        """Notes the KV cache, just after it was allocated."""
        kept = tuple(tensors)
        for meter in self._meters.values():
            meter.cache_allocated(kept)

    def sample(self) -> None:
        """Looks at what keeps no high-water mark of its own; cheap enough for every step."""
        for meter in self._meters.values():
            meter.sample()

    def release(self) -> None:
        """Lets go of the model; `terms` stays as it was measured."""
        for meter in self._meters.values():
            meter.release()

    def terms(self) -> Mapping[int, DeviceTerms]:
        """Device index → measured terms so far."""
        return {index: meter.terms() for index, meter in self._meters.items()}


class _DeviceMeter(Protocol):
    def weights_loaded(self, model: torch.nn.Module) -> None: ...
    def cache_allocated(self, tensors: tuple[torch.Tensor, ...]) -> None: ...
    def sample(self) -> None: ...
    def release(self) -> None: ...
    def terms(self) -> DeviceTerms: ...


class _CudaMeter:
    def __init__(self, device: torch.device, free_bytes: int) -> None:
        self._device = device
        self._free_before = free_bytes
        torch.cuda.reset_peak_memory_stats(device)
        self._requested_before = _requested_bytes(device)
        self._reserved_before = torch.cuda.memory_reserved(device)
        self._weights = self._cache = self._staging = 0

    def weights_loaded(self, model: torch.nn.Module) -> None:  # noqa: ARG002
        torch.cuda.synchronize(self._device)
        self._weights = _requested_bytes(self._device) - self._requested_before
        peak = torch.cuda.max_memory_reserved(self._device) - self._reserved_before
        self._staging = max(0, peak - self._weights)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def cache_allocated(self, tensors: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG002
        requested = _requested_bytes(self._device) - self._requested_before
        self._cache = requested - self._weights

    def sample(self) -> None:
        """The allocator keeps its own high-water mark."""

    def release(self) -> None:
        """Holds no tensors."""

    def terms(self) -> DeviceTerms:
        free, _ = torch.cuda.mem_get_info(self._device)
        outside = self._free_before - free - torch.cuda.memory_reserved(self._device)
        peak = torch.cuda.max_memory_reserved(self._device) - self._reserved_before
        return DeviceTerms(
            cuda_context=max(0, outside),
            weights=self._weights,
            kv_cache=self._cache,
            workspace=max(0, peak - self._weights - self._cache),
            staging=self._staging,
        )


def _requested_bytes(device: torch.device) -> int:
    """Bytes that live tensors asked for, before the allocator rounded them."""
    return int(torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0))


class _CpuMeter:
    def __init__(self) -> None:
        self._process = psutil.Process()
        self._resets = _reset_peak()
        self._baseline = self._peak = self._process.memory_info().rss
        self._parameters: tuple[torch.nn.Parameter, ...] = ()
        self._weights = self._cache = self._staging = 0

    def weights_loaded(self, model: torch.nn.Module) -> None:
        self._parameters = tuple(model.parameters())
        self._weights = sum(parameter_bytes(parameter) for parameter in self._parameters)
        self.sample()
        self._staging = max(0, self._peak - self._baseline - self._weights)
        self._resets = _reset_peak()
        self._peak = 0

    def cache_allocated(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._cache = sum(tensor.nbytes for tensor in tensors)

    def sample(self) -> None:
        current = _peak_rss() if self._resets else None
        self._peak = max(self._peak, current or self._process.memory_info().rss)

    def release(self) -> None:
        self._weights = self._current_weights()
        self.sample()
        self._parameters = ()

    def _current_weights(self) -> int:
        # bitsandbytes repacks 4-bit weights at the first forward: what counts is what they are now.
        return max(self._weights, sum(parameter_bytes(p) for p in self._parameters))

    def terms(self) -> DeviceTerms:
        if self._parameters:
            self.sample()
        weights = self._current_weights()
        return DeviceTerms(
            weights=weights,
            kv_cache=self._cache,
            workspace=max(0, self._peak - self._baseline - weights - self._cache),
            staging=self._staging,
        )


def _reset_peak() -> bool:
    """Makes Linux forget the process's peak of resident memory; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_rss() -> int | None:
    """The process's peak of resident memory since the last reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
