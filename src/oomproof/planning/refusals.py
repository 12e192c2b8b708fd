"""Requests that no plan can serve, refused before one is made."""

from __future__ import annotations

from oomproof.errors import InputError
from oomproof.hardware.spec import Hardware
from oomproof.models.spec import ModelSpec
from oomproof.planning.request import PlanRequest


def refuse_impossible(spec: ModelSpec, hardware: Hardware, request: PlanRequest) -> None:
    """Compares a request with its model and machine.

    Raises:
        InputError: A checkpoint quantized in a way that is not planned, or in another format
            than was asked for; a limit for a device that is not there.
    """
    own = spec.checkpoint_quantization
    if own is not None and own.format is None:
        raise InputError(
            f"{spec.id} is already quantized ({own.method}), which is not planned",
            remedy="plan the 16-bit checkpoint it was made from",
        )
    name = own.format.name if own is not None and own.format is not None else None
    if own is not None and request.format not in ("auto", name):
        raise InputError(
            f"{spec.id} is already quantized ({own.method}): its format is {name}, "
            f"not {request.format}",
            remedy="leave --format out, or plan the 16-bit checkpoint it was made from",
        )
    if own is not None and request.search:
        raise InputError(
            f"{spec.id} is already quantized ({own.method}): its scales are not searched again",
            remedy="leave --search out, or plan the 16-bit checkpoint it was made from",
        )
    present = [device.index for device in hardware.devices]
    for index in request.max_memory:
        if index not in present:
            raise InputError(
                f"max-memory names device {index}", remedy=f"the devices here are {present}"
            )
