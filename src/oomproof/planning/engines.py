"""Which engine runs a model in a format, and why not ours."""

from __future__ import annotations

from collections.abc import Sequence

from oomproof.formats import READ_FORMATS, Format, held_format
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.adapter import not_adapted
from oomproof.memory.profiles import NATIVE_FORMATS
from oomproof.models.spec import ModelSpec

ENGINES = ("native", "transformers")
NATIVE_COMPUTE_CAPABILITY = (8, 0)
"""The lowest that the native engine's kernels are made for."""


def choose_engine(
    asked: str, spec: ModelSpec, weight_format: Format, devices: Sequence[DeviceSpec]
) -> str:
    """The engine that was asked for; else ours where it can, else transformers."""
    if asked != "auto":
        return asked
    return "native" if why_not_native(spec, weight_format, devices) is None else "transformers"


def why_not_native(
    spec: ModelSpec, weight_format: Format, devices: Sequence[DeviceSpec]
) -> str | None:
    """Why the native engine does not run a model in a format there; None where it does."""
    if spec.not_native is not None:
        return spec.not_native
    own = spec.checkpoint_quantization
    if own is not None and own.held_as is None:
        return (
            f"the native engine does not read {own.method} checkpoints"
            + ("" if own.format is None else f" in {own.format.name}")
            + (f": {own.note}" if own.note else "")
        )
    if own is not None and own.held_as is not None:
        weight_format = held_format(own.held_as)
    for device in devices:
        if device.kind not in ("cuda", "cpu"):
            return f"the native engine runs on NVIDIA GPUs and on processors, not on {device.kind}"
        has = device.compute_capability
        if has is not None and has < NATIVE_COMPUTE_CAPABILITY:
            needed = ".".join(map(str, NATIVE_COMPUTE_CAPABILITY))
            return (
                f"the native engine needs compute capability {needed}, "
                f"{device.name} has {has[0]}.{has[1]}"
            )
    if not weight_format.members <= NATIVE_FORMATS and weight_format.name not in READ_FORMATS:
        return f"the native engine does not hold {weight_format.name}"
    if (module := not_adapted(spec)) is not None:
        return f"the native engine has no place for an adapter of {module}"
    return None
