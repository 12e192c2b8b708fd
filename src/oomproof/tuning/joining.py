"""How the processes of a run on several GPUs come together, and agree on one plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from oomproof.errors import HardwareError
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.loading.devices import set_up_cuda
from oomproof.tuning.distributed import ALONE, Ranks, from_environment, leave
from oomproof.tuning.launched import world_size
from oomproof.tuning.plan import TrainingPlan

_PATIENCE = timedelta(days=2)
"""Others wait for the first rank while it downloads and tokenises; one that dies is noticed."""


@contextmanager
def joined(hardware: Hardware) -> Iterator[tuple[Ranks, Hardware]]:
    """The processes that a launcher started, and the device of each; this one alone without any.

    Args:
        hardware: This machine, looked at before this process used a device of it.

    Raises:
        OomproofError: As `distributed.from_environment`.
    """
    were_there = dist.is_available() and dist.is_initialized()
    if world_size() == 1 and not were_there:
        yield ALONE, hardware
        return
    kind = max(hardware.devices, key=lambda one: one.free_bytes).kind
    set_up_cuda()
    found = from_environment("cuda" if kind == "cuda" else "cpu")
    ranks = replace(found, talk=dist.new_group(backend="gloo", timeout=_PATIENCE))
    own = device_of(ranks, hardware)
    yield ranks, replace(hardware, devices=tuple(ranks.collect(own)), links=())
    if not were_there:
        leave(ranks)


def device_of(ranks: Ranks, hardware: Hardware) -> DeviceSpec:
    """Where this rank computes.

    Raises:
        HardwareError: The machine has no such GPU.
    """
    first = max(hardware.devices, key=lambda one: one.free_bytes)
    if first.kind == "cpu":
        return first
    for one in hardware.devices:
        if one.index == ranks.local_rank:
            return one
    raise HardwareError(
        f"rank {ranks.rank} would compute on GPU {ranks.local_rank}, which is not here",
        remedy=f"start at most {len(hardware.devices)} processes on this machine",
    )


def on_own_device(plan: TrainingPlan, ranks: Ranks, hardware: Hardware) -> TrainingPlan:
    """The same plan, for the device of this rank.

    Args:
        plan: For the smallest device of all.
        ranks: The processes.
        hardware: Each one's device, in their order.
    """
    if ranks.size == 1:
        return plan
    own = hardware.devices[ranks.rank]
    [planned] = plan.base.devices
    device = replace(planned, index=own.index, name=own.name, uuid=own.uuid)
    return replace(
        plan,
        base=replace(plan.base, devices=(device,)),
        device=own.name,
        device_index=own.index,
    )
