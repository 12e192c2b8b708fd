"""Where an evaluation computes."""

from __future__ import annotations

import torch

from oomproof.hardware.spec import DeviceSpec


def torch_device(device: DeviceSpec) -> torch.device:
    """Where torch computes.

    Raises:
        HardwareError: torch cannot use the GPU.
    """
    if device.kind != "cuda":
        return torch.device("cpu")
    from oomproof.loading.devices import check_cuda, set_up_cuda

    set_up_cuda()
    check_cuda(device.index, device.uuid)
    found = torch.device("cuda", device.index)
    torch.cuda.set_device(found)
    return found
