"""`oomproof quantize`: every mistake is one line, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from oomproof.models.resolve import bundled_folder
from tests.cli.invoke import invoke


def test_a_model_is_written_and_told_in_a_line(tmp_path: Path) -> None:
    done = invoke("quantize", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu")
    assert done.code == 0, done.err
    sizes = "7.32 MiB of weights → 3.56 MiB in nf4-dq and bfloat16"
    assert f"{sizes}, block scales searched, 8 files" in done.out
    assert done.out.count("\n") == 1
    again = invoke("quantize", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu", "--json")
    found = json.loads(again.out)
    assert (found["resumed_files"], found["files"], found["format"]) == (1, 8, "nf4-dq")
    assert "[it was there already, whole: nothing was written]" in again.err


def test_the_folder_is_told_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("quantize", "tiny", "--out", "out", "--device", "cpu")
    assert done.out.startswith("out: 7.32 MiB of weights")


@pytest.mark.parametrize(("flag", "word"), [("--search", "searched"), ("--no-search", "absmax")])
def test_block_scales_are_searched_or_not(flag: str, word: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert f"block scales {word}" in invoke("quantize", "tiny", "--out", out, flag).out
    assert word in (tmp_path / "out" / "config.json").read_text()


def test_a_folder_is_verified(tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke("quantize", "tiny", "--out", str(out), "--device", "cpu")
    assert invoke("quantize", str(out), "--verify").out == "7 files are as written\n"
    assert json.loads(invoke("quantize", str(out), "--verify", "--json").out) == {"files": 7}
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    assert (
        f"{out / 'model.safetensors'}: has sha256" in invoke("quantize", str(out), "--verify").error
    )
    assert (
        "has no oomproof-manifest.json"
        in invoke("quantize", str(bundled_folder()), "--verify").error
    )
    assert "--verify writes nothing" in invoke("quantize", str(out), "--verify", "--out", "x").error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "--out is missing: give the folder to make: --out DIR"),
        (["tiny", "--out", "{out}", "--format", "int4"], "int4 is not written to disk, only bits"),
        (
            ["tiny", "--out", "{out}", "--format", "q4_k"],
            "format 'q4_k' is unknown: use one of nf4",
        ),
        (["tiny", "--out", "{out}", "--dtype", "int8"], "unknown dtype 'int8'"),
        (
            ["tiny", "--out", "{out}", "--device", "tpu"],
            "device 'tpu' is unknown: use auto, cpu, c",
        ),
        (["tiny", "--out", "{out}", "--device", "cuda:99"], "device 'cuda:99' is not here: this"),
        (["tiny", "--out", "{out}", "--device", "cuda:-1"], "device 'cuda:-1' is unknown"),
        (["tiny", "--out", "{out}", "--shard", "12"], "shard '12' is less than 1.00 MiB: leave"),
        (["tiny", "--out", "{out}", "--shard", "big"], "shard"),
        (["tiny", "--out", "/"], "--out / names no folder to make"),
        (["tiny", "--out", "/proc/nothing/x"], "/proc/nothing: cannot be written"),
        (["nobody-has-this", "--out", "{out}"], "'nobody-has-this' is no folder here"),
        (["llama-3.1-8b", "--out", "{out}"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    out = str(tmp_path / "out")
    error = invoke("quantize", *(one.format(out=out) for one in arguments)).error
    assert message in error
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    with patch("oomproof.conversion.writing.load_checkpoint", side_effect=KeyboardInterrupt):
        ended = invoke("quantize", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu")
    assert (ended.code, ended.out) == (130, "")
    assert "are kept: the same command goes on" in ended.err
    assert not (tmp_path / "out").exists()
    assert invoke("quantize", "tiny", "--out", str(tmp_path / "out")).code == 0
