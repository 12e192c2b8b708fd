"""Which CUDA runs on which driver and GPU, and which builds of torch there are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Version = tuple[int, ...]
Capability = tuple[int, int]

_ARCHITECTURE = re.compile(
    r"(?P<kind>sm|compute)_(?P<major>\d{1,2})(?P<minor>\d)(?P<suffix>[af]?)", re.ASCII
)
_NUMBERS = re.compile(r"\d{1,9}(?:\.\d{1,9}){0,3}", re.ASCII)

_TEGRA: frozenset[Capability] = frozenset({(5, 3), (6, 2), (7, 2)})
"""Boards whose GPUs run only what was built for exactly them. Orin (8.7) runs what was built for
8.0: bitsandbytes#1939 measured it."""

MIN_DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA's major version → first driver branch that runs all of it ("CUDA compatibility", minor
version compatibility)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchWheels:
    """One of the folders of download.pytorch.org/whl."""

    tag: str
    cuda: tuple[int, int]
    x86: tuple[Capability, ...]
    """What its kernels are built for, on Linux and Windows."""
    arm: tuple[Capability, ...]


_TURING_ON: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))
_SERVER_ARM: tuple[Capability, ...] = ((8, 0), (9, 0), (10, 0), (11, 0), (12, 0))

TORCH_WHEELS = (
    # As torch's RELEASE.md has them for 2.10 to 2.14; cu128 ends with 2.11.
    TorchWheels(
        tag="cu126",
        cuda=(12, 6),
        x86=((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0)),
        arm=((8, 0), (9, 0)),
    ),
    TorchWheels(tag="cu128", cuda=(12, 8), x86=_TURING_ON, arm=((8, 0), (9, 0), (10, 0), (12, 0))),
    TorchWheels(tag="cu130", cuda=(13, 0), x86=_TURING_ON, arm=_SERVER_ARM),
    TorchWheels(tag="cu132", cuda=(13, 2), x86=_TURING_ON, arm=_SERVER_ARM),
)


def numbers(text: str | None) -> Version:
    """The leading numbers of a version: "2.10.0+cu128" → (2, 10, 0); empty where there are none."""
    found = _NUMBERS.match(text or "")
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def best_wheels(
    driver_cuda: str | None, capabilities: Iterable[Capability], *, machine: str
) -> TorchWheels | None:
    """The newest build of torch that a driver and every GPU run; None where there is none.

    Builds for a CUDA that the driver knows come first; those of its major version work, too.

    Args:
        driver_cuda: Newest CUDA that the driver supports; None or unreadable: any.
        capabilities: Of the GPUs; unknown ones are left out.
        machine: Processor: "x86_64", "aarch64".
    """
    driver, wanted = numbers(driver_cuda)[:2], tuple(capabilities)
    arm = machine.casefold() in ("aarch64", "arm64")
    able = [
        wheels
        for wheels in TORCH_WHEELS
        if (not driver or wheels.cuda[0] <= driver[0])
        and all(
            any(binary_runs(built, gpu) for built in (wheels.arm if arm else wheels.x86))
            for gpu in wanted
        )
    ]
    known = [wheels for wheels in able if not driver or wheels.cuda <= driver]
    if known:
        return known[-1]
    return able[0] if able else None


def binary_runs(built: Capability, gpu: Capability) -> bool:
    """Whether machine code for one compute capability runs on a GPU of another.

    From its own minor version on, within its major version (CUDA programming guide, "Binary
    compatibility").
    """
    if gpu in _TEGRA or built in _TEGRA:
        return built == gpu
    return built[0] == gpu[0] and built[1] <= gpu[1]


def has_kernels(architectures: Sequence[str], gpu: Capability | None) -> str | None:
    """How kernels built for "sm_90", "compute_120", … run on a GPU.

    Text of PTX ("compute_…") is compiled by the driver for every later GPU; a suffix, as in
    "sm_90a", ties a target to exactly that GPU.

    Returns:
        "binary", "ptx", or None where they do not. Where either side is unknown: "binary".
    """
    if gpu is None or not architectures:
        return "binary"
    through_ptx = False
    for architecture in architectures:
        found = _ARCHITECTURE.fullmatch(architecture)
        if found is None:
            continue
        target = (int(found["major"]), int(found["minor"]))
        if found["suffix"]:
            if target == gpu:
                return "binary"
        elif found["kind"] == "compute":
            through_ptx = through_ptx or target <= gpu
        elif binary_runs(target, gpu):
            return "binary"
    return "ptx" if through_ptx else None
