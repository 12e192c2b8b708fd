"""The command itself: help, version, exit codes, and how errors of any command end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oomproof import __version__, session
from oomproof.errors import (
    InputError,
    MissingDependencyError,
    NotRunnableError,
    OomproofError,
    PlanDoesNotFitError,
)
from tests.cli.invoke import invoke

HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes", "numpy", "huggingface_hub")


def test_the_version_goes_to_stdout() -> None:
    done = invoke("--version")
    assert (done.code, done.out, done.err) == (0, f"oomproof {__version__}\n", "")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_command(option: str) -> None:
    done = invoke(option)
    assert (done.code, done.err) == (0, "")
    for command in ("plan", "run", "chat", "doctor"):
        assert command in done.out
        assert invoke(command, option).code == 0


def test_no_command_shows_the_help() -> None:
    assert "Usage" in invoke().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("nope",),
        ("--nope",),
        ("plan",),
        ("plan", "tiny", "--nope"),
        ("plan", "tiny", "--temperature"),
        ("run", "tiny", "hi", "--seed", "x"),
        ("run", "tiny", "hi", "--temperature", "hot"),
        ("run", "tiny", "hi", "there"),
        ("chat",),
        ("doctor", "tiny"),
    ],
    ids=" ".join,
)
def test_a_command_line_that_cannot_be_parsed_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = invoke(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Usage" in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("wrong", remedy="mend it"), 1),
        (NotRunnableError("no engine"), 1),
        (MissingDependencyError("torch", install="pip install x"), 1),
        (PlanDoesNotFitError("too large", shortfall_bytes=5), 3),
    ],
)
def test_each_error_is_one_line_and_its_exit_code(
    error: OomproofError, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(session, "plan", fail)
    done = invoke("plan", "tiny")
    assert (done.code, done.out, done.err) == (code, "", f"error: {error}\n")


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "plan", interrupt)
    done = invoke("plan", "tiny")
    assert done.code == 130
    assert "Traceback" not in done.err


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    script = "from oomproof.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "plan", "llama-3.1-8b", "--gpus", "1x24GiB", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 1
    assert said == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_under_the_output_is_one_line() -> None:
    script = "from oomproof.cli.main import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script, "plan", "tiny", "--gpus", "1x24GiB"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    said = "error: the output cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_what_an_encoding_lacks_becomes_a_question_mark() -> None:
    script = "from oomproof.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "tiny", "--gpus", "1x24GiB"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "parameters ? bf16" in done.stdout


def test_planning_and_its_errors_import_nothing_heavy(tmp_path: Path) -> None:
    script = f"""
import sys
import oomproof
assert not [name for name in {HEAVY!r} if name in sys.modules], "by importing oomproof"
from oomproof.cli.main import main
for arguments in (["plan", "tiny"], ["plan", {str(tmp_path)!r}], ["run", "tiny", " "], ["-h"]):
    sys.argv = ["oomproof", *arguments]
    try:
        main()
    except SystemExit:
        pass
    assert not [name for name in {HEAVY!r} if name in sys.modules], arguments
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
