"""One engine's kernels at a time wait for each other on a GPU."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from cuda.bindings import driver

from oomproof.engine.native import waiting
from oomproof.engine.native.waiting import may_wait, shares_multiprocessors

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Owner:
    """Somebody who launches."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_HOLDERS", {})
    monkeypatch.setattr(waiting, "shares_multiprocessors", lambda _index: False)


@pytest.mark.usefixtures("alone")
def test_the_first_of_a_gpu_may_until_it_is_gone() -> None:
    first, second = Owner(), Owner()
    assert may_wait(FIRST, first)
    assert may_wait(FIRST, first)
    assert not may_wait(FIRST, second)
    assert may_wait(SECOND, second)
    del first
    gc.collect()
    assert may_wait(FIRST, second)


@pytest.mark.usefixtures("alone")
def test_a_processor_has_no_such_kernels() -> None:
    assert not may_wait(torch.device("cpu"), Owner())


def test_beside_other_processes_nobody_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_HOLDERS", {})
    monkeypatch.setattr(waiting, "shares_multiprocessors", lambda _index: True)
    assert not may_wait(FIRST, Owner())


@pytest.mark.parametrize(
    ("device", "answer", "shared"),
    [
        ("CUDA_SUCCESS", ("CUDA_SUCCESS", 0), False),
        ("CUDA_SUCCESS", ("CUDA_SUCCESS", 1), True),
        # What the driver does not say is not relied on.
        ("CUDA_SUCCESS", ("CUDA_ERROR_INVALID_VALUE", 0), True),
        ("CUDA_ERROR_NO_DEVICE", ("CUDA_SUCCESS", 0), True),
    ],
)
def test_the_driver_says_whether_there_are_others(
    device: str, answer: tuple[str, int], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = {result.name: result for result in driver.CUresult}
    fake = SimpleNamespace(
        CUresult=driver.CUresult,
        CUdevice_attribute=driver.CUdevice_attribute,
        cuDeviceGet=lambda index: (status[device], index),
        cuDeviceGetAttribute=lambda *_: (status[answer[0]], answer[1]),
    )
    monkeypatch.setattr("cuda.bindings.driver", fake)
    assert shares_multiprocessors(0) is shared
