"""The values that describe a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["cuda", "rocm", "mps", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec:
    """One device that can hold layers of a model."""

    index: int
    """CUDA's ordinal (after CUDA_VISIBLE_DEVICES), or the position in a described machine."""
    name: str
    """The vendor's name, such as "NVIDIA H200"; "cpu" for the processor."""
    kind: DeviceKind
    total_bytes: int
    """Memory that the driver reports."""
    free_bytes: int
    """Memory that is free before we create a context of our own."""
    compute_capability: tuple[int, int] | None = None
    """CUDA compute capability, None where the notion does not exist."""
    bandwidth_bytes_per_s: float | None = None
    """Peak memory bandwidth by the datasheet."""
    flops_per_s: float | None = None
    """Dense 16-bit matrix rate by the datasheet, without sparsity."""
    host_link_bytes_per_s: float | None = None
    """One direction of the link to host memory by the datasheet, None where it was not read."""
    uuid: str | None = None
    """NVML's UUID, where the device is real."""
    unified_memory: bool = False
    """Whether the device shares its memory with the processor (Apple, DGX Spark)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSpec:
    """The machine around the devices."""

    total_ram_bytes: int
    """RAM of the machine, or of the container where its cgroup allows less."""
    available_ram_bytes: int
    """RAM that can still be taken without swapping, cgroup-aware."""
    free_disk_bytes: int | None
    """Free space where downloads are kept (HF_HOME), None where it was not asked."""
    cpu_count: int
    cpu_name: str = ""
    cpu_features: frozenset[str] = frozenset()
    """Features that change how weights are stored, such as "avx512_bf16"."""
    ram_limit_source: str = "physical"
    """Where total_ram_bytes comes from: "physical", "cgroup v1" or "cgroup v2"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSpec:
    """A connection between two devices."""

    first: int
    second: int
    kind: Literal["nvlink", "pcie", "unknown"]
    bandwidth_bytes_per_s: float | None = None
    """One direction, by the datasheet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A machine, probed or described."""

    devices: tuple[DeviceSpec, ...]
    """Where layers can go: the GPUs, or the one device "cpu" where there is none."""
    host: HostSpec
    source: Literal["probed", "described"]
    links: tuple[LinkSpec, ...] = ()
    driver_version: str | None = None
    """NVIDIA driver, where there is one."""
    cuda_driver_version: str | None = None
    """Newest CUDA that the driver supports, such as "13.0"."""

    @property
    def has_gpu(self) -> bool:
        """Whether any device is not the processor."""
        return any(device.kind != "cpu" for device in self.devices)
