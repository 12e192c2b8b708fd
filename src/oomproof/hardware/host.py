"""The machine around the GPUs: RAM as this process may use it, processor, free disk."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from oomproof.hardware.cgroup import memory_limit
from oomproof.hardware.spec import HostSpec

_STORAGE_FEATURES = frozenset(
    (
        "amx_bf16", "amx_int8", "amx_tile", "avx", "avx2", "avx512_bf16", "avx512_fp16",
        "avx512_vnni", "avx512bw", "avx512f", "avx_vnni", "f16c", "fma",
        "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2",
    )
)  # fmt: skip
"""Instruction sets that decide how weights are stored or multiplied (x86, then Arm)."""


def probe_host(*, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> HostSpec:
    """Reads this machine; never fails for want of a fact that an operating system does not show.

    Args:
        root: Where the file system starts; tests pass a folder.
        environ: Environment variables; they name the download folder.
    """
    import psutil

    memory = psutil.virtual_memory()
    limit = memory_limit(memory.total, root=root)
    name, features = _processor(root)
    return HostSpec(
        total_ram_bytes=limit.limit_bytes if limit else memory.total,
        available_ram_bytes=(
            min(memory.available, limit.headroom_bytes) if limit else memory.available
        ),
        free_disk_bytes=free_disk_bytes(download_folder(environ)),
        cpu_count=_cpu_count(),
        cpu_name=name,
        cpu_features=features,
        ram_limit_source=limit.source if limit else "physical",
    )


def download_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps what it downloads, by its own environment variables."""
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "huggingface" / "hub"


def free_disk_bytes(folder: Path) -> int | None:
    """Free space at the folder, or at its nearest parent that exists; None where neither tells."""
    folder = folder.absolute()
    for candidate in (folder, *folder.parents):
        try:
            return shutil.disk_usage(candidate).free
        except OSError:  # not there yet, or not ours to look at: its parent may tell
            continue
    return None


def sysctl(name: str) -> str:
    """A fact that macOS keeps, such as "machdep.cpu.brand_string"; empty where it has none."""
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_count() -> int:
    """Processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _processor(root: Path) -> tuple[str, frozenset[str]]:
    """Name and features; features only where Linux lists them."""
    if platform.system() == "Darwin":
        return sysctl("machdep.cpu.brand_string"), frozenset()
    name, features = "", frozenset[str]()
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor(), features
    for line in text.splitlines():
        key, _, value = line.partition(":")
        match key.strip().casefold():
            case "model name" if not name:
                name = value.strip()
            case "flags" | "features":
                features = _STORAGE_FEATURES & frozenset(value.split())
        if name and features:
            break
    return name or platform.processor(), features
