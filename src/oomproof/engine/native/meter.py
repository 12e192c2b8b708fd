"""What the native engine really takes on each device, under the names of the plan's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil
import torch

from oomproof.engine.native.device import NativeDevice
from oomproof.hardware.spec import Hardware
from oomproof.memory.terms import DeviceTerms


class NativeMeter:
    """Measures the devices of a plan, from before their first allocation.

    Weights, KV pool and arena are the engine's own allocations. On a GPU, `workspace` is everything
    else that torch reserved at its highest, `graphs` what recording them took from the driver, and
    `cuda_context` what the driver lost besides. On a CPU, `workspace` is the process's growth.

    Args:
        hardware: Probed before this process touched a GPU.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._free_before = {device.index: device.free_bytes for device in hardware.devices}
        self.devices: Sequence[NativeDevice] = ()
        """Those that there are so far, in order along the model."""
        self._reserved_before: dict[int, int] = {}
        self._staging: dict[int, int] = {}
        self._outside_before_capture: dict[int, int] = {}
        self._graphs: dict[int, int] = {}
        self._final: dict[int, DeviceTerms] | None = None
        self._process = psutil.Process()
        self._rss_before = self._rss_peak = self._process.memory_info().rss

    def begin(self, device: torch.device) -> None:
        """Notes what torch holds on a device before anything of the model is there."""
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)
            self._reserved_before[device.index] = torch.cuda.memory_reserved(device)

    def weights_loaded(self) -> None:
        """Notes the highest mark of loading, when staging has been given back."""
        for device in self.devices:
            index = device.planned.index
            if device.device.type == "cuda":
                peak = torch.cuda.max_memory_reserved(device.device)
                held = device.weights.nbytes + self._reserved_before[index]
                self._staging[index] = max(0, peak - held)
                torch.cuda.reset_peak_memory_stats(device.device)
        self.sample()

    def pools_allocated(self) -> None:
        """Notes what is outside torch before graphs are recorded."""
        for device in self.devices:
            if device.device.type == "cuda":
                self._outside_before_capture[device.planned.index] = self._outside(device)

    def captured(self) -> None:
        """Notes what the graphs took."""
        for device in self.devices:
            if device.device.type == "cuda":
                index = device.planned.index
                before = self._outside_before_capture.get(index, 0)
                self._graphs[index] = max(0, self._outside(device) - before)

    def sample(self) -> None:
        """Looks at what keeps no high-water mark of its own."""
        if any(device.device.type == "cpu" for device in self.devices):
            self._rss_peak = max(self._rss_peak, self._process.memory_info().rss)

    def terms(self) -> Mapping[int, DeviceTerms]:
        """Device index → measured terms so far."""
        if self._final is not None:
            return self._final
        return {device.planned.index: self._terms(device) for device in self.devices}

    def release(self) -> None:
        """Lets go of the devices; `terms` stays as it was measured."""
        self._final = dict(self.terms())
        self.devices = ()

    def _terms(self, device: NativeDevice) -> DeviceTerms:
        index = device.planned.index
        weights = device.weights.nbytes
        pool = 0 if device.pool is None else device.pool.size_bytes
        if device.device.type == "cpu":
            grown = self._rss_peak - self._rss_before
            workspace = max(device.workspace_bytes, grown - weights - pool)
            return DeviceTerms(weights=weights, kv_cache=pool, workspace=workspace)
        reserved = torch.cuda.max_memory_reserved(device.device) - self._reserved_before[index]
        graphs = self._graphs.get(index, 0)
        return DeviceTerms(
            cuda_context=max(0, self._outside(device) - graphs),
            weights=weights,
            kv_cache=pool,
            workspace=max(0, reserved - weights - pool),
            staging=self._staging.get(index, 0),
            graphs=graphs,
        )

    def _outside(self, device: NativeDevice) -> int:
        """Bytes that the driver lost to this process, torch's allocator aside."""
        free, _ = torch.cuda.mem_get_info(device.device)
        lost = self._free_before[device.planned.index] - free
        return lost - torch.cuda.memory_reserved(device.device)
