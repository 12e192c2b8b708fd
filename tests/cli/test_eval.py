"""`oomproof eval`: a table or JSON to stdout, a report where it was asked for, mistakes at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oomproof.evaluation import run
from tests.cli.invoke import invoke

QUICK = ("--context", "32", "--tokens", "128", "--formats", "nf4,int4,fp4")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("It was a dark night, and the rain fell upon the sea. " * 20)
    return path


@pytest.fixture
def runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes computing anything a failure of the test."""

    def fail(_self: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(run.Walk, "run", fail)


def test_the_table_fits_a_terminal_and_has_every_format(text: Path) -> None:
    done = invoke("eval", "tiny", "--text", str(text), *QUICK)
    assert done.code == 0, done.err
    assert done.err == ""
    assert "…" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    for name in ("bf16", "nf4", "int4", "fp4"):
        assert f"\n {name} " in done.out


def test_long_names_leave_every_figure_whole(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("a-folder-with-quite-a-name-" + "x" * 40)
    assert invoke("quantize", "tiny", "--out", str(folder), "--device", "cpu").code == 0
    names = f"nf4-g16+search,fit:3670016,{folder}"
    done = invoke("eval", "tiny", "--text", str(text), *QUICK[:-1], names)
    assert done.code == 0, done.err
    assert "…" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\n nf4-g16+search " in done.out
    assert "\nfit:3670016: 35 linears, " in done.out


def test_json_goes_to_stdout_and_the_report_to_its_file(text: Path, tmp_path: Path) -> None:
    html = tmp_path / "eval.html"
    done = invoke("eval", "tiny", "--text", str(text), *QUICK, "--json", "--html", str(html))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [one["format"] for one in found["formats"]] == ["nf4", "int4", "fp4"]
    assert found["tokens"] == 128
    assert done.err == f"report: {html}\n"
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--formats", "nf4,nope"), "unknown format 'nope'"),
        (("--formats", "nf4,./nope"), "nope: no such folder"),
        (("--formats", "nf4", "--calibration", "x.txt"), "calibration is what fit weighs errors"),
        (("--html", "report.pdf"), "is no .html file"),
        (("--html", "no/such/folder/report.html"), "there is no folder"),
        (("--tokens", "3x"), "tokens '3x' is not a token count"),
        (("--context", "900"), "use a longer text, or --context"),
        (("--max-memory", "lots"), "is not INDEX=SIZE"),
    ],
)
def test_a_mistake_is_one_line(text: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in invoke("eval", "tiny", "--text", str(text), *arguments).error


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize("content", [b"", b"\x7fELF\0\0\0", b"\xff\xfe\xfa"])
def test_a_file_without_text_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    assert str(path) in invoke("eval", "tiny", "--text", str(path)).error


def test_too_little_memory_exits_with_3(text: Path) -> None:
    done = invoke("eval", "tiny", "--text", str(text), *QUICK, "--max-memory", "cpu=64MiB")
    assert done.code == 3
    assert done.err.startswith("error: evaluating needs ")
    assert done.err.count("\n") == 1


def test_without_a_text_the_command_line_cannot_be_parsed() -> None:
    assert invoke("eval", "tiny").code == 2


def test_a_report_that_cannot_be_written_loses_no_result(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    html = str(tmp_path / "eval.html")
    done = invoke("eval", "tiny", "--text", str(text), *QUICK, "--html", html)
    assert (done.code, done.err) == (
        1,
        f"error: html {html!r} cannot be written (No space left on device)\n",
    )
    assert "\n nf4 " in done.out


def test_names_are_shown_as_they_are_and_written_whatever_their_bytes(
    text: Path, tmp_path: Path
) -> None:
    folder, html = tmp_path / "[b]", tmp_path / "eval.html"
    strange = text.rename(tmp_path / "words\udcff")
    assert invoke("quantize", "tiny", "--out", str(folder), "--device", "cpu").code == 0
    names = (*QUICK[:-1], str(folder), "--html", str(html))
    done = invoke("eval", "tiny", "--text", str(strange), *names)
    assert done.code == 0, done.err
    assert "\n [b]/ " in done.out
    assert "words\\udcff" in html.read_text(encoding="utf-8")
