"""Sources of the package: reading, variants, and structs that lie as Python packs them."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from oomproof.errors import KernelCompileError
from oomproof.kernels import source
from oomproof.kernels.compiler import compile_program
from oomproof.kernels.source import SM_90A, Source, Variant
from tests.kernels.layout import layout_checks
from tests.kernels.programs import SCALE, Params, needs_nvrtc


def test_a_program_is_a_file_with_its_headers_and_the_variants_macros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "group" / "cuda").mkdir(parents=True)
    (tmp_path / "group" / "cuda" / "a.cu").write_text('#include "b.cuh"\n')
    (tmp_path / "b.cuh").write_text("int b;\n")
    monkeypatch.setattr(source, "files", lambda package: tmp_path)
    source._read.cache_clear()
    few, many = Variant(defines={"ROWS": 1}), Variant(defines={"ROWS": 8})
    declared = Source(path="group/cuda/a.cu", headers=("b.cuh",), variants=(few, many))
    program = declared.program(many)
    source._read.cache_clear()
    assert (program.name, program.text) == ("a.cu", '#include "b.cuh"\n')
    assert program.headers == {"b.cuh": "int b;\n"}
    assert str(program) == "a.cu (ROWS=8)"
    with pytest.raises(AssertionError, match=r"does not declare Variant\(defines={'ROWS': 9}"):
        declared.program(Variant(defines={"ROWS": 9}))


def test_a_source_for_one_architecture_makes_programs_for_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.cu").write_text("int a;\n")
    monkeypatch.setattr(source, "files", lambda package: tmp_path)
    source._read.cache_clear()
    every = Source(path="a.cu", variants=(Variant(),))
    hopper = replace(every, only=SM_90A)
    assert every.program(Variant()).only is None
    assert hopper.program(Variant()).only == SM_90A
    source._read.cache_clear()
    capabilities = ((8, 0), (9, 0), (10, 0))
    assert list(map(every.is_for, capabilities)) == [True, True, True]
    assert list(map(hopper.is_for, capabilities)) == [False, True, False]


def test_parameters_are_packed_with_the_alignment_of_c() -> None:
    packed = bytes(Params(2**60 + 1, -3, 0.5, 7, (ctypes.c_int64 * 2)(11, -12), 65535))
    # A pointer, two words, a byte, 7 bytes of padding, two long longs, a short, 6 of padding.
    assert packed == struct.pack("<QifB7xqqH6x", 2**60 + 1, -3, 0.5, 7, 11, -12, 65535)


@needs_nvrtc
def test_a_struct_that_lies_as_python_packs_it_compiles() -> None:
    compile_program(replace(SCALE, text=SCALE.text + layout_checks(Params)), (9, 0))


@needs_nvrtc
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("short flag;", "short flag, more[4];", "Params has 48 bytes in Python"),
        ("int count;", "long long count;", "Params.count lies elsewhere"),
        ("int count;\n  float scale;", "float scale;\n  int count;", "Params.count lies elsewhere"),
        ("unsigned short flag", "unsigned int flag", "Params.flag lies elsewhere"),
        ("struct Params", "struct alignas(16) Params", "Params has another alignment"),
    ],
)
def test_a_struct_that_lies_otherwise_is_refused(old: str, new: str, problem: str) -> None:
    header = SCALE.headers["params.cuh"]
    assert old in header
    changed = replace(
        SCALE,
        text=SCALE.text + layout_checks(Params),
        headers={"params.cuh": header.replace(old, new)},
    )
    with pytest.raises(KernelCompileError) as caught:
        compile_program(changed, (9, 0))
    assert problem in caught.value.log
