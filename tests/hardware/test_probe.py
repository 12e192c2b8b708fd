from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pynvml
import pytest

from oomproof.errors import HardwareError
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import Hardware, HostSpec
from oomproof.units import GIB, MIB
from tests.hardware.fake_nvml import FakeGpu, FakeNvml

HOST = HostSpec(
    total_ram_bytes=120 * GIB, available_ram_bytes=100 * GIB, free_disk_bytes=None, cpu_count=8
)


def probed(nvml: FakeNvml, **environ: str) -> Hardware:
    return probe(nvml=nvml, environ=environ, host=HOST)


def eight() -> FakeNvml:
    return FakeNvml(
        [FakeGpu(uuid=f"GPU-{index}", nvlink_to=("switch",) * 18) for index in range(8)]
    )


def test_eight_gpus_are_described_in_full() -> None:
    nvml = eight()
    machine = probed(nvml)
    assert len(machine.devices) == 8
    device = machine.devices[5]
    assert (device.index, device.name, device.kind) == (5, "NVIDIA H200", "cuda")
    assert device.uuid == "GPU-5"
    assert device.compute_capability == (9, 0)
    assert device.bandwidth_bytes_per_s == 4.8e12
    assert device.flops_per_s == pytest.approx(989.4e12)
    assert not device.unified_memory
    assert machine.driver_version == "580.95.05"
    assert machine.cuda_driver_version == "13.0"
    assert machine.source == "probed"
    assert machine.host is HOST
    assert (nvml.opened, nvml.closed) == (1, 1)


@pytest.mark.parametrize("knows_memory_v2", [True, False])
def test_what_the_driver_reserves_is_not_free(knows_memory_v2: bool) -> None:
    gpu = FakeGpu(total_mib=1000, reserved_mib=100, used_mib=50, knows_memory_v2=knows_memory_v2)
    (device,) = probed(FakeNvml([gpu])).devices
    assert device.total_bytes == 1000 * MIB
    assert device.free_bytes == 850 * MIB


def test_cuda_visible_devices_chooses_and_orders_the_gpus() -> None:
    machine = probed(eight(), CUDA_VISIBLE_DEVICES="6,GPU-1")
    assert [(device.index, device.uuid) for device in machine.devices] == [
        (0, "GPU-6"),
        (1, "GPU-1"),
    ]
    assert [(link.first, link.second) for link in machine.links] == [(0, 1)]


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml(),
        FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND),
        FakeNvml(init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        FakeNvml(init_error=pynvml.NVML_ERROR_GPU_NOT_FOUND),
    ],
)
def test_without_a_driver_or_gpu_the_one_device_is_the_cpu(nvml: FakeNvml) -> None:
    machine = probed(nvml)
    (device,) = machine.devices
    assert (device.index, device.name, device.kind) == (0, "cpu", "cpu")
    assert (device.total_bytes, device.free_bytes) == (120 * GIB, 100 * GIB)
    assert not machine.has_gpu
    assert nvml.opened == nvml.closed


def test_hidden_gpus_leave_the_cpu() -> None:
    nvml = eight()
    assert probed(nvml, CUDA_VISIBLE_DEVICES="").devices[0].kind == "cpu"
    assert (nvml.opened, nvml.closed) == (1, 1)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart the machine"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "/dev/nvidia"),
        (pynvml.NVML_ERROR_UNKNOWN, "docker run --gpus all"),
        (pynvml.NVML_ERROR_TIMEOUT, "nvidia-smi"),
    ],
)
def test_a_driver_fault_is_an_error_with_a_remedy_and_never_a_cpu_plan(
    code: int, remedy: str
) -> None:
    with pytest.raises(HardwareError, match=f"fake error {code}") as raised:
        probed(FakeNvml(init_error=code))
    assert remedy in str(raised.value)


def test_nvml_is_closed_after_a_fault_too() -> None:
    nvml = FakeNvml([FakeGpu()], count_error=pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(HardwareError, match="restart the machine or its driver"):
        probed(nvml)
    assert (nvml.opened, nvml.closed) == (1, 1)


def test_a_memory_question_that_fails_is_not_taken_for_unified_memory() -> None:
    with pytest.raises(HardwareError, match="NVML cannot read the GPUs"):
        probed(FakeNvml([FakeGpu(memory_error=pynvml.NVML_ERROR_GPU_IS_LOST)]))


@pytest.mark.parametrize(
    "gpu",
    [
        FakeGpu(memory_error=pynvml.NVML_ERROR_NOT_SUPPORTED),
        FakeGpu(total_mib=0, reserved_mib=0, used_mib=0),
    ],
)
def test_a_gpu_without_memory_of_its_own_has_the_hosts(gpu: FakeGpu) -> None:
    spark = replace(gpu, name="NVIDIA GB10", capability=(12, 1), pcie=None, mig=None)
    (device,) = probed(FakeNvml([spark])).devices
    assert device.unified_memory
    assert (device.total_bytes, device.free_bytes) == (120 * GIB, 100 * GIB)
    assert device.bandwidth_bytes_per_s == 273e9


def test_a_gpu_that_the_catalog_does_not_know_has_no_made_up_figures() -> None:
    (device,) = probed(FakeNvml([FakeGpu(name="NVIDIA Z1")])).devices
    assert device.name == "NVIDIA Z1"
    assert device.bandwidth_bytes_per_s is None
    assert device.flops_per_s is None


def test_a_gpu_cut_into_mig_slices_is_refused() -> None:
    with pytest.raises(HardwareError, match=r"MIG slices.*--gpus"):
        probed(FakeNvml([FakeGpu(mig=True)]))


def test_links_through_a_switch_have_every_nvlink() -> None:
    links = probed(eight()).links
    assert len(links) == 28
    assert {link.kind for link in links} == {"nvlink"}
    assert links[0].bandwidth_bytes_per_s == 18 * 26562e6


def test_a_bridge_counts_only_the_links_that_lead_to_that_gpu() -> None:
    gpus = [
        FakeGpu(uuid="GPU-0", nvlink_to=("pci-GPU-1",) * 4, nvlink_mb_per_s=14062),
        FakeGpu(uuid="GPU-1", nvlink_to=("pci-GPU-0",) * 4, nvlink_mb_per_s=14062),
        FakeGpu(uuid="GPU-2", pcie=(4, 8)),
    ]
    bridge, *rest = probed(FakeNvml(gpus)).links
    assert (bridge.kind, bridge.bandwidth_bytes_per_s) == ("nvlink", 4 * 14062e6)
    assert [(link.kind, link.bandwidth_bytes_per_s) for link in rest] == [
        ("pcie", 8 * 1.969e9),
        ("pcie", 8 * 1.969e9),
    ]


def test_a_driver_that_does_not_know_of_links_leaves_them_unknown() -> None:
    nvml = FakeNvml(
        [FakeGpu(uuid="GPU-0", pcie=None), FakeGpu(uuid="GPU-1", pcie=None)],
        p2p_error=pynvml.NVML_ERROR_NOT_SUPPORTED,
    )
    (link,) = probed(nvml).links
    assert (link.kind, link.bandwidth_bytes_per_s) == ("unknown", None)


def test_a_mac_has_one_gpu_that_shares_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"machdep.cpu.brand_string": "Apple M3 Max", "hw.memsize": str(128 * GIB)}
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("oomproof.hardware.probe.sysctl", facts.__getitem__)
    (device,) = probe(environ={}, host=HOST).devices
    assert (device.name, device.kind, device.unified_memory) == ("Apple M3 Max", "mps", True)
    assert (device.total_bytes, device.free_bytes) == (128 * GIB, 96 * GIB)
    assert device.bandwidth_bytes_per_s == 400e9


def test_an_intel_mac_has_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("oomproof.hardware.probe.sysctl", lambda name: "Intel(R) Core(TM) i7")
    assert probe(environ={}, host=HOST).devices[0].kind == "cpu"


def test_the_constants_that_are_asked_for_exist_in_the_real_nvml() -> None:
    assert FakeNvml().nvmlMemory_v2 == pynvml.nvmlMemory_v2
    for name in ("nvmlDeviceGetFieldValues", "nvmlDeviceGetP2PStatus", "nvmlDeviceGetMigMode"):
        assert callable(getattr(pynvml, name))


def test_importing_the_package_loads_neither_nvml_nor_torch() -> None:
    code = (
        "import sys, oomproof.hardware.probe, oomproof.hardware.describe\n"
        "print(sorted({'pynvml', 'psutil', 'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
