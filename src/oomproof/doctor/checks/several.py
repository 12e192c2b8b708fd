"""How several GPUs reach each other."""

from __future__ import annotations

from oomproof.doctor.cuda_support import numbers
from oomproof.doctor.facts import Facts, LinkFacts
from oomproof.doctor.findings import Capability, Check, Finding, Summary
from oomproof.doctor.view import cuda_gpus
from oomproof.units import GIB, format_bytes

_WRONG_PEER_COPIES = (525, 105)
"""Before this driver, RTX 4090s claim to read each other's memory and read zeros:
nccl-tests#117."""


def _links(facts: Facts) -> tuple[LinkFacts, ...]:
    """Those between GPUs that this process sees."""
    shown = {gpu.index for gpu in cuda_gpus(facts)}
    known = range(len(facts.gpus))
    return tuple(
        link
        for link in facts.links
        if link.first in known
        and link.second in known
        and {facts.gpus[link.first].index, facts.gpus[link.second].index} <= shown
    )


def _fabric(facts: Facts) -> Finding | None:
    gpus = cuda_gpus(facts)
    waiting = [gpu for gpu in gpus if gpu.fabric in ("not started", "in progress")]
    if len(gpus) < 2 or not waiting:
        return None
    return Finding(
        status="missing",
        detail=f"the NVSwitch fabric of GPU {waiting[0].index} is {waiting[0].fabric}",
        remedy="sudo systemctl restart nvidia-fabricmanager (of the driver's own version)",
    )


def _nvlink_down(facts: Facts) -> Finding | None:
    if len(cuda_gpus(facts)) < 2:
        return None
    for gpu in cuda_gpus(facts):
        if gpu.nvlinks is None or gpu.active_nvlinks is None or not gpu.active_nvlinks:
            continue  # none at all is a card without a bridge
        if gpu.active_nvlinks < gpu.nvlinks:
            return Finding(
                status="limited",
                detail=f"GPU {gpu.index} ({gpu.name}): {gpu.active_nvlinks} of {gpu.nvlinks} "
                "NVLinks are up",
                remedy="nvidia-smi nvlink --status (names those that are down: reseat the bridge)",
            )
    return None


def _wrong_copies(facts: Facts) -> Finding | None:
    driver = numbers(facts.driver.version)[:2]
    for link in _links(facts):
        names = {facts.gpus[position].name for position in (link.first, link.second)}
        if link.kind == "nvlink" or link.peer_access != "ok" or not driver:
            continue
        if driver < _WRONG_PEER_COPIES and any("RTX 4090" in name for name in names):
            return Finding(
                status="limited",
                detail=f"driver {facts.driver.version} claims direct copies between RTX 4090s, "
                "which hang or arrive as zeros",
                remedy="export NCCL_P2P_DISABLE=1",
            )
    return None


def _switched_off(facts: Facts) -> Finding | None:
    for link in _links(facts):
        if link.peer_access == "disabled by a registry key":
            return Finding(
                status="limited",
                detail=f"direct copies between GPU {link.first} and {link.second} are switched off "
                "by a setting of the driver",
                remedy="remove PeerMappingOverride from /etc/modprobe.d, then reboot",
            )
    return None


def _shared_memory(facts: Facts) -> Finding | None:
    size = facts.system.shared_memory_bytes
    if len(cuda_gpus(facts)) < 2 or size is None or size >= GIB // 2:
        return None
    return Finding(
        status="limited",
        detail=f"{format_bytes(size)} of shared memory (/dev/shm), through which processes of "
        "several GPUs talk",
        remedy="start the container with more: docker run --shm-size 16g …"
        if facts.system.container
        else "sudo mount -o remount,size=16G /dev/shm",
    )


def _summary(facts: Facts) -> Summary:
    count = len(cuda_gpus(facts))
    if count < 2:
        return Summary(
            status="missing", detail="there is one GPU" if count else "no GPU is visible"
        )
    links = _links(facts)
    kinds = {link.kind for link in links}
    words = {"nvlink": "NVLink", "pcie": "PCI Express", "unknown": "links that were not read"}
    over = " and ".join(words[kind] for kind in ("nvlink", "pcie", "unknown") if kind in kinds)
    through_host = any(link.peer_access not in ("ok", None) for link in links)
    extra = ", some copies through the host's memory" if through_host else ""
    return Summary(detail=f"{count} GPUs over {over or 'links that were not read'}{extra}")


SEVERAL_GPUS = Capability(
    name="several GPUs",
    summary=_summary,
    checks=(
        Check(name="fabric", run=_fabric),
        Check(name="nvlink-down", run=_nvlink_down),
        Check(name="wrong-copies", run=_wrong_copies),
        Check(name="peer-access", run=_switched_off),
        Check(name="shared-memory", run=_shared_memory),
    ),
)
