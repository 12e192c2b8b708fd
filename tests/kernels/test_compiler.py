"""NVRTC: machine code for every architecture, what a kernel uses, and errors."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest

from oomproof.errors import KernelCompileError, MissingDependencyError, NotRunnableError
from oomproof.kernels import compiler
from oomproof.kernels.compiler import (
    architecture,
    compile_program,
    installed_nvrtc,
    nvrtc_version,
    read_resources,
    target_of,
)
from oomproof.kernels.source import SM_90A, Program
from tests.kernels.programs import ARCHITECTURES, SCALE, SPILL, needs_nvrtc


@needs_nvrtc
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_architecture_gets_its_own_machine_code(capability: tuple[int, int]) -> None:
    compiled = compile_program(SCALE, capability)
    assert compiled.image.startswith(b"\x7fELF")
    [kernel] = compiled.resources
    assert (kernel.name, kernel.spill_bytes, kernel.static_shared_bytes) == ("scale", 0, 256)
    assert 0 < kernel.registers <= 255


@needs_nvrtc
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_spilled_registers_are_seen(capability: tuple[int, int]) -> None:
    [kernel] = compile_program(SPILL, capability).resources
    assert kernel.spill_bytes > 0


@needs_nvrtc
def test_a_gpu_that_nvrtc_does_not_know_gets_ptx_for_its_driver() -> None:
    compiled = compile_program(SCALE, (99, 0))
    assert b".target sm_" in compiled.image
    assert compiled.image.endswith(b"\0")
    assert compiled.resources == ()


@pytest.mark.parametrize(
    ("capability", "target"),
    [((9, 0), "sm_90"), ((12, 1), "sm_121"), ((10, 1), "compute_100"), ((13, 0), "compute_121")],
)
def test_ptx_is_of_the_newest_architecture_that_is_not_newer(
    capability: tuple[int, int], target: str
) -> None:
    assert architecture(capability, (75, 80, 90, 100, 120, 121)) == target


def test_a_gpu_that_is_too_old_is_refused_with_the_oldest_one() -> None:
    with pytest.raises(NotRunnableError, match=r"7\.0 is below 7\.5, .*--engine transformers"):
        architecture((7, 0), (75, 80))


def test_a_program_for_one_architecture_is_compiled_for_no_other() -> None:
    program = replace(SCALE, only=SM_90A)
    assert target_of(program, (9, 0), (80, 90, 100)) == "sm_90a"
    assert target_of(SCALE, (9, 0), (80, 90, 100)) == "sm_90"
    for capability in ((8, 0), (10, 0)):
        with pytest.raises(
            NotRunnableError, match=r"scale\.cu .* is for sm_90a, not for .* \d+\.0"
        ):
            target_of(program, capability, (80, 90, 100))


@needs_nvrtc
def test_instructions_of_one_architecture_need_its_program() -> None:
    text = 'extern "C" __global__ void k() { asm volatile("wgmma.fence.sync.aligned;"); }'
    program = Program(name="fence.cu", text=text, only=SM_90A)
    assert compile_program(program, (9, 0)).image.startswith(b"\x7fELF")
    with pytest.raises(KernelCompileError, match=r"fence\.cu for sm_90"):
        compile_program(replace(program, only=None), (9, 0))


@needs_nvrtc
def test_an_error_says_the_line_and_carries_the_whole_log() -> None:
    program = Program(name="bad.cu", text="\n__global__ void k() { nothing(); }", defines={"N": 3})
    with pytest.raises(KernelCompileError) as caught:
        compile_program(program, (9, 0))
    assert str(caught.value).startswith("bad.cu (N=3) for sm_90: bad.cu(2): error: identifier")
    assert "report it" in str(caught.value)
    assert "nothing();" in caught.value.log
    assert "\n" not in str(caught.value)


@needs_nvrtc
def test_a_wrong_option_is_the_compilers_error_too() -> None:
    with pytest.raises(KernelCompileError, match=r"scale\.cu"):
        compile_program(replace(SCALE, defines={"1 2": 3, "FACTOR": 1}), (9, 0))


@needs_nvrtc
def test_an_empty_log_leaves_the_interpreters_own_bytes_alone() -> None:
    compile_program(SCALE, (99, 0))
    assert bytes([32]) == b"\x20"


def test_functions_that_were_not_inlined_count_for_their_kernel() -> None:
    log = """
ptxas info    : Compiling entry function 'a' for 'sm_90'
ptxas info    : Function properties for a
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2048 bytes smem, 376 bytes cmem[0]
ptxas info    : Function properties for helper
ptxas         .     16 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Compiling entry function 'b' for 'sm_90'
ptxas info    : Function properties for b
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
    first, second = read_resources(log)
    assert (first.name, first.registers, first.stack_bytes, first.spill_bytes) == ("a", 32, 24, 15)
    assert (second.registers, second.spill_bytes, second.static_shared_bytes) == (255, 0, 0)
    assert first.static_shared_bytes == 2048


def test_without_the_bindings_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"cuda-bindings .* pip install 'oomproof"):
        nvrtc_version()


@pytest.mark.parametrize(
    ("bindings", "wheel"), [("13.0.3", "nvidia-cuda-nvrtc"), ("12.9.4", "nvidia-cuda-nvrtc-cu12")]
)
def test_without_the_library_its_package_is_named(
    bindings: str, wheel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise RuntimeError("a page of folders")

    fake = SimpleNamespace(nvrtc=SimpleNamespace(nvrtcVersion=absent))
    monkeypatch.setitem(sys.modules, "cuda.bindings", fake)
    monkeypatch.setattr(metadata, "version", lambda name: bindings)
    with pytest.raises(MissingDependencyError, match=rf"run: pip install {wheel}$"):
        nvrtc_version()


def test_the_compilers_version_is_read_without_loading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"nvidia-cuda-nvrtc": "13.0.88"}[name])
    monkeypatch.setattr(compiler, "_WHEELS", ("nvidia-cuda-nvrtc",))
    monkeypatch.setattr(compiler, "_nvrtc", lambda: pytest.fail("NVRTC was loaded"))
    assert installed_nvrtc() == "nvidia-cuda-nvrtc 13.0.88"


def test_a_toolkits_compiler_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.1")
    assert installed_nvrtc() == "nvrtc 13.1"
