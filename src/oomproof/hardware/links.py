"""How NVIDIA GPUs reach each other: NVLink where a pair has it, else PCI Express. Best effort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from types import ModuleType
from typing import Any

from oomproof.hardware.nvml import as_text, where_supported
from oomproof.hardware.spec import LinkSpec

_PCIE_BYTES_PER_S_PER_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""PCI Express generation → one direction of one lane, after encoding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Port:
    """What one GPU has to reach others with."""

    handle: object
    bus_id: str
    nvlink_peers: tuple[str, ...]
    """Where each active NVLink leads: another GPU's PCI address, or "switch"."""
    nvlink_bytes_per_s: float | None
    """One direction of one NVLink."""
    pcie_bytes_per_s: float | None


def read_links(nvml: ModuleType | Any, handles: Sequence[object]) -> tuple[LinkSpec, ...]:
    """The link of each pair of GPUs, by their positions in `handles`."""
    if len(handles) < 2:
        return ()
    ports = [_port(nvml, handle) for handle in handles]
    return tuple(
        _link(nvml, ports, first, second) for first, second in combinations(range(len(ports)), 2)
    )


def _link(nvml: ModuleType | Any, ports: Sequence[_Port], first: int, second: int) -> LinkSpec:
    here, there = ports[first], ports[second]
    status = where_supported(
        nvml,
        lambda: nvml.nvmlDeviceGetP2PStatus(
            here.handle, there.handle, nvml.NVML_P2P_CAPS_INDEX_NVLINK
        ),
    )
    if status is None:
        return LinkSpec(first=first, second=second, kind="unknown")
    if status == nvml.NVML_P2P_STATUS_OK:
        lanes = sum(peer in (there.bus_id, "switch") for peer in here.nvlink_peers)
        speed = here.nvlink_bytes_per_s
        bandwidth = lanes * speed if lanes and speed else None
        return LinkSpec(first=first, second=second, kind="nvlink", bandwidth_bytes_per_s=bandwidth)
    ends = [port.pcie_bytes_per_s for port in (here, there) if port.pcie_bytes_per_s]
    return LinkSpec(
        first=first, second=second, kind="pcie", bandwidth_bytes_per_s=min(ends, default=None)
    )


def _port(nvml: ModuleType | Any, handle: object) -> _Port:
    return _Port(
        handle=handle,
        bus_id=as_text(nvml.nvmlDeviceGetPciInfo(handle).busId),
        nvlink_peers=tuple(_nvlink_peers(nvml, handle)),
        nvlink_bytes_per_s=_nvlink_speed(nvml, handle),
        pcie_bytes_per_s=pcie_bytes_per_s(nvml, handle),
    )


def _nvlink_peers(nvml: ModuleType | Any, handle: object) -> list[str]:
    peers = []
    no_such_link = (nvml.NVML_ERROR_INVALID_ARGUMENT,)
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        active = where_supported(
            nvml, partial(nvml.nvmlDeviceGetNvLinkState, handle, link), also=no_such_link
        )
        if active:
            peers.append(_nvlink_peer(nvml, handle, link))
    return peers


def _nvlink_peer(nvml: ModuleType | Any, handle: object, link: int) -> str:
    kind = where_supported(nvml, lambda: nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link))
    if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
        return "switch"
    remote = where_supported(nvml, lambda: nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link))
    return "" if remote is None else as_text(remote.busId)


def _nvlink_speed(nvml: ModuleType | Any, handle: object) -> float | None:
    """What the driver says in MB/s: 14062 (RTX 3090), 25000 (A100), 26562 (H100)."""
    field = nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON
    values = where_supported(nvml, lambda: nvml.nvmlDeviceGetFieldValues(handle, [field]))
    if not values or values[0].nvmlReturn != nvml.NVML_SUCCESS:
        return None
    return float(values[0].value.uiVal) * 1e6 or None


def pcie_bytes_per_s(nvml: ModuleType | Any, handle: object) -> float | None:
    """One direction of a GPU's own PCI Express link, None where NVML does not say."""
    generation = where_supported(nvml, lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle))
    lanes = where_supported(nvml, lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
    per_lane = _PCIE_BYTES_PER_S_PER_LANE.get(generation or 0)
    return per_lane * lanes if per_lane and lanes else None
