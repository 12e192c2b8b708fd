"""Whether our own engine's kernels can be compiled for the GPUs."""

from __future__ import annotations

import shlex

from oomproof.doctor.checks.packages import unmet_requirement
from oomproof.doctor.cuda_support import numbers
from oomproof.doctor.facts import Facts
from oomproof.doctor.findings import Capability, Check, Finding, Summary
from oomproof.doctor.remedies import INSTALL_RUN, update_driver
from oomproof.doctor.view import cuda_gpus, dotted
from oomproof.kernels.compiler import nvrtc_wheel

_LEAST = (8, 0)
_NEEDED = ("triton", "cuda-bindings")
_EXTRA_HAS_THEM = ("x86_64", "AMD64")
_ON_ARM = {"triton": "triton", "cuda-bindings": "cuda-bindings>=12.9,<14"}


def _applies(facts: Facts) -> bool:
    return bool(cuda_gpus(facts)) and facts.system.name == "Linux"


def _system(facts: Facts) -> Finding | None:
    if not cuda_gpus(facts) or facts.system.name == "Linux":
        return None
    return Finding(
        status="missing",
        detail=f"needs Linux, this is {facts.system.name}; models run through transformers",
        remedy="run it in WSL 2 (wsl --install), or use --engine transformers",
        required=False,
    )


def _too_old(facts: Facts) -> Finding | None:
    for gpu in cuda_gpus(facts):
        if gpu.compute_capability is not None and gpu.compute_capability < _LEAST:
            return Finding(
                status="missing",
                detail=f"needs compute capability 8.0, {gpu.name} has "
                f"{dotted(gpu.compute_capability)}",
                remedy="use --engine transformers",
                required=False,
            )
    return None


def _absent(facts: Facts) -> Finding | None:
    absent = [name for name in _NEEDED if name not in facts.packages]
    if not _applies(facts) or not absent:
        return None
    remedy = INSTALL_RUN
    if facts.system.machine not in _EXTRA_HAS_THEM:
        remedy = "pip install " + " ".join(shlex.quote(_ON_ARM[name]) for name in absent)
    return Finding(status="missing", detail=f"not installed: {', '.join(absent)}", remedy=remedy)


def _triton(facts: Facts) -> Finding | None:
    if not _applies(facts) or "triton" not in facts.packages:
        return None
    mismatch = unmet_requirement(facts, of=("triton",), by=("torch",))
    broken = facts.triton is not None and not facts.triton.works
    if mismatch is not None:
        return Finding(
            status="missing" if broken else "limited",
            detail=mismatch.detail,
            remedy=mismatch.remedy,
        )
    if not broken:
        return None
    error = facts.triton.error if facts.triton else None
    return Finding(
        status="missing",
        detail=f"triton {facts.packages['triton']} cannot be imported: {error or 'no reason'}",
        remedy=f"pip install --force-reinstall --no-deps triton=={facts.packages['triton']}",
    )


def _c_compiler(facts: Facts) -> Finding | None:
    if not _applies(facts) or "triton" not in facts.packages:
        return None
    triton = f"triton {facts.packages['triton']}"
    if facts.system.c_compiler is None:
        return Finding(
            status="missing",
            detail=f"{triton} needs a C compiler, and there is none",
            remedy="apt-get install gcc (or set CC), or use --engine transformers",
        )
    if facts.system.python_headers is False:
        series = ".".join(facts.system.python.split(".")[:2])
        return Finding(
            status="missing",
            detail=f"{triton} compiles against Python.h, which is not there",
            remedy=f"apt-get install python{series}-dev",
        )
    return None


def _nvrtc(facts: Facts) -> Finding | None:
    if not _applies(facts) or "cuda-bindings" not in facts.packages:
        return None
    wheel = nvrtc_wheel(facts.packages["cuda-bindings"])
    if facts.nvrtc is None:
        why = f": {facts.nvrtc_error}" if facts.nvrtc_error else ""
        return Finding(
            status="missing",
            detail=f"NVRTC, which compiles the CUDA sources, cannot be loaded{why}",
            remedy=f"pip install {wheel}",
        )
    driver, compiler = numbers(facts.driver.cuda_version)[:2], numbers(facts.nvrtc.version)[:2]
    if driver and compiler and compiler[0] > driver[0]:
        older = "'cuda-bindings>=12.9,<13' nvidia-cuda-nvrtc-cu12"
        return Finding(
            status="missing",
            detail=f"NVRTC {facts.nvrtc.version} is newer than the driver, which supports up to "
            f"CUDA {facts.driver.cuda_version}",
            remedy=f"pip install {older}" if driver[0] == 12 else update_driver(facts),
        )
    for gpu in cuda_gpus(facts):
        if gpu.compute_capability is None or not facts.nvrtc.architectures:
            continue
        number = 10 * gpu.compute_capability[0] + gpu.compute_capability[1]
        if number in facts.nvrtc.architectures:
            continue
        # Of a newer GPU it makes PTX, which the driver must be able to read.
        if number > min(facts.nvrtc.architectures) and (not driver or driver >= compiler):
            continue
        return Finding(
            status="missing",
            detail=f"NVRTC {facts.nvrtc.version} does not compile for {gpu.name} (compute "
            f"capability {dotted(gpu.compute_capability)})",
            remedy=f"pip install --upgrade {wheel}",
        )
    return None


def _summary(facts: Facts) -> Summary:
    if not cuda_gpus(facts):
        return Summary(detail="runs in plain torch on the CPU")
    nvrtc = facts.nvrtc.version if facts.nvrtc else "unknown"
    return Summary(
        detail=f"triton {facts.packages.get('triton')}, compiler {facts.system.c_compiler}, "
        f"NVRTC {nvrtc}"
    )


NATIVE_ENGINE = Capability(
    name="native engine",
    required=lambda facts: bool(cuda_gpus(facts)),
    summary=_summary,
    checks=(
        Check(name="system", run=_system),
        Check(name="native-gpu", run=_too_old),
        Check(name="native-packages", run=_absent),
        Check(name="triton", run=_triton),
        Check(name="c-compiler", run=_c_compiler),
        Check(name="nvrtc", run=_nvrtc),
    ),
)
