"""Who holds the memory of the visible GPUs."""

from __future__ import annotations

import os

import psutil
import pynvml

from oomproof.hardware.holders import read_holders
from tests.hardware.fake_nvml import FakeGpu, FakeNvml

NOBODY = 2**22 + 1
"""More than any pid of Linux."""


def test_each_process_on_a_visible_gpu_is_named() -> None:
    gpus = (
        FakeGpu(uuid="GPU-0", computing=((NOBODY, 1024),)),
        FakeGpu(uuid="GPU-1", computing=((os.getpid(), 3 * 1024), (NOBODY, None))),
    )
    found = read_holders(nvml=FakeNvml(gpus), environ={"CUDA_VISIBLE_DEVICES": "1"})
    own = psutil.Process().name()
    assert [str(one) for one in found] == [
        f"{own} (pid {os.getpid()}) holds 3.00 GiB of GPU 0",
        f"process (pid {NOBODY}) holds memory of GPU 0",
    ]
    assert [one.device for one in read_holders(nvml=FakeNvml(gpus), environ={})] == [0, 1, 1]


def test_a_machine_without_gpus_has_no_holders() -> None:
    nvml = FakeNvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert read_holders(nvml=nvml, environ={}) == ()
