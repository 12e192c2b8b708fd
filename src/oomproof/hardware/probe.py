"""The machine we run on.

NVIDIA GPUs come from NVML, a Mac's GPU from sysctl. AMD and Intel GPUs are not probed: such a
machine is described (`--gpus "MI300X"`). Where no GPU is found, the one device is the processor.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from oomproof.hardware.catalog import match, metal_budget_bytes
from oomproof.hardware.host import probe_host, sysctl
from oomproof.hardware.nvidia import read_nvidia_gpus
from oomproof.hardware.spec import DeviceSpec, Hardware, HostSpec


def probe(
    *,
    nvml: ModuleType | Any | None = None,
    environ: Mapping[str, str] = os.environ,
    host: HostSpec | None = None,
) -> Hardware:
    """Reads this machine's GPUs, without torch and without a CUDA context.

    Args:
        nvml: The module `pynvml` or its like; imported here where it is None.
        environ: Environment variables; CUDA_VISIBLE_DEVICES is obeyed.
        host: The machine around the GPUs, where it is known already.

    Raises:
        HardwareError: NVML reports a fault, or a GPU is cut into MIG slices.
    """
    host = host or probe_host(environ=environ)
    if nvml is None:
        if platform.system() == "Darwin":
            return Hardware(
                devices=(apple_device() or cpu_device(host),), host=host, source="probed"
            )
        import pynvml

        nvml = pynvml
    gpus = read_nvidia_gpus(nvml, visible_devices=environ.get("CUDA_VISIBLE_DEVICES"), host=host)
    if gpus is None:
        return Hardware(devices=(cpu_device(host),), host=host, source="probed")
    return Hardware(
        devices=gpus.devices,
        host=host,
        source="probed",
        links=gpus.links,
        driver_version=gpus.driver_version,
        cuda_driver_version=gpus.cuda_driver_version,
    )


def cpu_device(host: HostSpec) -> DeviceSpec:
    """The processor with its RAM, as the device that a machine without GPUs plans for."""
    return DeviceSpec(
        index=0,
        name="cpu",
        kind="cpu",
        total_bytes=host.total_ram_bytes,
        free_bytes=host.available_ram_bytes,
    )


def apple_device() -> DeviceSpec | None:
    """The GPU of a Mac with Apple silicon, None on other Macs."""
    name, memory = sysctl("machdep.cpu.brand_string"), sysctl("hw.memsize")
    if not name.startswith("Apple ") or not memory.isdecimal():
        return None
    known = match(name, int(memory))
    return DeviceSpec(
        index=0,
        name=name,
        kind="mps",
        total_bytes=int(memory),
        free_bytes=metal_budget_bytes(int(memory)),
        bandwidth_bytes_per_s=known.bandwidth_bytes_per_s if known else None,
        flops_per_s=known.flops_per_s if known else None,
        unified_memory=True,
    )
