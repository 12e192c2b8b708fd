"""Why a choice was not taken, in words with numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from oomproof.formats import Format
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.profiles import EngineProfile
from oomproof.memory.terms import DeviceTerms
from oomproof.units import format_bytes


def why_not_runnable(
    weight_format: Format,
    kv_format: str,
    profiles: Sequence[EngineProfile],
    devices: Sequence[DeviceSpec],
) -> str | None:
    """Why the engine cannot run a format on these devices; None where it can."""
    for profile, device in zip(profiles, devices, strict=True):
        if weight_format.name not in profile.formats:
            return (
                f"{weight_format.name} is not run by the {profile.engine} engine on {device.kind}"
            )
        if kv_format not in profile.kv_formats:
            return f"a {kv_format} KV cache is not kept by the {profile.engine} engine"
        needed = weight_format.min_compute_capability
        has = device.compute_capability
        if needed is not None and has is not None and has < needed:
            return (
                f"{weight_format.name} needs compute capability {needed[0]}.{needed[1]}, "
                f"{device.name} has {has[0]}.{has[1]}"
            )
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
