"""The table of tuned launches: kept whole, merged, and never in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from oomproof.errors import InputError
from oomproof.quantization import tuned
from oomproof.quantization.tuned import (
    MAX_FILE_BYTES,
    SCHEMA,
    Gpu,
    ProductKey,
    TunedLaunch,
    claim_file,
    own_file,
    tuned_launch,
    tuned_launches,
    write_launches,
)

GPU = Gpu(name="NVIDIA H200", capability=(9, 0))
OTHER = Gpu(name="NVIDIA GeForce RTX 4090", capability=(8, 9))
QKV = ProductKey(
    processors=132, scales="uint8", normed=True, template=1, columns=4096, tiles=384, unit=1
)
DOWN = ProductKey(
    processors=132, scales="uint8", normed=False, template=1, columns=14336, tiles=256, unit=1
)
FASTER = TunedLaunch(product=QKV, warps=8, splits=1, default_us=5.0, us=4.5)
SPLIT = TunedLaunch(product=DOWN, warps=12, splits=2, default_us=9.0, us=8.0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    tuned_launches.cache_clear()
    yield tmp_path
    tuned_launches.cache_clear()


def keep(*found: TunedLaunch, gpu: Gpu = GPU) -> Path:
    return write_launches(gpu, {entry.product for entry in found}, found, "torch 2")


def test_what_was_found_is_read_back() -> None:
    path = keep(FASTER, SPLIT)
    assert tuned_launches(GPU) == {QKV: FASTER, DOWN: SPLIT}
    assert tuned_launch(GPU, DOWN) == SPLIT
    assert tuned_launch(GPU, replace(DOWN, processors=66)) is None
    assert tuned_launches(OTHER) == {}
    plain = json.loads(path.read_text())
    assert (plain["schema"], plain["device"], plain["capability"]) == (SCHEMA, GPU.name, [9, 0])
    assert plain["versions"] == "torch 2"
    assert plain["entries"][0] == asdict(FASTER)


def test_each_kind_of_gpu_has_its_file(home: Path) -> None:
    assert own_file(GPU) == home / "tuning" / "NVIDIA-H200-9.0.json"
    assert own_file(OTHER) == home / "tuning" / "NVIDIA-GeForce-RTX-4090-8.9.json"
    sneaky = own_file(Gpu(name="../../etc/passwd \n é", capability=(9, 0)))
    assert sneaky.parent == home / "tuning"
    assert keep(FASTER) != keep(SPLIT, gpu=OTHER)
    assert set(tuned_launches(GPU)) == {QKV}
    assert set(tuned_launches(OTHER)) == {DOWN}


def test_a_later_tuning_replaces_what_it_measured_and_keeps_the_rest() -> None:
    keep(FASTER, SPLIT)
    better = replace(FASTER, warps=16, us=4.0)
    keep(better)
    assert tuned_launches(GPU) == {QKV: better, DOWN: SPLIT}
    # Where no launch was faster than the rule's, the rule holds again.
    write_launches(GPU, {DOWN}, [], "torch 2")
    assert tuned_launches(GPU) == {QKV: better}


def test_nothing_is_left_beside_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = keep(FASTER)
    before = path.read_bytes()

    def refuse(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match=r"No space left on device.*set OOMPROOF_HOME"):
        keep(SPLIT)
    assert path.read_bytes() == before
    assert list((home / "tuning").iterdir()) == [path]


def test_the_file_is_read_once_a_process() -> None:
    path = keep(FASTER)
    assert tuned_launch(GPU, QKV) == FASTER
    path.unlink()
    assert tuned_launch(GPU, QKV) == FASTER


def sound() -> dict[str, Any]:
    return json.loads(keep(FASTER).read_text())  # type: ignore[no-any-return]


def changed(**fields: Any) -> bytes:
    return json.dumps({**sound(), **fields}).encode()


def entry_with(**fields: Any) -> bytes:
    return changed(entries=[{**asdict(FASTER), **fields}])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: b"", "JSON"),
        (lambda: b"{", "JSON"),
        (lambda: b"\xff\xfe\x00", "JSON"),
        (lambda: b"[]", "JSON"),
        (lambda: b"[" * 100_000, "JSON"),
        (lambda: b" " * (MAX_FILE_BYTES + 1), "is larger than"),
        (lambda: changed(schema=2), "tuning schema 2 is not 1"),
        (lambda: changed(schema="1"), "schema: "),
        (lambda: changed(device="NVIDIA A100"), "is of 'NVIDIA A100', not of 'NVIDIA H200'"),
        (lambda: changed(capability=[9]), "capability"),
        (lambda: changed(entries=None), "entries"),
        (lambda: entry_with(warps="8"), "entries.0.warps"),
        (lambda: entry_with(warps=0), "warps 0 is not at least 1"),
        (lambda: entry_with(splits=-1), "splits -1 is not at least 1"),
        (lambda: entry_with(us=6.0), "no less than the default's"),
        (lambda: entry_with(us=float("nan")), "no less than the default's"),
        (lambda: entry_with(product={**asdict(QKV), "tiles": 0}), "tiles 0"),
        (lambda: entry_with(product={**asdict(QKV), "normed": 1}), "normed"),
    ],
)
def test_a_damaged_file_is_one_warning_and_as_good_as_none(
    make: Any, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = make()
    own_file(GPU).parent.mkdir(exist_ok=True)
    own_file(GPU).write_bytes(data)
    tuned_launches.cache_clear()
    for _ in range(2):
        assert tuned_launch(GPU, QKV) is None
    [record] = caplog.records
    message = record.getMessage()
    assert message.startswith(f"warning: {own_file(GPU)}: ")
    assert named in message
    assert "delete it, and run `oomproof bench MODEL --tune` again" in message
    assert "\n" not in message
    # Tuning mends it.
    keep(SPLIT)
    assert tuned_launches(GPU) == {DOWN: SPLIT}


def test_the_warning_is_a_line_on_stderr(home: Path) -> None:
    own_file(GPU).parent.mkdir()
    own_file(GPU).write_text("nonsense")
    script = (
        "from oomproof.quantization.tuned import *; gpu = Gpu(name='NVIDIA H200', "
        "capability=(9, 0)); print(dict(tuned_launches(gpu)), dict(tuned_launches(gpu)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OOMPROOF_HOME": str(home)},
    )
    assert done.stdout == "{} {}\n"
    assert done.stderr.startswith(f"warning: {own_file(GPU)}: JSON: ")
    assert done.stderr.count("\n") == 1


def test_a_file_that_cannot_be_read_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    own_file(GPU).mkdir(parents=True)
    assert tuned_launches(GPU) == {}
    assert "cannot be read (Is a directory)" in caplog.text
    with pytest.raises(InputError, match="cannot be written"):
        keep(FASTER)


def test_without_a_home_there_is_no_table_and_no_place_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuned, "home_folder", homeless)
    assert tuned_launches(GPU) == {}
    with pytest.raises(InputError, match="set OOMPROOF_HOME"):
        claim_file(GPU)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    home: Path,
) -> None:
    assert claim_file(GPU) == own_file(GPU)
    assert list((home / "tuning").iterdir()) == []
    (home / "tuning").rmdir()
    (home / "tuning").write_text("a file")
    with pytest.raises(InputError, match=r"cannot be written \(File exists\): set OOMPROOF_HOME"):
        claim_file(GPU)


def test_what_the_package_brings_is_read_and_ones_own_goes_before(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(FASTER, SPLIT)
    package = tmp_path / "package"
    bundled = package / "quantization" / "tuning" / own_file(GPU).name
    bundled.parent.mkdir(parents=True)
    own_file(GPU).rename(bundled)
    monkeypatch.setattr(tuned, "files", lambda _package: package)
    tuned_launches.cache_clear()
    assert tuned_launches(GPU) == {QKV: FASTER, DOWN: SPLIT}
    better = replace(FASTER, us=4.0)
    keep(better)
    assert tuned_launches(GPU) == {QKV: better, DOWN: SPLIT}
    assert json.loads(own_file(GPU).read_text())["entries"] == [asdict(better)]


def test_every_file_of_the_package_can_be_read() -> None:
    folder = Path(tuned.__file__).parent / "tuning"
    for file in folder.glob("*.json"):
        plain = json.loads(file.read_text())
        gpu = Gpu(name=plain["device"], capability=tuple(plain["capability"]))
        assert file.name == own_file(gpu).name
        assert tuned.parse_file(file.read_bytes(), file.name, gpu).entries
