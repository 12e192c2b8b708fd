"""CUDA C++ sources that the package brings, and the variants that each is compiled in.

A kernel is `extern "C"`, and what would be a template argument is a macro: a variant is one
compilation with its own macros. So a cubin holds one variant and no name needs demangling; a start
compiles, or reads, the few that its model needs.

A source is declared beside the code that launches it, with all of its variants:

    ATTEND = Source(
        path="engine/native/cuda/attend.cu",
        headers=("kernels/cuda/primitives.cuh",),
        variants=tuple(variant(head_dim) for head_dim in (64, 128)),
        parameters=(Params,),
    )

and the module that declares it is named in DECLARED_IN. A test compiles every variant for every
architecture (or for the `only` one), and fails on spilled registers, on too much shared memory, on
parameters that Python packs otherwise than CUDA reads them, and on a `.cu` file that nobody
declares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.resources import files

DECLARED_IN = (
    "oomproof.engine.native.attend_cuda",
    "oomproof.engine.native.norm_cuda",
    "oomproof.quantization.dequantize_cuda",
    "oomproof.quantization.gate_cuda",
    "oomproof.quantization.product_4bit",
    "oomproof.quantization.product_4bit_wide",
)
"""Modules that declare sources. Names, for they are imported by nobody who only plans."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One with instructions that neither older nor newer GPUs have."""

    target: str
    """As the compiler calls it: "sm_90a"."""
    capability: tuple[int, int]
    """Compute capability of the GPUs that run it."""


SM_90A = Architecture(target="sm_90a", capability=(9, 0))
"""Hopper, with warpgroups' matrix products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """One text for the compiler."""

    name: str
    """How messages of the compiler call it: "attend.cu"."""
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """Name in `#include "name"` → text; there are no others, not even CUDA's own."""
    defines: Mapping[str, int | str] = field(default_factory=dict)
    """Macro → value."""
    only: Architecture | None = None
    """The one architecture that it is for; None for all."""

    def __str__(self) -> str:
        defines = ", ".join(f"{name}={value}" for name, value in sorted(self.defines.items()))
        return f"{self.name} ({defines})" if defines else self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way in which a source is compiled."""

    defines: Mapping[str, int | str] = field(default_factory=dict)
    """Macro → value."""
    shared_bytes: int = 0
    """The most dynamic shared memory that a launch of it asks for, a block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A `.cu` file of the package."""

    path: str
    """Below `oomproof/`: "engine/native/cuda/attend.cu"."""
    headers: tuple[str, ...] = ()
    """Files that it includes by their last name, below `oomproof/` too."""
    variants: tuple[Variant, ...]
    """Every variant that is ever launched."""
    parameters: tuple[type[ctypes.Structure], ...] = ()
    """Kernel parameters, each named as its struct and its fields in the source."""
    only: Architecture | None = None
    """The one architecture that it is for; None for all."""

    def is_for(self, capability: tuple[int, int]) -> bool:
        """Whether it is compiled for GPUs of a compute capability."""
        return self.only is None or self.only.capability == capability

    def program(self, variant: Variant) -> Program:
        """What the compiler is given for one of the variants."""
        assert variant in self.variants, f"{self.path} does not declare {variant}"
        return Program(
            name=_last(self.path),
            text=_read(self.path),
            headers={_last(header): _read(header) for header in self.headers},
            defines=variant.defines,
            only=self.only,
        )


def declared_sources() -> tuple[Source, ...]:
    """Every source of the package; imports the modules that declare them."""
    modules = [import_module(name) for name in DECLARED_IN]
    return tuple(
        value for module in modules for value in vars(module).values() if isinstance(value, Source)
    )


def _last(path: str) -> str:
    return path.rpartition("/")[2]


@cache
def _read(path: str) -> str:
    return files("oomproof").joinpath(path).read_text(encoding="utf-8")
