"""NVIDIA GPUs as NVML describes them: no CUDA context is made, no memory taken."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from oomproof.errors import HardwareError
from oomproof.hardware.catalog import match
from oomproof.hardware.links import pcie_bytes_per_s, read_links
from oomproof.hardware.nvml import as_text, nvml_session, where_supported
from oomproof.hardware.spec import DeviceSpec, HostSpec, LinkSpec
from oomproof.hardware.visible import visible_ordinals


@dataclass(frozen=True, kw_only=True, slots=True)
class NvidiaGpus:
    """What NVML knows of the GPUs that CUDA shows to this process."""

    devices: tuple[DeviceSpec, ...]
    links: tuple[LinkSpec, ...]
    driver_version: str | None
    cuda_driver_version: str | None


def read_nvidia_gpus(
    nvml: ModuleType | Any, *, visible_devices: str | None, host: HostSpec
) -> NvidiaGpus | None:
    """The visible GPUs, None where there is no driver or no GPU.

    Args:
        nvml: The module `pynvml` or its like.
        visible_devices: CUDA_VISIBLE_DEVICES, None where it is not set.
        host: Its RAM stands in for the memory of a GPU that has none of its own.

    Raises:
        HardwareError: A driver is there, but NVML reports a fault.
    """
    with nvml_session(nvml) as open_session:
        if not open_session:
            return None
        handles = [
            nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())
        ]
        uuids = [as_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        ordinals = visible_ordinals(visible_devices, uuids)
        if not ordinals:
            return None
        shown = [handles[ordinal] for ordinal in ordinals]
        return NvidiaGpus(
            devices=tuple(
                _device(nvml, handle, index=index, uuid=uuids[ordinal], host=host)
                for index, (handle, ordinal) in enumerate(zip(shown, ordinals, strict=True))
            ),
            links=read_links(nvml, shown),
            driver_version=as_text(nvml.nvmlSystemGetDriverVersion()),
            cuda_driver_version=_cuda_version(nvml.nvmlSystemGetCudaDriverVersion()),
        )


def _device(
    nvml: ModuleType | Any, handle: object, *, index: int, uuid: str, host: HostSpec
) -> DeviceSpec:
    name = as_text(nvml.nvmlDeviceGetName(handle))
    _refuse_mig(nvml, handle, name=name, uuid=uuid)
    memory = read_memory(nvml, handle)
    total_bytes, free_bytes = memory or (host.total_ram_bytes, host.available_ram_bytes)
    known = match(name, memory[0] if memory else None)
    return DeviceSpec(
        index=index,
        name=name,
        kind="cuda",
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        compute_capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        bandwidth_bytes_per_s=known.bandwidth_bytes_per_s if known else None,
        flops_per_s=known.flops_per_s if known else None,
        host_link_bytes_per_s=pcie_bytes_per_s(nvml, handle),
        uuid=uuid,
        unified_memory=memory is None,
    )


def read_memory(nvml: ModuleType | Any, handle: object) -> tuple[int, int] | None:
    """Total and free bytes; None for a GPU that works in the processor's RAM (GB10, Jetson).

    Version 2 of the question names what the driver keeps for itself, which nothing can allocate.
    """
    info = where_supported(
        nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    )
    if info is not None and info.total:
        return int(info.total), max(0, min(info.free, info.total - info.reserved - info.used))
    info = where_supported(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    return (int(info.total), int(info.free)) if info is not None and info.total else None


def _refuse_mig(nvml: ModuleType | Any, handle: object, *, name: str, uuid: str) -> None:
    mode = where_supported(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle))
    if mode is not None and mode[0]:
        raise HardwareError(
            f"{name} ({uuid}) is cut into MIG slices, which cannot be probed",
            remedy='plan for the slice\'s memory with --gpus "20GiB"',
        )


def _cuda_version(number: int) -> str:
    """13000 → "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"
