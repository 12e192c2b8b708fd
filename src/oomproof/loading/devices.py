"""Makes this process see the devices as the plan does, and keeps it inside its cap."""

from __future__ import annotations

import os

import torch

from oomproof.errors import HardwareError, PlanDoesNotFitError
from oomproof.hardware.spec import Hardware
from oomproof.planning.plan import DevicePlan, Plan
from oomproof.units import format_bytes

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare_devices(plan: Plan, hardware: Hardware) -> None:
    """Checks that the planned devices are there, free enough, and the ones that torch will use.

    Sets CUDA's device order and the allocator's expandable segments where the user did not; both
    count only before CUDA starts.

    Raises:
        HardwareError: A planned device is absent, or torch numbers the devices differently.
        PlanDoesNotFitError: A device has less free memory now than the plan needs.
    """
    set_up_cuda()
    present = {device.index: device for device in hardware.devices}
    for device in plan.devices_in_use:
        found = present.get(device.index)
        if found is None or found.kind != device.kind:
            raise HardwareError(
                f"the plan uses {device.name} as device {device.index}, which is not here",
                remedy="plan again on this machine, without --gpus",
            )
        # On the CPU, model and process live in the same memory.
        needed = device.peak_bytes + (plan.host.peak_bytes if device.kind == "cpu" else 0)
        if found.free_bytes < needed:
            where = "the CPU's RAM" if device.kind == "cpu" else f"GPU {device.index}"
            raise PlanDoesNotFitError(
                f"{where} has {format_bytes(found.free_bytes)} free now, "
                f"the plan needs {format_bytes(needed)}",
                shortfall_bytes=needed - found.free_bytes,
                remedy="free it, or plan again",
            )
        if device.kind != "cuda":
            continue
        check_cuda(device.index, device.uuid)
        if device.limit_bytes is not None:
            limit_device(device, device.limit_bytes)


def release_devices(plan: Plan) -> None:
    """Lifts the limits that `prepare_devices` set; for when the planned model is gone."""
    for device in plan.devices_in_use:
        if device.limit_bytes is not None:
            release_device(device)


def set_up_cuda() -> None:
    """CUDA's device order and the allocator's segments, where the user did not say."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if not any(variable in os.environ for variable in _ALLOCATOR_VARIABLES):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def check_cuda(index: int, uuid: str | None) -> None:
    """Whether torch can use a GPU, and means the same one.

    Args:
        index: CUDA's ordinal.
        uuid: NVML's, None where it is not known.

    Raises:
        HardwareError: It does not.
    """
    if not torch.cuda.is_available():
        raise HardwareError(
            "NVML sees a GPU, but torch cannot use CUDA",
            remedy="install a CUDA build of torch for this driver (see `oomproof doctor`)",
        )
    if index >= torch.cuda.device_count():
        raise HardwareError(
            f"the plan uses GPU {index}, torch sees {torch.cuda.device_count()} GPUs",
            remedy="check CUDA_VISIBLE_DEVICES",
        )
    found = str(torch.cuda.get_device_properties(index).uuid)
    if uuid is not None and found not in uuid:
        raise HardwareError(
            f"device {index} is {uuid} in the plan and GPU-{found} for torch",
            remedy="set CUDA_DEVICE_ORDER=PCI_BUS_ID before starting Python",
        )


def limit_device(device: DevicePlan, limit_bytes: int) -> None:
    """Makes torch fail rather than pass the limit: its own share is what the context leaves.

    Nothing is done for a processor.
    """
    if device.kind != "cuda":
        return
    total = torch.cuda.get_device_properties(device.index).total_memory
    share = (limit_bytes - device.terms.cuda_context) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device.index)


def release_device(device: DevicePlan) -> None:
    """Lifts the limit of one."""
    if device.kind == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)
