"""Which formats of weights the machine computes with."""

from __future__ import annotations

import re

from oomproof.doctor.checks.packages import broken_torch
from oomproof.doctor.cuda_support import numbers
from oomproof.doctor.facts import Facts, TrialFacts
from oomproof.doctor.findings import Capability, Check, Finding, Summary
from oomproof.doctor.remedies import BITSANDBYTES, INSTALL_RUN, install_torch
from oomproof.doctor.view import cuda_gpus, dotted, is_jetson, version
from oomproof.formats import FORMATS

_NEAREST_LIBRARY = (0, 50)
"""First bitsandbytes that takes the nearest library of a CUDA major version."""
_INT8_UNITS = (7, 5)
_UPGRADE = f"pip install --upgrade {BITSANDBYTES}"
_JETSON = (
    "pip install --force-reinstall bitsandbytes --index-url https://pypi.jetson-ai-lab.io/jp6/cu126"
)
_BINARY = re.compile(r"cuda(\d{2})(\d{1,2})", re.ASCII)


def _packages(facts: Facts) -> Finding | None:
    if "torch" in facts.packages and "bitsandbytes" in facts.packages:
        return None
    return Finding(status="missing", detail="needs torch and bitsandbytes", remedy=INSTALL_RUN)


def _override(facts: Facts) -> Finding | None:
    """BNB_CUDA_VERSION, which is obeyed whatever torch was built for."""
    asked = facts.environment.get("BNB_CUDA_VERSION", "")
    built = facts.torch.cuda_build if facts.torch else None
    if not asked or not built or not facts.bitsandbytes_binaries or _works(facts):
        return None
    library = f"cuda{asked}"
    major = numbers(built)[:1]
    found = _BINARY.fullmatch(library)
    if library in facts.bitsandbytes_binaries and found and (int(found[1]),) == major:
        return None
    return Finding(
        status="missing",
        detail=f"BNB_CUDA_VERSION={asked} asks bitsandbytes for a library that it has not, or not "
        f"for torch's CUDA {built}",
        remedy="unset BNB_CUDA_VERSION",
    )


def _library(facts: Facts) -> Finding | None:
    """The library that bitsandbytes would load for torch's CUDA."""
    built = numbers(facts.torch.cuda_build if facts.torch else None)[:2]
    shipped = {
        (int(found[1]), int(found[2]))
        for name in facts.bitsandbytes_binaries
        if (found := _BINARY.fullmatch(name))
    }
    if "BNB_CUDA_VERSION" in facts.environment or len(built) < 2 or not cuda_gpus(facts):
        return None
    if _works(facts):
        return None  # it was built here, or it found one elsewhere
    if not shipped or built in shipped:
        return None if shipped else _no_library(facts)
    nearest = version(facts, "bitsandbytes")[:2] >= _NEAREST_LIBRARY
    if nearest and built[0] in {major for major, _ in shipped}:
        return None
    has = ", ".join(f"{major}.{minor}" for major, minor in sorted(shipped))
    return Finding(
        status="missing",
        detail=f"bitsandbytes {facts.packages.get('bitsandbytes')} has libraries for CUDA {has}, "
        f"torch is built for {facts.torch.cuda_build if facts.torch else None}",
        remedy=install_torch(facts) if nearest else _UPGRADE,
    )


def _works(facts: Facts) -> bool:
    return facts.four_bit is not None and facts.four_bit.works


def _no_library(facts: Facts) -> Finding | None:
    if "bitsandbytes" not in facts.packages or facts.four_bit is None or facts.four_bit.works:
        return None
    return Finding(
        status="missing",
        detail=f"bitsandbytes {facts.packages['bitsandbytes']} has no CUDA library at all",
        remedy=f"pip install --force-reinstall --no-deps {BITSANDBYTES}",
    )


def _four_bit_trial(facts: Facts) -> Finding | None:
    return _trial(facts, facts.four_bit, "an NF4 weight")


def _eight_bit_trial(facts: Facts) -> Finding | None:
    return _trial(facts, facts.eight_bit, "an LLM.int8() weight")


def _trial(facts: Facts, trial: TrialFacts | None, weight: str) -> Finding | None:
    if trial is None or trial.works:
        return None
    remedy = _JETSON if is_jetson(facts) and cuda_gpus(facts) else _UPGRADE
    if "out of memory" in (trial.error or ""):
        remedy = "free memory of the GPU: nvidia-smi names who holds it"
    return Finding(
        status="missing",
        detail=f"a product with {weight} failed: {trial.error or 'its result is not finite'}",
        remedy=remedy,
    )


def _int8_units(facts: Facts) -> Finding | None:
    for gpu in cuda_gpus(facts):
        if gpu.compute_capability is not None and gpu.compute_capability < _INT8_UNITS:
            return Finding(
                status="limited",
                detail=f"{gpu.name} has compute capability {dotted(gpu.compute_capability)}, below "
                "7.5: LLM.int8() is slow there",
                remedy="use --format nf4",
            )
    return None


def _four_bit_summary(facts: Facts) -> Summary:
    return _tried(facts.four_bit, "a product with an NF4 weight is right")


def _eight_bit_summary(facts: Facts) -> Summary:
    return _tried(facts.eight_bit, "a product with an LLM.int8() weight is right")


def _tried(trial: TrialFacts | None, words: str) -> Summary:
    return Summary(detail=words) if trial else Summary(status="limited", detail="was not tried")


def _bf16_summary(facts: Facts) -> Summary:
    needed = FORMATS["bf16"].min_compute_capability or (8, 0)
    if cuda_gpus(facts):
        return _by_capability(facts, needed, remedy="use fp16, as plans for this GPU do")
    features = facts.host.cpu_features if facts.host else frozenset()
    if {"avx512_bf16", "amx_bf16", "bf16"} & features:
        return Summary(detail="the CPU has bfloat16 instructions")
    return Summary(status="limited", detail="the CPU emulates bfloat16")


def _fp8_summary(facts: Facts) -> Summary:
    needed = FORMATS["fp8"].min_compute_capability or (8, 9)
    return _by_capability(facts, needed, remedy="use --format int8")


def _by_capability(facts: Facts, needed: tuple[int, int], *, remedy: str) -> Summary:
    gpus = [gpu for gpu in cuda_gpus(facts) if gpu.compute_capability is not None]
    words = f"compute capability {dotted(needed)}"
    if not gpus:
        return Summary(status="missing", detail=f"needs a GPU of {words}")
    for gpu in gpus:
        if (gpu.compute_capability or (0, 0)) < needed:
            has = dotted(gpu.compute_capability)
            return Summary(
                status="missing", detail=f"needs {words}, {gpu.name} has {has}", remedy=remedy
            )
    return Summary(detail=f"every GPU has {words}")


_LIBRARY_CHECKS = (
    Check(name="bitsandbytes", run=_packages),
    Check(name="torch-import", run=broken_torch),
    Check(name="bitsandbytes-override", run=_override),
    Check(name="bitsandbytes-library", run=_library),
)
FOUR_BIT = Capability(
    name="4-bit",
    required=lambda _facts: True,
    summary=_four_bit_summary,
    checks=(*_LIBRARY_CHECKS, Check(name="4-bit-product", run=_four_bit_trial)),
)
EIGHT_BIT = Capability(
    name="8-bit",
    summary=_eight_bit_summary,
    checks=(
        *_LIBRARY_CHECKS,
        Check(name="8-bit-product", run=_eight_bit_trial),
        Check(name="int8-units", run=_int8_units),
    ),
)
BF16 = Capability(name="bf16", summary=_bf16_summary)
FP8 = Capability(name="FP8", summary=_fp8_summary)
