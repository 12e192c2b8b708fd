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
    if own is not None and request.format not in ("auto", name, own.held_as):
        raise another_format(spec, str(name), request.format)
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


def another_format(spec: ModelSpec, held: str, asked: str) -> InputError:
    """The error for a format that a quantized checkpoint is not in."""
    own = spec.checkpoint_quantization
    method = "" if own is None else f" ({own.method})"
    return InputError(
        f"{spec.id} is already quantized{method}: its format is {held}, not {asked}",
        remedy="leave --format out, or plan the 16-bit checkpoint it was made from",
    )
