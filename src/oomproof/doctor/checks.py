"""Checks over the facts: one verdict a capability, each with what mends it.

A check is one function in CHECKS; it looks at nothing but its argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from oomproof.doctor.facts import Facts
from oomproof.formats import FORMATS
from oomproof.hardware.spec import DeviceSpec
from oomproof.kernels.compiler import nvrtc_wheel
from oomproof.units import GIB, format_bytes

INSTALL_RUN = "pip install 'oomproof[run]'"
_REINSTALL_TORCH = "pip install --force-reinstall torch"
_MIN_FLASH_ATTENTION_CAPABILITY = (8, 0)

_ARCHITECTURE = re.compile(
    r"(?P<kind>sm|compute)_(?P<major>\d{1,2})(?P<minor>\d)(?P<suffix>[af]?)", re.ASCII
)

Status = Literal["ok", "limited", "missing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One capability of this machine."""

    capability: str
    status: Status
    """"ok", "limited" (works, but not at its best) or "missing"."""
    detail: str
    remedy: str | None = None
    """The line that mends it, where something can be installed or changed."""
    required: bool = True
    """Whether `run` needs it."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `doctor --json`."""
        return asdict(self)


def check_all(facts: Facts) -> tuple[Verdict, ...]:
    """Every verdict, in the order of CHECKS."""
    return tuple(check(facts) for check in CHECKS)


def check_memory(facts: Facts) -> Verdict:
    """How much memory a model can take."""
    hardware = facts.hardware
    if hardware is None:
        return Verdict(
            capability="memory",
            status="missing",
            detail=facts.hardware_error or "the machine could not be probed",
            remedy="check the NVIDIA driver with nvidia-smi",
        )
    parts = [f"{d.name} {format_bytes(d.free_bytes)} free" for d in hardware.devices]
    host = hardware.host
    if hardware.has_gpu:
        parts.append(f"host RAM {format_bytes(host.available_ram_bytes)} free")
    if host.ram_limit_source != "physical":
        parts.append(f"limited by {host.ram_limit_source}")
    if host.free_disk_bytes is not None:
        parts.append(f"disk {format_bytes(host.free_disk_bytes)} free")
    enough = max(device.free_bytes for device in hardware.devices) >= GIB
    return Verdict(
        capability="memory", status="ok" if enough else "limited", detail=", ".join(parts)
    )


def check_gpu(facts: Facts) -> Verdict:
    """Whether torch can use the GPUs that NVML sees."""
    gpus = _gpus(facts)
    torch = facts.torch
    if not gpus:
        return Verdict(
            capability="GPU",
            status="missing",
            detail="no GPU is visible; models run on the CPU",
            required=False,
        )
    driver = facts.hardware.driver_version if facts.hardware else None
    seen = f"{len(gpus)} × {gpus[0].name}, driver {driver or 'unknown'}"
    if torch is None and facts.torch_error is not None:
        return _broken_torch("GPU", facts.torch_error)
    if torch is None:
        return Verdict(
            capability="GPU", status="missing", detail=f"{seen}; no torch", remedy=INSTALL_RUN
        )
    if torch.cuda_build is None:
        return Verdict(
            capability="GPU",
            status="missing",
            detail=f"{seen}; torch is a CPU build",
            remedy=_REINSTALL_TORCH,
        )
    if not torch.sees_cuda:
        newest = facts.hardware.cuda_driver_version if facts.hardware else None
        return Verdict(
            capability="GPU",
            status="missing",
            detail=f"{seen}; torch is built for CUDA {torch.cuda_build}, "
            f"the driver supports up to {newest or 'unknown'}",
            remedy="update the NVIDIA driver, or install a torch built for an older CUDA",
        )
    for gpu in gpus:
        if not _has_kernels(torch.architectures, gpu.compute_capability):
            return Verdict(
                capability="GPU",
                status="missing",
                detail=f"{seen}; torch has no kernels for {gpu.name} (compute capability "
                f"{_dotted(gpu.compute_capability)}), only for {', '.join(torch.architectures)}",
                remedy="pip install --upgrade torch",
            )
    return Verdict(capability="GPU", status="ok", detail=f"{seen}, CUDA {torch.cuda_build}")


def check_run_packages(facts: Facts) -> Verdict:
    """Whether the packages of the [run] extra are there."""
    needed = ("torch", "transformers", "accelerate", "bitsandbytes")
    absent = [name for name in needed if name not in facts.packages]
    if absent:
        return Verdict(
            capability="run models",
            status="missing",
            detail=f"not installed: {', '.join(absent)}",
            remedy=INSTALL_RUN,
        )
    if facts.torch_error is not None:
        return _broken_torch("run models", facts.torch_error)
    versions = ", ".join(f"{name} {facts.packages[name]}" for name in needed)
    return Verdict(capability="run models", status="ok", detail=versions)


def check_native_engine(facts: Facts) -> Verdict:
    """Whether our own engine's kernels can be compiled for the GPUs."""
    name = "native engine"
    if not any(gpu.kind == "cuda" for gpu in _gpus(facts)):
        return Verdict(
            capability=name, status="ok", detail="runs in plain torch on the CPU", required=False
        )
    if not facts.system.startswith("Linux"):
        return Verdict(
            capability=name,
            status="missing",
            detail=f"needs Linux, this is {facts.system}; models run through transformers",
            required=False,
        )
    absent = [package for package in ("triton", "cuda-bindings") if package not in facts.packages]
    if absent:
        return Verdict(
            capability=name,
            status="missing",
            detail=f"not installed: {', '.join(absent)}",
            remedy=INSTALL_RUN,
        )
    triton = facts.packages["triton"]
    if facts.c_compiler is None:
        return Verdict(
            capability=name,
            status="missing",
            detail=f"triton {triton} needs a C compiler, and there is none",
            remedy="apt-get install gcc (or set CC), or use --engine transformers",
        )
    if facts.nvrtc is None:
        return Verdict(
            capability=name,
            status="missing",
            detail="NVRTC, which compiles the CUDA sources, cannot be loaded",
            remedy=f"pip install {nvrtc_wheel(facts.packages['cuda-bindings'])}",
        )
    return Verdict(
        capability=name,
        status="ok",
        detail=f"triton {triton}, compiler {facts.c_compiler}, NVRTC {facts.nvrtc}",
    )


def check_4bit(facts: Facts) -> Verdict:
    """Whether bitsandbytes computes a 4-bit product here."""
    if facts.torch_error is not None:
        return _broken_torch("4-bit", facts.torch_error)
    if "bitsandbytes" not in facts.packages or facts.torch is None:
        return Verdict(
            capability="4-bit",
            status="missing",
            detail="needs torch and bitsandbytes",
            remedy=INSTALL_RUN,
        )
    if not facts.bitsandbytes_works:
        problem = facts.bitsandbytes_error or "its result is not finite"
        return Verdict(
            capability="4-bit",
            status="missing",
            detail=f"a product with an NF4 weight failed: {problem}",
            remedy="pip install --upgrade bitsandbytes",
        )
    return Verdict(capability="4-bit", status="ok", detail="a product with an NF4 weight is right")


def check_bf16(facts: Facts) -> Verdict:
    """Whether the devices compute in bfloat16."""
    return _by_capability(facts, "bf16", FORMATS["bf16"].min_compute_capability or (8, 0))


def check_fp8(facts: Facts) -> Verdict:
    """Whether the GPUs have FP8 matrix units."""
    return _by_capability(facts, "FP8", FORMATS["fp8"].min_compute_capability or (8, 9))


def check_flash_attention(facts: Facts) -> Verdict:
    """Whether a fused attention kernel runs; torch brings its own."""
    gpus = _gpus(facts)
    if not gpus:
        return Verdict(
            capability="FlashAttention",
            status="missing",
            detail="needs a GPU; torch's own attention is used on the CPU",
            required=False,
        )
    old = [d for d in gpus if (d.compute_capability or (0, 0)) < _MIN_FLASH_ATTENTION_CAPABILITY]
    if old:
        return Verdict(
            capability="FlashAttention",
            status="limited",
            detail=f"{old[0].name} is below compute capability 8.0; torch's memory-efficient "
            "kernel is used",
            required=False,
        )
    package = facts.packages.get("flash-attn")
    extra = f"; flash-attn {package} is installed too" if package else ""
    return Verdict(
        capability="FlashAttention",
        status="ok",
        detail=f"FlashAttention 2 in torch's SDPA{extra}",
        required=False,
    )


CHECKS: tuple[Callable[[Facts], Verdict], ...] = (
    check_run_packages,
    check_memory,
    check_gpu,
    check_native_engine,
    check_4bit,
    check_bf16,
    check_fp8,
    check_flash_attention,
)


def _broken_torch(capability: str, error: str) -> Verdict:
    return Verdict(
        capability=capability,
        status="missing",
        detail=f"torch cannot be imported: {error}",
        remedy=_REINSTALL_TORCH,
    )


def _has_kernels(architectures: tuple[str, ...], capability: tuple[int, int] | None) -> bool:
    """Whether kernels built for "sm_90", … run on a GPU of this compute capability.

    A kernel runs on its own major version from its minor on; "compute_90" (PTX) on every later
    one; a suffix, as in "sm_90a", ties it to exactly that GPU (CUDA programming guide, "Binary
    compatibility" and "Application compatibility").
    """
    if capability is None or not architectures:
        return True
    for architecture in architectures:
        found = _ARCHITECTURE.fullmatch(architecture)
        if found is None:
            continue
        target = (int(found["major"]), int(found["minor"]))
        if found["suffix"]:
            runs = target == capability
        elif found["kind"] == "compute":
            runs = target <= capability
        else:
            runs = target[0] == capability[0] and target[1] <= capability[1]
        if runs:
            return True
    return False


def _dotted(capability: tuple[int, int] | None) -> str:
    return "unknown" if capability is None else f"{capability[0]}.{capability[1]}"


def _gpus(facts: Facts) -> tuple[DeviceSpec, ...]:
    if facts.hardware is None:
        return ()
    return tuple(device for device in facts.hardware.devices if device.kind != "cpu")


def _by_capability(facts: Facts, capability: str, needed: tuple[int, int]) -> Verdict:
    gpus = [gpu for gpu in _gpus(facts) if gpu.compute_capability is not None]
    words = f"compute capability {needed[0]}.{needed[1]}"
    if not gpus:
        features = facts.hardware.host.cpu_features if facts.hardware else frozenset()
        if capability == "bf16":
            fast = bool({"avx512_bf16", "amx_bf16"} & features)
            detail = "the CPU has bfloat16 instructions" if fast else "the CPU emulates bfloat16"
            status: Status = "ok" if fast else "limited"
            return Verdict(capability=capability, status=status, detail=detail, required=False)
        return Verdict(
            capability=capability,
            status="missing",
            detail=f"needs a GPU of {words}",
            required=False,
        )
    lacking = [gpu for gpu in gpus if (gpu.compute_capability or (0, 0)) < needed]
    if lacking:
        has = lacking[0].compute_capability or (0, 0)
        return Verdict(
            capability=capability,
            status="missing",
            detail=f"needs {words}, {lacking[0].name} has {has[0]}.{has[1]}",
            required=False,
        )
    return Verdict(
        capability=capability, status="ok", detail=f"every GPU has {words}", required=False
    )
