"""Who uses the memory now, by a made-up NVML and by this machine's own counts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import psutil
import pynvml
import pytest

from oomproof.errors import HardwareError
from oomproof.hardware.usage import (
    MAX_PROCESSES,
    GpuProcess,
    printable,
    process_name,
    read_host,
    watch_gpus,
)
from oomproof.units import GIB, MIB
from tests.hardware.fake_nvml import FakeGpu, FakeNvml


def test_every_gpu_is_read_again_and_again_over_one_session() -> None:
    gpu = FakeGpu(used_mib=1000)
    nvml = FakeNvml(gpus=[gpu, FakeGpu(uuid="GPU-1", name="RTX 4090")])
    with watch_gpus(nvml) as read:
        before = read()
        gpu.used_mib = 3000
        after = read()
        assert (nvml.opened, nvml.closed) == (1, 0)
    assert nvml.closed == 1
    assert [(one.index, one.uuid, one.name) for one in after] == [
        (0, "GPU-0", "NVIDIA H200"),
        (1, "GPU-1", "RTX 4090"),
    ]
    assert after[0].used_bytes - before[0].used_bytes == 2000 * MIB
    assert after[0].used_bytes + after[0].free_bytes == after[0].total_bytes


def test_processes_are_listed_once_with_their_bytes_the_largest_first() -> None:
    mine = os.getpid()
    nvml = FakeNvml(
        gpus=[FakeGpu(computing=[(mine, 500), (2**22 + 5, None)], drawing=[(mine, 700), (1, 900)])]
    )
    with watch_gpus(nvml) as read:
        processes = read()[0].processes
    assert [(one.pid, one.used_bytes) for one in processes] == [
        (1, 900 * MIB),
        (mine, 700 * MIB),
        (2**22 + 5, None),
    ]
    assert processes[1].name == psutil.Process().name()
    assert processes[2].name == "?"


@pytest.mark.parametrize(
    "error",
    [
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_UNKNOWN,
    ],
)
def test_processes_that_may_not_be_known_hide_nothing_else(error: int) -> None:
    with watch_gpus(FakeNvml(gpus=[FakeGpu(processes_error=error, drawing=[(1, 5)])])) as read:
        assert read()[0].processes == (GpuProcess(pid=1, name=process_name(1), used_bytes=5 * MIB),)


def test_a_thousand_processes_are_bounded() -> None:
    crowd = [(2**22 + number, number) for number in range(1000)]
    with watch_gpus(FakeNvml(gpus=[FakeGpu(computing=crowd)])) as read:
        processes = read()[0].processes
    assert len(processes) == MAX_PROCESSES
    assert processes[0].used_bytes == 999 * MIB


def test_a_machine_without_a_driver_has_no_gpus() -> None:
    with watch_gpus(FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)) as read:
        assert read() == ()


def test_a_gpu_that_is_lost_while_it_is_watched_is_an_error_of_ours() -> None:
    gpu = FakeGpu()

    def look() -> None:
        with watch_gpus(FakeNvml(gpus=[gpu])) as read:
            gpu.memory_error = pynvml.NVML_ERROR_GPU_IS_LOST
            read()

    with pytest.raises(HardwareError, match="nvidia-smi shows more"):
        look()


def test_a_gpu_without_memory_of_its_own_has_the_hosts() -> None:
    gpu = FakeGpu(memory_error=pynvml.NVML_ERROR_NOT_SUPPORTED)
    with watch_gpus(FakeNvml(gpus=[gpu])) as read:
        assert read()[0].total_bytes == read_host().total_bytes


def test_the_hosts_memory_is_what_its_cgroup_allows(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (group / "memory.max").write_text(str(2 * GIB))
    (group / "memory.current").write_text(str(GIB))
    memory = SimpleNamespace(total=64 * GIB, available=60 * GIB)
    with patch("psutil.virtual_memory", lambda: memory):
        host = read_host(root=tmp_path)
    assert (host.total_bytes, host.used_bytes, host.limit) == (2 * GIB, GIB, "cgroup v2")


def test_names_cannot_steer_a_terminal() -> None:
    assert printable("py\x1b[31mthon\n\u202e") == "py�[31mthon��"
