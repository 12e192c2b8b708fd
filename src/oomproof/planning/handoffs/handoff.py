"""What a hand-off says, and what all of them need."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oomproof.errors import InputError
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.models.spec import ModelSpec
from oomproof.planning.request import DEFAULT_CONTEXT, PlanRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceShare:
    """What one device holds under another engine."""

    index: int
    name: str
    usable_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int
    """Context, compute buffers, graphs: estimates of ours, stated in the target's file."""

    @property
    def peak_bytes(self) -> int:
        """All of it together."""
        return self.weights_bytes + self.kv_cache_bytes + self.overhead_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class HandOff:
    """A plan in another engine's own words."""

    engine: str
    model: str
    format: str | None
    """The engine's own name of the format, None where it has none that fits."""
    fits: bool
    commands: tuple[str, ...]
    """Shell lines, in order; empty where there is none."""
    context: int
    concurrency: int
    devices: tuple[DeviceShare, ...]
    shortfall_bytes: int
    download_bytes: int
    host_bytes: int = 0
    """What the engine keeps in host RAM besides itself."""
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `plan --for … --json`."""
        plain = asdict(self)
        for device, values in zip(self.devices, plain["devices"], strict=True):
            values["peak_bytes"] = device.peak_bytes
        return plain


def context_of(spec: ModelSpec, request: PlanRequest) -> int:
    """Tokens that are asked for; `auto` is the default of a plan.

    Raises:
        InputError: More than the model was made for.
    """
    limit = spec.max_position_embeddings
    if not isinstance(request.context, int):
        return min(DEFAULT_CONTEXT, limit)
    if request.context > limit:
        raise InputError(
            f"context {request.context:,} is beyond what {spec.id} was made for",
            remedy=f"ask for at most {limit:,} tokens",
        )
    return request.context


def concurrency_of(request: PlanRequest) -> int:
    """Requests at once; `auto` is one."""
    return 1 if request.concurrency == "auto" else request.concurrency


def usable_bytes(device: DeviceSpec, request: PlanRequest) -> int:
    """Free bytes of a device under the request's limits."""
    usable = device.free_bytes - request.reserve_bytes
    limits = (request.max_memory.get(device.index), request.cap_bytes)
    return max(0, min([usable, *(limit for limit in limits if limit is not None)]))


def gpus_of(hardware: Hardware, kinds: Sequence[str], engine: str) -> tuple[DeviceSpec, ...]:
    """The devices that an engine can use.

    Raises:
        InputError: There is none.
    """
    found = tuple(device for device in hardware.devices if device.kind in kinds)
    if not found:
        raise InputError(
            f"{engine} has no device to use here", remedy="describe the machine with --gpus"
        )
    return found


def command(*words: object) -> str:
    """A shell line."""
    return " ".join(shlex.quote(str(word)) for word in words)


def repository(spec: ModelSpec) -> str:
    """What another engine can load: a hub id or a folder."""
    return spec.source.path


def spread(
    needs: Sequence[int], overhead: Callable[[int, int], int], usable: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Contiguous ranges of units over devices in their order; None where they do not fit.

    As few devices as are enough, filled as evenly as their units allow.

    Args:
        needs: Bytes of each unit, weights and cache.
        overhead: (first unit, end unit) → what a device needs besides.
        usable: Bytes of each device.
    """
    for count in range(1, len(usable) + 1):
        if (found := _fill(needs, overhead, usable[:count], 0)) is not None:
            break
    else:
        return None
    low, high = 0, max(usable)
    while high - low > 2**24:
        room = (low + high) // 2
        better = _fill(needs, overhead, usable[:count], room)
        low, high, found = (room, high, better) if better is not None else (low, room, found)
    return found


def _fill(
    needs: Sequence[int], overhead: Callable[[int, int], int], usable: Sequence[int], room: int
) -> list[tuple[int, int]] | None:
    ranges = []
    first = 0
    for budget in usable:
        end, held = first, 0
        while end < len(needs):
            held += needs[end]
            if held + overhead(first, end + 1) > budget - room:
                break
            end += 1
        if end == first:
            return None
        ranges.append((first, end))
        first = end
        if first == len(needs):
            break
    return ranges if first == len(needs) and len(ranges) == len(usable) else None
