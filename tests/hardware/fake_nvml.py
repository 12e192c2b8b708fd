"""An NVML made of plain data, with pynvml's names."""

# ruff: noqa: N802

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml

from oomproof.units import MIB


class FakeNvmlError(Exception):
    def __init__(self, value: int) -> None:
        self.value = value
        super().__init__(f"fake error {value}")


@dataclass
class FakeGpu:
    name: str = "NVIDIA H200"
    uuid: str = "GPU-0"
    total_mib: int = 143771
    reserved_mib: int = 610
    used_mib: int = 1
    capability: tuple[int, int] = (9, 0)
    memory_error: int | None = None
    knows_memory_v2: bool = True
    mig: bool | None = False
    nvlink_to: tuple[str, ...] = ()
    nvlink_mb_per_s: int = 26562
    pcie: tuple[int, int] | None = (5, 16)
    computing: Sequence[tuple[int, int | None]] = ()
    """(Process, its MiB) that compute."""
    drawing: Sequence[tuple[int, int | None]] = ()
    processes_error: int | None = None


@dataclass
class FakeNvml:
    """Only what oomproof asks; anything else is an AttributeError."""

    gpus: Sequence[FakeGpu] = ()
    init_error: int | None = None
    count_error: int | None = None
    p2p_error: int | None = None
    opened: int = 0
    closed: int = 0
    constants: dict[str, int] = field(
        default_factory=lambda: {
            name: value for name, value in vars(pynvml).items() if isinstance(value, int)
        }
    )

    NVMLError = FakeNvmlError

    def __getattr__(self, name: str) -> int:
        if name.startswith(("NVML_", "nvmlMemory_v")):
            return self.constants[name]
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise FakeNvmlError(self.init_error)
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.closed += 1

    def nvmlDeviceGetCount(self) -> int:
        if self.count_error is not None:
            raise FakeNvmlError(self.count_error)
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> bytes:
        return gpu.uuid.encode()

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return gpu.name

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:
        return gpu.capability

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:
        if gpu.mig is None:
            raise FakeNvmlError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(gpu.mig), 0]

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, version: int | None = None) -> SimpleNamespace:
        if gpu.memory_error is not None:
            raise FakeNvmlError(gpu.memory_error)
        if version is not None and not gpu.knows_memory_v2:
            raise FakeNvmlError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        used_mib = gpu.used_mib if version else gpu.used_mib + gpu.reserved_mib
        return SimpleNamespace(
            total=gpu.total_mib * MIB,
            reserved=gpu.reserved_mib * MIB,
            used=used_mib * MIB,
            free=(gpu.total_mib - gpu.reserved_mib - gpu.used_mib) * MIB,
        )

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(busId=f"pci-{gpu.uuid}".encode())

    def nvmlDeviceGetP2PStatus(self, first: FakeGpu, second: FakeGpu, index: int) -> int:
        if self.p2p_error is not None:
            raise FakeNvmlError(self.p2p_error)
        assert index == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        joined = "switch" in first.nvlink_to or f"pci-{second.uuid}" in first.nvlink_to
        return 0 if joined else int(pynvml.NVML_P2P_STATUS_NOT_SUPPORTED)

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:
        if not gpu.nvlink_to:
            raise FakeNvmlError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        if link >= len(gpu.nvlink_to):
            raise FakeNvmlError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return 1 if gpu.nvlink_to[link] else 0

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, gpu: FakeGpu, link: int) -> int:
        return 2 if gpu.nvlink_to[link] == "switch" else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu: FakeGpu, link: int) -> SimpleNamespace:
        return SimpleNamespace(busId=gpu.nvlink_to[link].encode())

    def nvmlDeviceGetFieldValues(self, gpu: FakeGpu, fields: list[int]) -> list[SimpleNamespace]:
        assert fields == [pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON]
        code = 0 if gpu.nvlink_to else pynvml.NVML_ERROR_NOT_SUPPORTED
        return [SimpleNamespace(nvmlReturn=code, value=SimpleNamespace(uiVal=gpu.nvlink_mb_per_s))]

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:
        if gpu.processes_error is not None:
            raise FakeNvmlError(gpu.processes_error)
        return _processes(gpu.computing)

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:
        return _processes(gpu.drawing)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, gpu: FakeGpu) -> int:
        if gpu.pcie is None:
            raise FakeNvmlError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return gpu.pcie[0]

    def nvmlDeviceGetMaxPcieLinkWidth(self, gpu: FakeGpu) -> int:
        if gpu.pcie is None:
            raise FakeNvmlError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return gpu.pcie[1]


def _processes(listed: Sequence[tuple[int, int | None]]) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=None if size is None else size * MIB)
        for pid, size in listed
    ]
