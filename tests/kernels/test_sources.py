"""Every CUDA source that the package brings compiles for every architecture, within its limits.

A `.cu` file belongs to a `Source` in a module that oomproof.kernels.source.DECLARED_IN names; all
variants of all of them are compiled here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import oomproof
from oomproof.kernels import source
from oomproof.kernels.compiler import Compiled, compile_program
from oomproof.kernels.source import Source, Variant, declared_sources
from oomproof.units import KIB
from tests.kernels.layout import layout_checks
from tests.kernels.programs import ARCHITECTURES, SCALE, SPILL, Params, needs_nvrtc

MAX_SHARED_BYTES = 99 * KIB
"""A block's on compute capability 8.6, 8.9 and 12.0, the least of all."""
HOPPER_SHARED_BYTES = 227 * KIB
"""What sources that are for Hopper alone may have."""
FAST = {(8, 0), (9, 0), (12, 0)}
"""Compiled for each time: the oldest, the one they are made for, the newest."""
SERIALIZED = "wgmma.mma_async instructions are serialized"
"""What the assembler says of a kernel that waits for each matrix product."""


def problems_of(declared: Source, variant: Variant, capability: tuple[int, int]) -> list[str]:
    """What is wrong with a variant of a source on an architecture."""
    program = declared.program(variant)
    checks = "".join(map(layout_checks, declared.parameters))
    compiled = compile_program(replace(program, text=program.text + checks), capability)
    problems = []
    if not compiled.resources:
        problems.append(f"{program}: the assembler reports no kernel")
    most_shared_bytes = MAX_SHARED_BYTES if declared.only is None else HOPPER_SHARED_BYTES
    if SERIALIZED in compiled.log:
        problems.append(f"{program}: {SERIALIZED}")
    for kernel in compiled.resources:
        shared_bytes = kernel.static_shared_bytes + variant.shared_bytes
        name = f"{program}, {kernel.name}, compute capability {capability}"
        if kernel.spill_bytes:
            problems.append(f"{name}: spills {kernel.spill_bytes} bytes")
        if shared_bytes > most_shared_bytes:
            problems.append(f"{name}: {shared_bytes} bytes of shared memory")
    return problems


def test_every_cuda_file_is_declared_and_every_declaration_has_its_file() -> None:
    root = Path(oomproof.__file__).parent
    shipped = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.cu"))
    declared_paths = sorted(declared.path for declared in declared_sources())
    assert declared_paths == shipped, (
        f"a Source for each file, in a module of {source.DECLARED_IN} (kernels/source.py)"
    )
    for declared in declared_sources():
        assert declared.variants, f"{declared.path} declares no variant"
        assert any(map(declared.is_for, ARCHITECTURES)), f"{declared.path} is never compiled"


@needs_nvrtc
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "capability",
    [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in ARCHITECTURES],
)
def test_every_source_compiles_without_spills_within_shared_memory(
    capability: tuple[int, int],
) -> None:
    problems = [
        problem
        for declared in declared_sources()
        if declared.is_for(capability)
        for variant in declared.variants
        for problem in problems_of(declared, variant, capability)
    ]
    assert not problems, "\n".join(problems)


def test_a_log_without_the_assemblers_report_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = Compiled(image=b"", log="", resources=())
    monkeypatch.setattr(f"{__name__}.compile_program", lambda *_: silent)
    declared = declared_sources()[0]
    [problem] = problems_of(declared, declared.variants[0], (8, 0))
    assert "reports no kernel" in problem


@needs_nvrtc
@pytest.mark.parametrize(
    ("program", "shared_bytes", "problem"),
    [
        (SCALE, MAX_SHARED_BYTES - 256, None),
        (SCALE, MAX_SHARED_BYTES - 255, "bytes of shared memory"),
        (SPILL, 0, "spills"),
    ],
)
def test_the_limits_are_seen(
    program: source.Program,
    shared_bytes: int,
    problem: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in ((program.name, program.text), *program.headers.items()):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(source, "files", lambda package: tmp_path)
    source._read.cache_clear()
    variant = Variant(defines=program.defines, shared_bytes=shared_bytes)
    declared = Source(
        path=program.name,
        headers=tuple(program.headers),
        variants=(variant,),
        parameters=(Params,) if program is SCALE else (),
    )
    problems = problems_of(declared, variant, (8, 6))
    source._read.cache_clear()
    assert [problem is not None and problem in found for found in problems] == (
        [True] if problem else []
    )
