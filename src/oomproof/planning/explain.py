"""Why a choice was not taken, in words with numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from oomproof.formats import DType, Format
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.kv_cache import KV_FORMATS
from oomproof.memory.profiles import EngineProfile
from oomproof.memory.terms import DeviceTerms
from oomproof.models.spec import ModelSpec, TensorSpec
from oomproof.units import format_bytes


def why_not_runnable(
    spec: ModelSpec,
    weight_format: Format,
    kv_format: str,
    compute_dtype: DType,
    profiles: Sequence[EngineProfile],
    devices: Sequence[DeviceSpec],
) -> str | None:
    """Why the engine cannot run a model in a format on these devices; None where it can."""
    for profile, device in zip(profiles, devices, strict=True):
        if profile.repacks_4bit and weight_format.quant_type is not None:
            narrow = _unpackable(spec, profile)
            if narrow is not None:
                return (
                    f"{weight_format.name} is not run on this CPU: bitsandbytes packs weights of "
                    f"32 × 64, and {narrow.name} is {narrow.shape[0]} × {narrow.shape[1]}"
                )
        if weight_format.name not in profile.formats:
            return (
                f"{weight_format.name} is not run by the {profile.engine} engine on {device.kind}"
            )
        if kv_format not in profile.kv_formats:
            return f"a {kv_format} KV cache is not kept by the {profile.engine} engine"
        if profile.kv_in_compute_dtype and KV_FORMATS[kv_format] is not compute_dtype:
            return (
                f"the {profile.engine} engine keeps its KV cache in the compute dtype, "
                f"{compute_dtype}, not in {kv_format}"
            )
        needed = weight_format.min_compute_capability
        has = device.compute_capability
        if needed is not None and has is not None and has < needed:
            return (
                f"{weight_format.name} needs compute capability {needed[0]}.{needed[1]}, "
                f"{device.name} has {has[0]}.{has[1]}"
            )
    return None


def _unpackable(spec: ModelSpec, profile: EngineProfile) -> TensorSpec | None:
    """A weight that bitsandbytes' CPU packing refuses (bitsandbytes 0.50, functional.py)."""
    for tensor in spec.tensors:
        if tensor.role in profile.quantized_roles and (
            tensor.shape[0] % 32 or tensor.shape[1] % 64
        ):
            return tensor
    return None


def misfit(
    terms: Mapping[int, DeviceTerms], usable: Mapping[int, int], names: Mapping[int, str]
) -> str:
    """What is missing, and on which device most: "12.3 GiB missing, 4.1 of it on GPU 1 (…)"."""
    missing = {index: max(0, terms[index].peak_bytes - usable[index]) for index in terms}
    total = sum(missing.values())
    worst = max(missing, key=lambda index: missing[index])
    where = names[worst]
    needs, has = format_bytes(terms[worst].peak_bytes), format_bytes(usable[worst])
    if len(missing) == 1:
        return f"{format_bytes(total)} missing on {where}: needs {needs}, has {has}"
    most = format_bytes(missing[worst])
    return f"{format_bytes(total)} missing over {len(missing)} devices, {most} of it on {where}"
