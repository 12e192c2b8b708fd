"""What each probe reads, from machines made of files and of plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from oomproof.doctor.facts import GpuFacts, LinkFacts, XidFacts, read_plain
from oomproof.doctor.probes import local
from oomproof.doctor.probes.nvml import read_driver_and_gpus
from oomproof.units import MIB
from tests.hardware.fake_nvml import FakeGpu, FakeNvml, FakeNvmlError


@dataclass
class FullNvml(FakeNvml):
    """With what only the doctor asks."""

    lost: frozenset[int] = frozenset()
    answers: dict[str, Any] = field(default_factory=dict)

    def __dir__(self) -> list[str]:
        return list(self.constants)

    def __getattribute__(self, name: str) -> Any:
        # An answer goes before what the fake itself says.
        if name.startswith("nvml") and name in (answers := self.__dict__.get("answers", {})):
            return lambda *_: answers[name]
        return super().__getattribute__(name)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        if index in self.lost:
            raise FakeNvmlError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return super().nvmlDeviceGetHandleByIndex(index)

    def nvmlDeviceGetP2PStatus(self, first: FakeGpu, second: FakeGpu, index: int) -> int:  # noqa: N802
        if index == 0:  # NVML_P2P_CAPS_INDEX_READ
            return 1
        return super().nvmlDeviceGetP2PStatus(first, second, index)


def _gpus(nvml: FakeNvml) -> tuple[GpuFacts, ...]:
    return read_plain(read_driver_and_gpus(nvml)["gpus"], tuple[GpuFacts, ...])


def test_a_gpu_is_read_question_by_question() -> None:
    process = SimpleNamespace(pid=7, usedGpuMemory=512 * MIB)
    own = SimpleNamespace(pid=9, usedGpuMemory=None)
    nvml = FullNvml(
        gpus=(FakeGpu(),),
        answers={
            "nvmlDeviceGetComputeMode": 3,
            "nvmlDeviceGetPersistenceMode": 0,
            "nvmlDeviceGetEccMode": [1, 1],
            "nvmlDeviceGetTotalEccErrors": 2,
            "nvmlDeviceGetRemappedRows": (0, 1, 1, 0),
            "nvmlDeviceGetTemperature": 83,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x20 | 0x40 | 0x4,
            "nvmlDeviceGetComputeRunningProcesses": [process, own],
            "nvmlSystemGetProcessName": b"/usr/bin/python3 -m x",
        },
    )
    read = read_driver_and_gpus(nvml, own_pids=frozenset((9,)))
    assert read["driver"] == {"version": "580.95.05", "cuda_version": "13.0"}
    [gpu] = read_plain(read["gpus"], tuple[GpuFacts, ...])
    assert (gpu.name, gpu.uuid, gpu.bus_id) == ("NVIDIA H200", "GPU-0", "pci-GPU-0")
    assert gpu.compute_capability == (9, 0)
    assert gpu.total_bytes == (143771 - 610) * MIB
    assert gpu.free_bytes == (143771 - 610 - 1) * MIB
    assert (gpu.compute_mode, gpu.persistence, gpu.ecc) == ("exclusive", False, True)
    assert (gpu.uncorrected_errors, gpu.remap_pending, gpu.remap_failed) == (2, True, False)
    assert (gpu.throttling, gpu.temperature_c) == (("heat",), 83)
    assert [(found.pid, found.name) for found in gpu.processes] == [(7, "python3")]
    assert (nvml.opened, nvml.closed) == (1, 1)


def test_a_gpu_that_answers_little_is_still_one() -> None:
    nvml = FullNvml(gpus=(FakeGpu(mig=None, memory_error=pynvml.NVML_ERROR_NOT_SUPPORTED),))
    [gpu] = _gpus(nvml)
    assert gpu.error is None
    assert (gpu.total_bytes, gpu.mig, gpu.compute_mode, gpu.processes) == (None, None, None, ())


def test_a_gpu_that_is_lost_does_not_hide_the_others() -> None:
    nvml = FullNvml(gpus=(FakeGpu(), FakeGpu(uuid="GPU-1")), lost=frozenset((0,)))
    lost, other = _gpus(nvml)
    assert lost.error == "NVML_ERROR_GPU_IS_LOST"
    assert (other.index, other.error, other.uuid) == (1, None, "GPU-1")
    assert read_driver_and_gpus(nvml)["links"] == []


def test_links_say_what_they_are_and_whether_copies_are_direct() -> None:
    pair = (
        FakeGpu(uuid="GPU-0", nvlink_to=("pci-GPU-1", "")),
        FakeGpu(uuid="GPU-1", nvlink_to=("pci-GPU-0", "pci-GPU-0")),
    )
    read = read_driver_and_gpus(FullNvml(gpus=pair))
    [link] = read_plain(read["links"], tuple[LinkFacts, ...])
    assert link == LinkFacts(first=0, second=1, kind="nvlink", peer_access="chipset not supported")
    first, second = read_plain(read["gpus"], tuple[GpuFacts, ...])
    assert (first.nvlinks, first.active_nvlinks) == (2, 1)
    assert (second.nvlinks, second.active_nvlinks) == (2, 2)


@pytest.mark.parametrize(
    "name", ["NVML_ERROR_LIB_RM_VERSION_MISMATCH", "NVML_ERROR_DRIVER_NOT_LOADED"]
)
def test_an_nvml_that_does_not_open_is_told_by_its_errors_name(name: str) -> None:
    read = read_driver_and_gpus(FullNvml(init_error=getattr(pynvml, name)))
    assert read == {"driver": {"nvml_error": name}, "gpus": [], "links": []}


def test_the_kernels_log_is_searched_for_faults() -> None:
    log = (
        "[1.0] usb 1-1: new device\n"
        "[2.0] NVRM: Xid (PCI:0000:ae:00): 79, pid='<unknown>', GPU has fallen off the bus.\n"
        "[3.0] NVRM: Xid (PCI:0000:ae:00): 79, again\n"
        "[4.0] NVRM: Xid (0000:3b:00): 31, pid=1, MMU Fault\n"
    )
    assert local.find_xids(log) == (
        XidFacts(bus_id="0000:ae:00", code=79),
        XidFacts(bus_id="0000:3b:00", code=31),
    )


def test_gpus_are_counted_on_the_bus_and_in_dev(tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("0", "0x10de", "0x030200"),
        ("1", "0x10de", "0x040300"),
        ("2", "0x8086", "0x030000"),
    ):
        device = tmp_path / "sys/bus/pci/devices" / name
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert local.read_bus(root=tmp_path) == {
        "gpus_on_bus": 1,
        "device_nodes": 1,
        "device_nodes_denied": False,
    }


def test_a_cache_that_is_not_there_yet_is_judged_by_the_folder_above(tmp_path: Path) -> None:
    cache = local.read_cache({"HF_HOME": str(tmp_path / "not/yet")})
    assert cache.path == str(tmp_path / "not/yet/hub")
    assert cache.writable
    assert cache.free_bytes


def test_a_cache_below_the_users_home_is_named_from_there_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = local.read_cache({"HOME": str(tmp_path)})
    assert cache.path == "~/.cache/huggingface/hub"


def test_no_secret_is_among_the_facts() -> None:
    environ = {"HF_TOKEN": "hf_x", "HF_ENDPOINT": "https://me:pw@mirror.example", "CC": "clang"}
    assert local.read_environment(environ) == {
        "HF_ENDPOINT": "https://mirror.example",
        "CC": "clang",
    }


def test_what_packages_need_of_each_other_is_read_from_their_metadata() -> None:
    found = {(entry.package, entry.needs): entry.specifier for entry in local.read_requirements()}
    assert found["oomproof[run]", "torch"] == ">=2.10"
    assert ("bitsandbytes", "torch") in found


def test_libraries_of_bitsandbytes_are_found_without_importing_it() -> None:
    binaries = local.read_binaries()
    assert binaries
    assert all(name.startswith("cuda1") for name in binaries)
