"""FlashAttention: torch brings its own, the package flash-attn must match torch."""

from __future__ import annotations

import re

from oomproof.doctor.cuda_support import numbers
from oomproof.doctor.facts import Facts
from oomproof.doctor.findings import Capability, Check, Finding, Summary
from oomproof.doctor.view import cuda_gpus

_LEAST = (8, 0)
_WHEEL = re.compile(
    r"flash_attn-[^-]*?\+cu(?P<cuda>\d+)torch(?P<torch>\d+\.\d+)cxx11abi(?P<abi>TRUE|FALSE)"
    r"-(?P<python>cp\d+)",
    re.IGNORECASE,
)
_REMEDY = "pip uninstall -y flash-attn"
"""Transformers and our engine then take torch's own kernels, which need nothing of it."""


def _mismatch(facts: Facts) -> Finding | None:
    """A wheel that was built for another torch, CUDA, C++ ABI or Python."""
    found = _WHEEL.match(facts.flash_attention_wheel or "")
    torch = facts.torch
    if found is None or torch is None or "flash-attn" not in facts.packages:
        return None
    python = "cp" + "".join(facts.system.python.split(".")[:2])
    differences = []
    if numbers(found["torch"]) != numbers(torch.version)[:2]:
        differences.append(f"torch {found['torch']} (here {torch.version})")
    built = numbers(torch.cuda_build)
    if built and int(found["cuda"][:2]) != built[0]:
        differences.append(f"CUDA {found['cuda'][:2]} (here {torch.cuda_build})")
    if torch.cxx11_abi is not None and (found["abi"].upper() == "TRUE") != torch.cxx11_abi:
        differences.append(f"the C++ ABI cxx11={found['abi']} (here {torch.cxx11_abi})")
    if found["python"] != python:
        differences.append(f"{found['python']} (here {python})")
    if not differences:
        return None
    return Finding(
        status="limited",
        detail=f"flash-attn {facts.packages['flash-attn']} was built for "
        f"{', '.join(differences)}; torch's own attention needs no such package",
        remedy=_REMEDY,
    )


def _broken(facts: Facts) -> Finding | None:
    trial = facts.flash_attention
    if trial is None or trial.works or "flash-attn" not in facts.packages:
        return None
    error = trial.error or "no reason"
    why = " (it was built for another torch)" if "undefined symbol" in error else ""
    return Finding(
        status="limited",
        detail=f"flash-attn {facts.packages['flash-attn']} cannot be imported{why}: {error}",
        remedy=_REMEDY,
    )


def _summary(facts: Facts) -> Summary:
    gpus = cuda_gpus(facts)
    if not gpus:
        return Summary(
            status="missing", detail="needs a GPU; torch's own attention is used on the CPU"
        )
    for gpu in gpus:
        if gpu.compute_capability is not None and gpu.compute_capability < _LEAST:
            return Summary(
                status="limited",
                detail=f"{gpu.name} is below compute capability 8.0; torch's memory-efficient "
                "kernel is used",
            )
    package = facts.packages.get("flash-attn")
    extra = f"; flash-attn {package} is installed too" if package else ""
    return Summary(detail=f"FlashAttention 2 in torch's SDPA{extra}")


FLASH_ATTENTION = Capability(
    name="FlashAttention",
    summary=_summary,
    checks=(
        Check(name="flash-attn-wheel", run=_mismatch),
        Check(name="flash-attn-import", run=_broken),
    ),
)
