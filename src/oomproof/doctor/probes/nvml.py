"""NVIDIA's GPUs through NVML, each question by itself: one that fails leaves its fact unknown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations
from typing import Any, TypeVar

from oomproof.doctor.facts import GpuFacts, LinkFacts, ProcessFacts
from oomproof.hardware.nvml import as_text

T = TypeVar("T")

_COMPUTE_MODES = {0: "default", 1: "exclusive", 2: "prohibited", 3: "exclusive"}
_FABRIC_STATES = {1: "not started", 2: "in progress", 3: "completed"}
_SLOWDOWNS = {
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "heat",
    0x0000000000000040: "heat",
    0x0000000000000080: "power brake",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons. A cap on power or idling is no fault."""
_READ = 0
"""NVML_P2P_CAPS_INDEX_READ, which is a tuple in some versions of the binding."""
_PEER_STATUS = {
    0: "ok",
    1: "chipset not supported",
    2: "GPU not supported",
    3: "topology not supported",
    4: "disabled by a registry key",
    5: "not supported",
}


def read_driver_and_gpus(nvml: Any, *, own_pids: frozenset[int] = frozenset()) -> dict[str, Any]:
    """`driver`, `gpus` and `links` of Facts, as plain values.

    Args:
        nvml: The module `pynvml`, or its like.
        own_pids: Processes that are not named.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return {"driver": {"nvml_error": error_name(nvml, error)}, "gpus": [], "links": []}
    try:
        number = _ask(nvml.nvmlSystemGetCudaDriverVersion)
        version = _ask(nvml.nvmlSystemGetDriverVersion)
        driver = {
            "version": None if version is None else as_text(version),
            "cuda_version": None if not number else f"{number // 1000}.{number % 1000 // 10}",
        }
        handles: list[Any] = []
        gpus: list[GpuFacts] = []
        for index in range(_ask(nvml.nvmlDeviceGetCount) or 0):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
            except nvml.NVMLError as error:
                name = error_name(nvml, error)
                gpus.append(GpuFacts(index=index, name="", error=name))
                handles.append(None)
                continue
            handles.append(handle)
            gpus.append(_gpu(nvml, handle, index, own_pids))
        links = [
            _link(nvml, handles[first], handles[second], first, second)
            for first, second in combinations(range(len(handles)), 2)
            if handles[first] is not None and handles[second] is not None
        ]
        return {
            "driver": driver,
            "gpus": [asdict(gpu) for gpu in gpus],
            "links": [asdict(link) for link in links],
        }
    finally:
        _ask(nvml.nvmlShutdown)


def error_name(nvml: Any, error: Exception) -> str:
    """NVML's name of an error: "NVML_ERROR_GPU_IS_LOST"."""
    value = getattr(error, "value", None)
    for name in dir(nvml):
        if name.startswith("NVML_ERROR_") and getattr(nvml, name) == value:
            return name
    return f"NVML error {value}"


def _ask(question: Callable[..., T], *arguments: Any) -> T | None:
    """The answer, None where this GPU, driver or binding has none."""
    try:
        return question(*arguments)
    except Exception:  # noqa: BLE001 - bindings fail in many ways, each a fact that is not known
        return None


def _gpu(nvml: Any, handle: Any, index: int, own_pids: frozenset[int]) -> GpuFacts:
    error = None
    try:
        name = as_text(nvml.nvmlDeviceGetName(handle))
    except nvml.NVMLError as raised:
        name, error = "", error_name(nvml, raised)
    pci = _ask(lambda: nvml.nvmlDeviceGetPciInfo(handle))
    uuid = _ask(lambda: nvml.nvmlDeviceGetUUID(handle))
    total, free = _memory(nvml, handle)
    mig = _ask(lambda: nvml.nvmlDeviceGetMigMode(handle))
    ecc = _ask(lambda: nvml.nvmlDeviceGetEccMode(handle))
    remapped = _ask(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    retiring = _ask(lambda: nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))
    capability = _ask(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    persistence = _ask(lambda: nvml.nvmlDeviceGetPersistenceMode(handle))
    mode = _ask(lambda: nvml.nvmlDeviceGetComputeMode(handle))
    nvlinks, active = _nvlinks(nvml, handle)
    return GpuFacts(
        index=index,
        name=name,
        uuid=as_text(uuid) if uuid else "",
        bus_id=as_text(pci.busId) if pci is not None else "",
        error=error,
        compute_capability=None if capability is None else (capability[0], capability[1]),
        total_bytes=total,
        free_bytes=free,
        mig=None if mig is None else bool(mig[0]),
        compute_mode=_COMPUTE_MODES.get(mode),  # type: ignore[arg-type]
        persistence=None if persistence is None else bool(persistence),
        ecc=None if ecc is None else bool(ecc[0]),
        uncorrected_errors=_ask(lambda: int(nvml.nvmlDeviceGetTotalEccErrors(handle, 1, 0))),
        remap_pending=bool(remapped[2])
        if remapped
        else None
        if retiring is None
        else bool(retiring),
        remap_failed=bool(remapped[3]) if remapped else None,
        throttling=_throttling(nvml, handle),
        temperature_c=_ask(lambda: int(nvml.nvmlDeviceGetTemperature(handle, 0))),
        fabric=_fabric(nvml, handle),
        nvlinks=nvlinks,
        active_nvlinks=active,
        processes=_processes(nvml, handle, own_pids),
    )


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    info = _ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2))
    if info is not None and info.total:
        # What the driver keeps for itself is nobody's to hold: the GPU has that much less.
        total = int(info.total - info.reserved)
        return total, max(0, min(int(info.free), total - int(info.used)))
    info = _ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    return (int(info.total), int(info.free)) if info is not None and info.total else (None, None)


def _throttling(nvml: Any, handle: Any) -> tuple[str, ...]:
    bits = _ask(lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))) or 0
    return tuple(dict.fromkeys(word for bit, word in _SLOWDOWNS.items() if bits & bit))


def _fabric(nvml: Any, handle: Any) -> str | None:
    def ask() -> str | None:
        info = nvml.c_nvmlGpuFabricInfo_t()
        nvml.nvmlDeviceGetGpuFabricInfo(handle, nvml.byref(info))
        return _FABRIC_STATES.get(int(info.state))

    return _ask(ask)


def _nvlinks(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    states = [
        state
        for link in range(int(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 0)))
        if (state := _ask(nvml.nvmlDeviceGetNvLinkState, handle, link)) is not None
    ]
    return (len(states), sum(bool(state) for state in states)) if states else (None, None)


def _processes(nvml: Any, handle: Any, own_pids: frozenset[int]) -> tuple[ProcessFacts, ...]:
    found = _ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    return tuple(
        ProcessFacts(
            pid=int(process.pid),
            name=_process_name(nvml, int(process.pid)),
            used_bytes=None if process.usedGpuMemory is None else int(process.usedGpuMemory),
        )
        for process in found
        if int(process.pid) not in own_pids
    )


def _process_name(nvml: Any, pid: int) -> str:
    name = _ask(lambda: as_text(nvml.nvmlSystemGetProcessName(pid)))
    if not name:
        return "a process"
    return name.split(" ")[0].replace("\\", "/").rsplit("/", 1)[-1] or "a process"


def _link(nvml: Any, here: Any, there: Any, first: int, second: int) -> LinkFacts:
    linked = _ask(lambda: nvml.nvmlDeviceGetP2PStatus(here, there, nvml.NVML_P2P_CAPS_INDEX_NVLINK))
    read = _ask(lambda: nvml.nvmlDeviceGetP2PStatus(here, there, _READ))
    return LinkFacts(
        first=first,
        second=second,
        kind="unknown" if linked is None else "nvlink" if linked == 0 else "pcie",
        peer_access=None if read is None else _PEER_STATUS.get(read, "unknown"),
    )
