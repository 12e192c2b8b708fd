"""What is true of this machine and its packages, gathered once into a value."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from shutil import which
from typing import TypeVar

from oomproof.errors import OomproofError
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import Hardware
from oomproof.kernels.compiler import nvrtc_version

T = TypeVar("T")

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "triton",
    "cuda-bindings",
    "flash-attn",
    "safetensors",
    "huggingface_hub",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchFacts:
    """What torch says of itself."""

    cuda_build: str | None
    """CUDA version it was built for, None for a CPU build."""
    sees_cuda: bool
    """Whether it can use a GPU here."""
    architectures: tuple[str, ...]
    """GPU targets it was compiled for: "sm_90"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything a check looks at; a broken machine can be written down as one in a test."""

    python: str
    system: str
    """Operating system and processor: "Linux x86_64"."""
    packages: dict[str, str]
    """Installed package → version; absent ones are left out."""
    hardware: Hardware | None
    """None where the probe failed."""
    hardware_error: str | None
    torch: TorchFacts | None
    """None where torch is absent or cannot be imported."""
    torch_error: str | None
    bitsandbytes_error: str | None
    """Why a 4-bit product failed, None where it worked or was not tried."""
    bitsandbytes_works: bool
    """Whether a small 4-bit product gave a finite answer here."""
    c_compiler: str | None = None
    """What Triton would build its launchers with: $CC, gcc or clang; None where there is none."""
    nvrtc: str | None = None
    """Version of the NVRTC that compiles our CUDA sources; None where it cannot be loaded."""


def gather() -> Facts:
    """The facts of this machine; nothing here raises for what a check should report."""
    hardware, hardware_error = _try(probe)
    torch_facts, torch_error = _try(_torch_facts) if util.find_spec("torch") else (None, None)
    works, bitsandbytes_error = None, None
    nvrtc, _ = _try(nvrtc_version)
    if torch_facts is not None and util.find_spec("bitsandbytes"):
        works, bitsandbytes_error = _try(_try_4bit)
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=_installed(),
        hardware=hardware,
        hardware_error=hardware_error,
        torch=torch_facts,
        torch_error=torch_error,
        bitsandbytes_error=bitsandbytes_error,
        bitsandbytes_works=bool(works),
        c_compiler=_c_compiler(),
        nvrtc=nvrtc,
    )


def _c_compiler(environ: Mapping[str, str] = os.environ) -> str | None:
    return environ.get("CC") or which("gcc") or which("clang")


def _try(ask: Callable[[], T]) -> tuple[T | None, str | None]:
    """The answer, or the first line of why there is none."""
    try:
        return ask(), None
    except (OomproofError, ImportError, OSError, RuntimeError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, lines[0]


def _torch_facts() -> TorchFacts:
    import torch

    sees_cuda = torch.cuda.is_available()
    return TorchFacts(
        cuda_build=torch.version.cuda,
        sees_cuda=sees_cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if sees_cuda else (),
    )


def _try_4bit() -> bool:
    """Multiplies by a small NF4 weight, on the GPU where there is one."""
    # On a CPU it reports every optional kernel that it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = bitsandbytes.nn.Linear4bit(
        64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    with torch.inference_mode():
        product = layer.to(device)(torch.ones(1, 64, dtype=torch.bfloat16, device=device))
    return bool(torch.isfinite(product).all())


def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
