"""What this process can see by itself: the system, packages, settings, the download folder."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from shutil import which
from urllib.parse import unquote

from oomproof.doctor.facts import CacheFacts, RequirementFacts, SystemFacts, XidFacts
from oomproof.hardware.host import download_folder, free_disk_bytes

PACKAGES = (
    "torch",
    "torchvision",
    "torchaudio",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "triton",
    "cuda-bindings",
    "flash-attn",
    "safetensors",
    "huggingface_hub",
    "hf-transfer",
    "tokenizers",
    "numpy",
    "peft",
    "trl",
)
_VARIABLES = (
    "BNB_CUDA_VERSION",
    "CC",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_ENABLE_HF_TRANSFER",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "NCCL_P2P_DISABLE",
    "NVIDIA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TRANSFORMERS_OFFLINE",
)
_NVIDIA, _DISPLAY = "0x10de", ("0x0300", "0x0302")
"""PCI vendor, and classes of graphics cards and of those without a display."""
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)")
_SECRET = re.compile(r"//[^/@\s]+@")
_MAX_XIDS = 20


def read_system(*, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> SystemFacts:
    """The operating system and Python."""
    import psutil

    release = platform.release()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return SystemFacts(
        python=platform.python_version(),
        name=platform.system(),
        machine=platform.machine(),
        release=release,
        wsl="microsoft" in release.casefold(),
        container=_in_container(root),
        physical_ram_bytes=int(psutil.virtual_memory().total),
        shared_memory_bytes=_size(root / "dev/shm"),
        c_compiler=environ.get("CC") or which("gcc") or which("clang"),
        python_headers=headers.is_file(),
    )


def _in_container(root: Path) -> bool:
    marks = (".dockerenv", "run/.containerenv", "run/secrets/kubernetes.io")
    return any((root / mark).exists() for mark in marks)


def _size(folder: Path) -> int | None:
    try:
        return int(shutil.disk_usage(folder).total)
    except OSError:
        return None


def read_packages() -> dict[str, str]:
    """Installed package → version, of those that matter here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = str(metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    return found


def read_requirements() -> tuple[RequirementFacts, ...]:
    """What the installed packages, and our [run] extra, need of each other."""
    return (*_requirements("oomproof", extra="run"), *_all_requirements())


def _all_requirements() -> Iterator[RequirementFacts]:
    for package in PACKAGES:
        yield from _requirements(package)


def _requirements(package: str, *, extra: str = "") -> Iterator[RequirementFacts]:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    ours = {canonicalize_name(name): name for name in PACKAGES}
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        try:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
        except InvalidRequirement:
            continue
        needs = ours.get(canonicalize_name(requirement.name))
        if needs is not None and str(requirement.specifier):
            yield RequirementFacts(
                package=f"{package}[{extra}]" if extra else package,
                needs=needs,
                specifier=str(requirement.specifier),
            )


def read_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that matter here, without names and passwords in addresses."""
    return {name: _SECRET.sub("//", environ[name])[:1000] for name in _VARIABLES if name in environ}


def read_binaries() -> tuple[str, ...]:
    """CUDA versions of bitsandbytes' libraries, without importing it: "cuda126"."""
    spec = util.find_spec("bitsandbytes")
    folders = (spec.submodule_search_locations or []) if spec else []
    names = (path.name for folder in folders for path in Path(folder).glob("libbitsandbytes_cuda*"))
    found = (re.match(r"libbitsandbytes_(cuda\d+)(?=[._])", name) for name in names)
    return tuple(sorted({match[1] for match in found if match}))


def read_wheel(package: str = "flash-attn") -> str | None:
    """File name of the wheel that a package was installed from, where pip noted it."""
    try:
        note = metadata.distribution(package).read_text("direct_url.json")
    except (metadata.PackageNotFoundError, OSError):
        return None
    found = re.search(r'"url"\s*:\s*"[^"]*/([^"/]+\.whl)"', note or "")
    return unquote(found[1]) if found else None


def read_cache(environ: Mapping[str, str] = os.environ) -> CacheFacts:
    """Where downloads go: the folder, or the nearest one above it that exists."""
    folder = download_folder(environ).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    home = str(Path.home()) if environ.get("HOME") else ""
    path = str(folder)
    return CacheFacts(
        path=f"~{path[len(home) :]}" if home and path.startswith(home + os.sep) else path,
        writable=os.access(nearest, os.W_OK | os.X_OK),
        free_bytes=free_disk_bytes(folder),
    )


def read_bus(*, root: Path = Path("/")) -> dict[str, object]:
    """NVIDIA's GPUs as the kernel sees them, whatever the driver says."""
    nodes = [path for path in (root / "dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()]
    return {
        "gpus_on_bus": _gpus_on_bus(root),
        "device_nodes": len(nodes),
        "device_nodes_denied": any(not os.access(node, os.R_OK | os.W_OK) for node in nodes),
    }


def _gpus_on_bus(root: Path) -> int | None:
    if (root / "usr/lib/wsl/lib/libcuda.so.1").exists():
        return 1  # Windows lends at least one
    devices = root / "sys/bus/pci/devices"
    if not devices.is_dir():
        return None
    return sum(
        _text(device / "vendor") == _NVIDIA and _text(device / "class").startswith(_DISPLAY)
        for device in devices.iterdir()
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def read_xids() -> tuple[XidFacts, ...] | None:
    """Faults of GPUs in the kernel's log; None where this user may not read it."""
    command = which("dmesg")
    if command is None:
        return None
    done = subprocess.run(
        [command], capture_output=True, text=True, errors="replace", timeout=2, check=False
    )
    return find_xids(done.stdout) if done.returncode == 0 else None


def find_xids(log: str) -> tuple[XidFacts, ...]:
    """The last faults of a kernel's log, each once."""
    found = dict.fromkeys((bus, int(code)) for bus, code in _XID.findall(log))
    return tuple(XidFacts(bus_id=bus, code=code) for bus, code in list(found)[-_MAX_XIDS:])
