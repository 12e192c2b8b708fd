"""The packages that models run and are tuned with."""

from __future__ import annotations

from dataclasses import dataclass

from oomproof.doctor.facts import Facts
from oomproof.doctor.findings import Capability, Check, Finding, Summary
from oomproof.doctor.remedies import INSTALL_RUN, install_torch, upgrade

NEEDED = ("torch", "transformers", "accelerate", "bitsandbytes")
_TUNING = ("peft",)
_WITH_NATIVE = ("triton", "cuda-bindings")
"""Judged with the native engine."""


def broken_torch(facts: Facts) -> Finding | None:
    """A torch that is installed and cannot be imported, told by what it says as it fails."""
    error = facts.torch_error
    if error is None or "torch" not in facts.packages:
        return None
    detail = f"torch {facts.packages['torch']} cannot be imported: {error}"
    if "GLIBCXX_" in error or "CXXABI_" in error:
        remedy = "conda install -c conda-forge 'libstdcxx>=14', or use a newer Linux"
    elif "GLIBC_" in error:
        remedy = "use a newer Linux (glibc 2.28 or newer), or its container"
    elif "no answer within" in error:
        remedy = "move the Python environment to a local disk, or wait for whoever keeps it busy"
    elif facts.environment.get("LD_LIBRARY_PATH") and _is_mixed_up(error):
        # What is found there is loaded in place of what torch brings.
        remedy = "unset LD_LIBRARY_PATH"
    elif "libcuda.so" in error:
        remedy = (
            "export LD_LIBRARY_PATH=/usr/lib/wsl/lib"
            if facts.system.wsl
            else "install the NVIDIA driver (https://www.nvidia.com/drivers)"
        )
    else:
        remedy = install_torch(facts)
    return Finding(status="missing", detail=detail, remedy=remedy)


def _is_mixed_up(error: str) -> bool:
    signs = ("undefined symbol", "SIGSEGV", "SIGABRT", "version `", "symbol lookup error")
    return any(sign in error for sign in signs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmet:
    """A package that is not of a version that another one takes."""

    needs: str
    detail: str
    remedy: str


def unmet_requirement(
    facts: Facts, *, of: tuple[str, ...], by: tuple[str, ...] = ()
) -> Unmet | None:
    """The first requirement that the installed packages do not meet.

    Args:
        facts: Of the machine.
        of: Packages to look at.
        by: Whose requirements count; all where empty.
    """
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import InvalidVersion, Version

    for requirement in facts.requirements:
        installed = facts.packages.get(requirement.needs)
        if installed is None or requirement.needs not in of:
            continue
        if (by and requirement.package not in by) or (not by and requirement.package in _TUNING):
            continue
        try:
            met = SpecifierSet(requirement.specifier).contains(Version(installed), prereleases=True)
        except (InvalidSpecifier, InvalidVersion):
            continue  # not ours to judge
        if not met:
            version = facts.packages.get(requirement.package, "")
            asks = f"{requirement.package} {version}".strip()
            return Unmet(
                needs=requirement.needs,
                detail=f"{asks} needs {requirement.needs}{requirement.specifier}, "
                f"installed is {installed}",
                remedy=upgrade(requirement.needs, requirement.specifier),
            )
    return None


def _absent(facts: Facts) -> Finding | None:
    absent = [name for name in NEEDED if name not in facts.packages]
    if not absent:
        return None
    return Finding(
        status="missing", detail=f"not installed: {', '.join(absent)}", remedy=INSTALL_RUN
    )


def _versions(facts: Facts) -> Finding | None:
    watched = tuple(name for name in facts.packages if name not in (*_WITH_NATIVE, *_TUNING))
    unmet = unmet_requirement(facts, of=watched)
    if unmet is None:
        return None
    remedy = install_torch(facts) if unmet.needs == "torch" else unmet.remedy
    return Finding(status="missing", detail=unmet.detail, remedy=remedy)


def _tuning_versions(facts: Facts) -> Finding | None:
    unmet = unmet_requirement(facts, of=_TUNING) or unmet_requirement(
        facts, of=tuple(facts.packages), by=_TUNING
    )
    if unmet is None or any(name not in facts.packages for name in _TUNING):
        return None
    return Finding(status="missing", detail=unmet.detail, remedy=unmet.remedy)


def _four_bit_for_tuning(facts: Facts) -> Finding | None:
    if "peft" not in facts.packages or facts.four_bit is None or facts.four_bit.works:
        return None
    return Finding(
        status="limited",
        detail="QLoRA needs 4-bit products, which do not work here; LoRA in 16 bits does",
        remedy="mend 4-bit, as said there",
    )


def _run_summary(facts: Facts) -> Summary:
    return Summary(detail=", ".join(f"{name} {facts.packages.get(name)}" for name in NEEDED))


def _tuning_summary(facts: Facts) -> Summary:
    absent = [name for name in _TUNING if name not in facts.packages]
    if absent:
        return Summary(
            status="missing",
            detail=f"not installed: {', '.join(absent)}",
            remedy=f"pip install {' '.join(absent)}",
        )
    return Summary(detail=", ".join(f"{name} {facts.packages[name]}" for name in _TUNING))


RUN_MODELS = Capability(
    name="run models",
    required=lambda _facts: True,
    summary=_run_summary,
    checks=(
        Check(name="packages", run=_absent),
        Check(name="torch-import", run=broken_torch),
        Check(name="package-versions", run=_versions),
    ),
)
FINE_TUNING = Capability(
    name="fine-tuning",
    summary=_tuning_summary,
    checks=(
        Check(name="tuning-versions", run=_tuning_versions),
        Check(name="tuning-4-bit", run=_four_bit_for_tuning),
    ),
)
