"""How much memory a model can take, who else holds it, and how torch is told to handle it."""

from __future__ import annotations

from oomproof.doctor.allocator_settings import KNOWN, Settings, read_settings
from oomproof.doctor.cuda_support import numbers
from oomproof.doctor.facts import Facts, GpuFacts
from oomproof.doctor.findings import Capability, Check, Finding, Summary
from oomproof.doctor.view import has_nvidia, visible
from oomproof.units import GIB, format_bytes

_NAME, _OLD_NAME = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
_OLD_NAME_WARNS = ((2, 8), (2, 12))
"""Versions of torch that warn of the old name."""
_LEAST_HOST_BYTES = 4 * GIB
"""Torch with CUDA takes some 3 GiB of the host before anything is loaded."""
_HELD_BYTES = GIB
_MANY_SMALL_MB = 64


def _host_limit(facts: Facts) -> Finding | None:
    host = facts.host
    if host is None or host.ram_limit_source == "physical":
        return None
    if host.available_ram_bytes >= _LEAST_HOST_BYTES:
        return None
    machine = facts.system.physical_ram_bytes
    of = f" of the machine's {format_bytes(machine)}" if machine else ""
    return Finding(
        status="limited",
        detail=f"{host.ram_limit_source} leaves {format_bytes(host.available_ram_bytes)}{of}; "
        "loading may be killed without a word",
        remedy="start the container with more: docker run --memory 16g …"
        if facts.system.container
        else "run in a group with more: systemd-run --user --scope -p MemoryMax=16G …",
    )


def _little(facts: Facts) -> Finding | None:
    rooms = _rooms(facts)
    if not rooms or max(rooms) >= GIB:
        return None
    return Finding(
        status="limited",
        detail=f"{_free(facts)}: too little for most models",
        remedy="end what else takes memory (on a GPU nvidia-smi names it)",
    )


def _held(facts: Facts) -> Finding | None:
    """Memory of a GPU that other processes hold."""
    for gpu in visible(facts).gpus:
        if gpu.kind != "cuda" or not gpu.total_bytes or gpu.free_bytes is None:
            continue
        enough = max(_HELD_BYTES, gpu.total_bytes // 10)
        largest = max(gpu.processes, key=lambda process: process.used_bytes or 0, default=None)
        named = sum(process.used_bytes or 0 for process in gpu.processes)
        taken = gpu.total_bytes - gpu.free_bytes
        if largest is not None and max(named, taken) >= enough:
            return Finding(
                status="limited",
                detail=f"GPU {gpu.index}: {_holders(gpu)} hold"
                f"{'s' if len(gpu.processes) == 1 else ''} {format_bytes(max(named, taken))} of "
                f"{format_bytes(gpu.total_bytes)}",
                remedy=f"on the host of this container: kill {largest.pid}"
                if facts.system.container
                else f"kill {largest.pid}",
            )
        if taken >= enough:
            return Finding(
                status="limited",
                detail=f"GPU {gpu.index}: {format_bytes(taken)} of {format_bytes(gpu.total_bytes)} "
                "are held by processes that cannot be seen from here",
                remedy="on the host, as root: fuser -v /dev/nvidia* (names them)",
            )
    return None


def _holders(gpu: GpuFacts) -> str:
    shown = [f"{process.name} (pid {process.pid})" for process in gpu.processes[:3]]
    more = f" and {len(gpu.processes) - 3} more" if len(gpu.processes) > 3 else ""
    return ", ".join(shown) + more


def _rooms(facts: Facts) -> list[int]:
    rooms = [gpu.free_bytes for gpu in visible(facts).gpus if gpu.free_bytes is not None]
    if not rooms and facts.host is not None:
        rooms = [facts.host.available_ram_bytes]
    return rooms


def _free(facts: Facts) -> str:
    parts = [
        f"{gpu.name} {format_bytes(gpu.free_bytes)} free"
        for gpu in visible(facts).gpus
        if gpu.free_bytes is not None
    ]
    host = facts.host
    if host is not None:
        where = "host RAM" if parts else "cpu"
        parts.append(f"{where} {format_bytes(host.available_ram_bytes)} free")
        if host.ram_limit_source != "physical":
            parts.append(f"limited by {host.ram_limit_source}")
    return ", ".join(parts) or "not known"


def _names(facts: Facts) -> Finding | None:
    """The two names of one setting."""
    new, old = facts.environment.get(_NAME), facts.environment.get(_OLD_NAME)
    if old is None:
        return None
    if new is not None and new != old:
        return Finding(
            status="limited",
            detail=f"{_NAME}={new!r} and {_OLD_NAME}={old!r} contradict each other",
            remedy=f"unset {_OLD_NAME}",
        )
    first, last = _OLD_NAME_WARNS
    torch = numbers(facts.packages.get("torch"))[:2]
    if new is None and first <= torch < last:
        return Finding(
            status="limited",
            detail=f"{_OLD_NAME} is the old name, of which torch {facts.packages['torch']} warns",
            remedy=f'export {_NAME}="${_OLD_NAME}"; unset {_OLD_NAME}',
        )
    return None


def _refused(facts: Facts) -> Finding | None:
    """What torch itself refuses at its first allocation."""
    settings = _settings(facts)
    problem = settings.malformed
    least = settings.number("max_split_size_mb")
    threshold = settings.number("garbage_collection_threshold")
    if problem is None and least is not None and least < 20:
        problem = f"max_split_size_mb:{least:g} is below 20"
    if problem is None and threshold is not None and not 0 < threshold < 1:
        problem = f"garbage_collection_threshold:{threshold:g} is not between 0 and 1"
    if problem is None:
        return None
    return Finding(
        status="missing",
        detail=f"torch refuses {settings.variable}={settings.text!r}: {problem}",
        remedy=f"unset {settings.variable}",
    )


def _unknown(facts: Facts) -> Finding | None:
    settings = _settings(facts)
    unknown = [key for key, _ in settings.pairs if key not in KNOWN]
    if not unknown:
        return None
    return Finding(
        status="limited",
        detail=f"{settings.variable} has {', '.join(unknown[:3])}, which torch does not know: it "
        "fails at its first allocation, or ignores it",
        remedy=f"unset {settings.variable}",
    )


def _harmful(facts: Facts) -> Finding | None:
    """Settings that torch takes, to the user's harm."""
    settings = _settings(facts)
    values = dict(settings.pairs)
    small = settings.number("max_split_size_mb")
    why = None
    if values.get("expandable_segments", "").casefold() == "true" and facts.system.wsl:
        why = "expandable_segments fails under WSL (CUDA driver error: unknown error)"
    elif values.get("backend", "").casefold() == "cudamallocasync":
        why = "the backend cudaMallocAsync keeps memory that torch does not count"
    elif small is not None and small < _MANY_SMALL_MB:
        why = f"max_split_size_mb:{small:g} wastes more memory than it saves"
    elif values.get("roundup_power2_divisions") == "1":
        why = "roundup_power2_divisions:1 makes every allocation a power of two"
    if why is None:
        return None
    return Finding(status="limited", detail=why, remedy=f"unset {settings.variable}")


def _debugging(facts: Facts) -> Finding | None:
    for name, why in (
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "every allocation goes to the driver, CUDA graphs fail"),
        ("CUDA_LAUNCH_BLOCKING", "every kernel is waited for"),
    ):
        if facts.environment.get(name, "0") not in ("", "0"):
            return Finding(status="limited", detail=f"{name} is set: {why}", remedy=f"unset {name}")
    return None


def _settings(facts: Facts) -> Settings:
    variable = _NAME if _NAME in facts.environment else _OLD_NAME
    return read_settings(variable, facts.environment.get(variable, ""))


def _allocator_summary(facts: Facts) -> Summary:
    settings = _settings(facts)
    if settings.text:
        return Summary(detail=f"{settings.variable}={settings.text}")
    return Summary(detail="torch's own settings")


def _memory_summary(facts: Facts) -> Summary:
    if facts.host is None and not facts.gpus:
        return Summary(status="limited", detail="neither RAM nor GPUs could be read")
    return Summary(detail=_free(facts))


MEMORY = Capability(
    name="memory",
    required=lambda _facts: True,
    summary=_memory_summary,
    checks=(
        Check(name="little-memory", run=_little),
        Check(name="other-processes", run=_held),
        Check(name="ram-limit", run=_host_limit),
    ),
)
ALLOCATOR = Capability(
    name="allocator",
    required=has_nvidia,
    summary=_allocator_summary,
    checks=(
        Check(name="allocator-refused", run=_refused),
        Check(name="allocator-names", run=_names),
        Check(name="allocator-unknown", run=_unknown),
        Check(name="allocator-harmful", run=_harmful),
        Check(name="debugging", run=_debugging),
    ),
)
