"""Before loading, the machine is compared with the plan: device by device, in bytes and by UUID."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from oomproof.errors import HardwareError, PlanDoesNotFitError
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import Hardware
from oomproof.loading.devices import prepare_devices
from oomproof.planning.plan import Plan
from oomproof.session import plan
from oomproof.units import GIB

UUID = "dcf53ea9-4d1e-4b0d-9d2c-000000000001"
VARIABLES = ("CUDA_DEVICE_ORDER", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _untouched_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        # Set first, so that what the code under test sets is undone too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[float, int]]]:
    """Makes torch claim GPUs; returns the (fraction, device) caps that were set."""

    def pretend(
        count: int = 1, *, available: bool = True, uuid: str = UUID
    ) -> list[tuple[float, int]]:
        caps: list[tuple[float, int]] = []
        properties = SimpleNamespace(uuid=uuid, total_memory=24 * GIB)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, i: caps.append((share, i))
        )
        return caps

    return pretend


def machine(free_bytes: int = 24 * GIB, gpus: str = "1x24GiB") -> Hardware:
    described = describe(gpus)
    devices = (replace(device, free_bytes=free_bytes) for device in described.devices)
    return replace(described, devices=tuple(devices), source="probed")


def planned(*, uuid: str | None = None, cap: str | None = None, gpus: str = "1x24GiB") -> Plan:
    made = plan("tiny", gpus=gpus, cap=cap)
    return replace(made, devices=tuple(replace(d, uuid=uuid) for d in made.devices))


def test_a_plan_for_this_machine_is_accepted(
    cuda: Callable[..., list[tuple[float, int]]],
) -> None:
    caps = cuda()
    prepare_devices(planned(uuid=f"GPU-{UUID}"), machine())
    assert caps == []


def test_devices_are_numbered_as_nvml_does_and_memory_expands_unless_the_user_chose(
    cuda: Callable[..., list[tuple[float, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda()
    prepare_devices(planned(), machine())
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    prepare_devices(planned(), machine())
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_a_device_that_is_not_here_is_named() -> None:
    with pytest.raises(HardwareError, match=r"as device 0, which is not here: plan again"):
        prepare_devices(planned(), machine(gpus="cpu"))
    absent = replace(machine(), devices=())
    with pytest.raises(HardwareError, match="which is not here"):
        prepare_devices(planned(), absent)


def test_a_gpu_with_less_free_memory_than_planned_is_refused_by_so_many_bytes() -> None:
    made = planned()
    needed = made.devices_in_use[0].peak_bytes
    with pytest.raises(
        PlanDoesNotFitError, match=r"GPU 0 has .* free now, the plan needs"
    ) as short:
        prepare_devices(made, machine(free_bytes=needed - 1000))
    assert short.value.shortfall_bytes == 1000


def test_a_cpu_with_less_free_memory_than_planned_is_refused_too() -> None:
    made = plan("tiny", gpus="cpu")
    with pytest.raises(PlanDoesNotFitError):
        prepare_devices(made, machine(free_bytes=1, gpus="cpu"))


def test_a_cpu_build_of_torch_beside_a_gpu_is_refused(
    cuda: Callable[..., list[tuple[float, int]]],
) -> None:
    cuda(available=False)
    with pytest.raises(HardwareError, match=r"torch cannot use CUDA.*oomproof doctor"):
        prepare_devices(planned(), machine())


def test_fewer_gpus_for_torch_than_for_nvml_is_refused(
    cuda: Callable[..., list[tuple[float, int]]],
) -> None:
    cuda(count=0)
    with pytest.raises(HardwareError, match=r"torch sees 0 GPUs.*CUDA_VISIBLE_DEVICES"):
        prepare_devices(planned(), machine())


def test_another_gpu_under_the_same_number_is_refused_by_uuid(
    cuda: Callable[..., list[tuple[float, int]]],
) -> None:
    cuda(uuid="another")
    with pytest.raises(HardwareError, match=rf"GPU-{UUID} in the plan and GPU-another for torch"):
        prepare_devices(planned(uuid=f"GPU-{UUID}"), machine())


def test_a_cap_leaves_torch_what_the_context_does_not_take(
    cuda: Callable[..., list[tuple[float, int]]],
) -> None:
    caps = cuda()
    made = planned(cap="12GiB")
    prepare_devices(made, machine())
    context = made.devices_in_use[0].terms.cuda_context
    assert caps == [((12 * GIB - context) / (24 * GIB), 0)]


def test_gpus_that_the_plan_leaves_alone_are_not_looked_at(
    cuda: Callable[..., list[tuple[float, int]]],
) -> None:
    cuda(count=1)
    made = planned(gpus="2x24GiB")
    assert [device.index for device in made.devices_in_use] == [0]
    full = machine(gpus="2x24GiB")
    second = replace(full.devices[1], free_bytes=0)
    prepare_devices(made, replace(full, devices=(full.devices[0], second)))
