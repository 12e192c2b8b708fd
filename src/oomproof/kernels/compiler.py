"""CUDA C++ text to machine code of a GPU, through NVRTC.

NVRTC comes with torch's CUDA builds (nvidia-cuda-nvrtc) and needs neither a toolkit, a C compiler
nor a GPU. It runs without the interpreter's lock, so threads compile at the same time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from oomproof.errors import KernelCompileError, MissingDependencyError, NotRunnableError
from oomproof.kernels.source import Program

OPTIONS = ("--std=c++17", "-default-device", "--ptxas-options=-v")
"""What every program is compiled with; the last writes what a kernel uses into the log."""
_NO_CACHE = "--no-cache"
"""What NVRTC kept of an earlier compilation may come without the assembler's report; what is to be
kept, cache.py keeps."""
_CACHING_NVRTC = (12, 9)
_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelResources:
    """What a thread and a block of a kernel use, as the assembler counts it."""

    name: str
    registers: int
    """A thread's."""
    stack_bytes: int
    """A thread's; arrays that are indexed by what is known only at run time lie there."""
    spill_bytes: int
    """Stores and loads of registers that did not fit, a thread's."""
    static_shared_bytes: int
    """A block's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What NVRTC makes of a program."""

    image: bytes
    """A cubin; or PTX, closed with a zero, for a GPU that is newer than NVRTC."""
    log: str
    resources: tuple[KernelResources, ...]
    """One a kernel; none for PTX, whose registers the driver will assign."""


def compile_program(program: Program, capability: tuple[int, int]) -> Compiled:
    """Machine code for GPUs of a compute capability.

    Raises:
        KernelCompileError: NVRTC refuses the text.
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
        NotRunnableError: NVRTC knows no architecture that such a GPU runs, or the program is for
            another one.
    """
    nvrtc = _nvrtc()
    target = target_of(program, capability, _supported(nvrtc))
    options = [f"--gpu-architecture={target}", *compile_options(program)]
    # Older ones keep nothing, and refuse the option.
    if _done(nvrtc.nvrtcVersion()) >= _CACHING_NVRTC:
        options.append(_NO_CACHE)
    headers = sorted(program.headers.items())
    made = _done(
        nvrtc.nvrtcCreateProgram(
            program.text.encode(),
            program.name.encode(),
            len(headers),
            [text.encode() for _, text in headers],
            [name.encode() for name, _ in headers],
        )
    )
    try:
        # What else fails than the program itself is told by the log, too: a wrong option, a limit.
        [result] = nvrtc.nvrtcCompileProgram(made, len(options), [o.encode() for o in options])
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, made)
        readable = log.rstrip(b"\0 \n").decode(errors="replace")
        if int(result) != 0:
            raise KernelCompileError(f"{program} for {target}", readable or str(result.name))
        if target.startswith("compute_"):
            image = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, made)
        else:
            image = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, made)
    finally:
        nvrtc.nvrtcDestroyProgram(made)
    return Compiled(image=image, log=readable, resources=read_resources(readable))


def compile_options(program: Program) -> tuple[str, ...]:
    """The options of a program, without its architecture."""
    defines = sorted(program.defines.items())
    return *OPTIONS, *(f"--define-macro={name}={value}" for name, value in defines)


def target_of(program: Program, capability: tuple[int, int], supported: Sequence[int]) -> str:
    """What NVRTC is asked for: see `architecture`; or the only one that the program is for.

    Raises:
        NotRunnableError: NVRTC knows no architecture that such a GPU runs, or the program is for
            another one.
    """
    if program.only is None:
        return architecture(capability, supported)
    if program.only.capability != capability:
        raise NotRunnableError(
            f"{program} is for {program.only.target}, not for compute capability "
            f"{capability[0]}.{capability[1]}",
            remedy="report it",
        )
    # An NVRTC that does not know it refuses the option by its name.
    return program.only.target


def architecture(capability: tuple[int, int], supported: Sequence[int]) -> str:
    """What NVRTC is asked for: the GPU's own machine code, else PTX that its driver compiles.

    Args:
        capability: The GPU's compute capability.
        supported: Architectures that NVRTC knows: 90 for compute capability 9.0.

    Raises:
        NotRunnableError: The GPU is older than all that NVRTC knows.
    """
    number = 10 * capability[0] + capability[1]
    if number in supported:
        return f"sm_{number}"
    older = [known for known in supported if known < number]
    if not older:
        oldest = divmod(min(supported), 10)
        raise NotRunnableError(
            f"compute capability {capability[0]}.{capability[1]} is below {oldest[0]}.{oldest[1]}, "
            "the oldest that the installed NVRTC compiles for",
            remedy="use --engine transformers, or a newer GPU",
        )
    return f"compute_{max(older)}"


def read_resources(log: str) -> tuple[KernelResources, ...]:
    """What `--ptxas-options=-v` wrote into a log, one value a kernel."""
    _, *parts = _ENTRY.split(log)
    found = []
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        # Functions that were not inlined have lines of their own below the kernel's.
        registers, spills = _REGISTERS.search(text), _SPILLS.findall(text)
        assert registers is not None, f"the assembler's report of {name} reads otherwise: {text}"
        shared = _SHARED.search(text)
        found.append(
            KernelResources(
                name=name,
                registers=int(registers[1]),
                stack_bytes=sum(int(stack) for stack, _, _ in spills),
                spill_bytes=sum(int(stores) + int(loads) for _, stores, loads in spills),
                static_shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return tuple(found)


def nvrtc_version() -> str:
    """Version of NVRTC as it says it: "13.0".

    Raises:
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
    """
    major, minor = _done(_nvrtc().nvrtcVersion())
    return f"{major}.{minor}"


def nvrtc_architectures() -> tuple[int, ...]:
    """What NVRTC compiles for: 90 is compute capability 9.0.

    Raises:
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
    """
    return _supported(_nvrtc())


def installed_nvrtc() -> str:
    """What a kept cubin was made with, down to the patch and without loading NVRTC where possible.

    Raises:
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
    """
    found = []
    for wheel in _WHEELS:
        try:
            found.append(f"{wheel} {metadata.version(wheel)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found) or f"nvrtc {nvrtc_version()}"


def nvrtc_wheel(bindings_version: str) -> str:
    """The package with the NVRTC that a version of cuda-bindings loads."""
    return _WHEELS[1] if bindings_version.startswith("12.") else _WHEELS[0]


def _nvrtc() -> Any:
    """cuda.bindings.nvrtc, with the library behind it loaded."""
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise MissingDependencyError(
            "cuda-bindings", install="pip install 'oomproof[run]'"
        ) from None
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        # Its own words are a page of folders that were searched.
        wheel = nvrtc_wheel(metadata.version("cuda-bindings"))
        raise MissingDependencyError("NVRTC", install=f"pip install {wheel}") from None
    return nvrtc


def _supported(nvrtc: Any) -> tuple[int, ...]:
    return tuple(_done(nvrtc.nvrtcGetSupportedArchs()))


def _text(size_of: Any, read: Any, program: Any) -> bytes:
    """One of NVRTC's outputs, which it writes into memory that it is given."""
    # Not bytes, though the binding takes them: Python shares the bytes of length one, and an empty
    # log is written into one.
    memory = bytearray(_done(size_of(program)))
    _done(read(program, memory))
    return bytes(memory)


def _done(answer: tuple[Any, ...]) -> Any:
    """The values of a call that went well."""
    result, *values = answer
    if int(result) != 0:
        raise KernelCompileError("NVRTC", str(result.name))
    return values[0] if len(values) == 1 else tuple(values)
