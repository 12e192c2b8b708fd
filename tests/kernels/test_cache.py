"""Kept machine code: what names it, what is damaged, and disks that take nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from oomproof.errors import KernelCompileError
from oomproof.kernels import cache
from oomproof.kernels.cache import cache_folder, images, key_of, read_image, write_image
from oomproof.kernels.compiler import Compiled
from oomproof.kernels.source import SM_90A, Program
from tests.kernels.programs import SCALE, SPILL, needs_nvrtc

CAPABILITY = (9, 0)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that were compiled, by a compiler that answers with their name."""
    seen: list[Program] = []

    def compile_program(program: Program, capability: tuple[int, int]) -> Compiled:
        seen.append(program)
        return Compiled(image=program.name.encode(), log="", resources=())

    monkeypatch.setattr(cache, "compile_program", compile_program)
    monkeypatch.setattr(cache, "installed_nvrtc", lambda: "nvrtc 13.0")
    return seen


def test_the_second_start_compiles_nothing(compiled: list[Program], tmp_path: Path) -> None:
    first = images([SCALE, SPILL], CAPABILITY, folder=tmp_path)
    assert first == [b"scale.cu", b"spill.cu"]
    assert len(compiled) == 2
    assert images([SPILL, SCALE], CAPABILITY, folder=tmp_path) == first[::-1]
    assert len(compiled) == 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".cubin"}


def test_only_what_is_not_kept_is_compiled(compiled: list[Program], tmp_path: Path) -> None:
    images([SPILL], CAPABILITY, folder=tmp_path)
    assert images([SCALE, SPILL], CAPABILITY, folder=tmp_path) == [b"scale.cu", b"spill.cu"]
    assert [program.name for program in compiled] == ["spill.cu", "scale.cu"]


@needs_nvrtc
def test_a_second_process_does_not_load_nvrtc(tmp_path: Path) -> None:
    script = (
        "import sys; from oomproof.kernels.cache import images; "
        "from tests.kernels.programs import SCALE; "
        "[image] = images([SCALE], (9, 0)); assert image.startswith(b'\\x7fELF'); "
        "print('cuda' in sys.modules)"
    )
    environment = os.environ | {"OOMPROOF_HOME": str(tmp_path)}
    loaded = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert loaded == ["True", "False"]
    [kept] = (tmp_path / "kernels").iterdir()
    assert kept.suffix == ".cubin"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: b"",
        lambda data: data[-32:],
    ],
)
def test_a_damaged_file_is_compiled_again_and_mended(
    damage: Callable[[bytes], bytes], compiled: list[Program], tmp_path: Path
) -> None:
    images([SCALE], CAPABILITY, folder=tmp_path)
    [kept] = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert images([SCALE], CAPABILITY, folder=tmp_path) == [b"scale.cu"]
    assert len(compiled) == 2
    assert kept.read_bytes() == whole


def test_a_file_under_anothers_name_is_not_trusted(tmp_path: Path) -> None:
    write_image(tmp_path, "a" * 64, b"code")
    [kept] = tmp_path.iterdir()
    kept.rename(tmp_path / f"{'b' * 64}.cubin")
    assert read_image(tmp_path, "b" * 64) is None


def test_the_name_has_everything_that_decides_the_code() -> None:
    programs = [
        SCALE,
        replace(SCALE, text=SCALE.text + " "),
        replace(SCALE, headers={"params.cuh": ""}),
        replace(SCALE, headers={"other.cuh": SCALE.headers["params.cuh"]}),
        replace(SCALE, defines={"FACTOR": 3}),
        replace(SCALE, defines={"FACTOR": 2, "MORE": 1}),
        replace(SCALE, only=SM_90A),
    ]
    keys = {key_of(program, CAPABILITY, "nvrtc 13.0") for program in programs}
    keys |= {key_of(SCALE, (8, 0), "nvrtc 13.0"), key_of(SCALE, CAPABILITY, "nvrtc 13.1")}
    assert len(keys) == len(programs) + 2
    ordered = replace(SCALE, defines={"A": 1, "B": 2})
    other = replace(SCALE, defines={"B": 2, "A": 1})
    assert key_of(ordered, CAPABILITY, "") == key_of(other, CAPABILITY, "")


def test_a_folder_that_takes_nothing_is_no_failure(compiled: list[Program], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for folder in (blocked, blocked / "below"):
        assert images([SCALE], CAPABILITY, folder=folder) == [b"scale.cu"]
    assert blocked.read_text() == "not a folder"


def test_a_full_disk_is_no_failure_and_leaves_nothing(
    compiled: list[Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert images([SCALE], CAPABILITY, folder=tmp_path) == [b"scale.cu"]
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_compiles_in_memory(
    compiled: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache, "home_folder", homeless)
    assert cache_folder() is None
    assert images([SCALE], CAPABILITY) == [b"scale.cu"]


def test_the_folder_stays_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_CACHE_BYTES", 1000)
    keys = [character * 64 for character in "abcdefgh"]
    for age, key in enumerate(keys):
        write_image(tmp_path, key, bytes(200 - 32))
        path = tmp_path / f"{key}.cubin"
        if path.exists():
            os.utime(path, (age, age))
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert sum(sizes) <= 1000
    assert read_image(tmp_path, keys[-1]) is not None
    assert read_image(tmp_path, keys[0]) is None


def test_an_error_of_one_program_is_everybodys(
    compiled: list[Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(program: Program, capability: tuple[int, int]) -> Compiled:
        raise KernelCompileError(program.name, "x.cu(1): error: no")

    monkeypatch.setattr(cache, "compile_program", refuse)
    with pytest.raises(KernelCompileError, match="error: no"):
        images([SCALE, SPILL], CAPABILITY, folder=tmp_path)
