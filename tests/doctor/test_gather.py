"""Gathering: what fails, crashes or hangs becomes a fact, in bounded time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oomproof.doctor import gather as gather_module
from oomproof.doctor.checks import check_all
from oomproof.doctor.facts import TrialFacts
from oomproof.doctor.gather import Child, Gathering, gather
from oomproof.doctor.probes import local


def _write(folder: Path, text: str) -> Path:
    (folder / "torch.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a torch of its own before the real one."""

    def put(text: str) -> None:
        source = str(Path(local.__file__).parents[3])
        monkeypatch.setenv("PYTHONPATH", f"{_write(tmp_path, text)}:{source}")

    return put


def test_the_facts_of_this_machine_are_gathered() -> None:
    facts = gather()
    assert facts.host is not None
    assert facts.torch is not None
    assert facts.packages["torch"] == facts.torch.version
    assert facts.four_bit == facts.eight_bit == TrialFacts(works=True)
    assert facts.cache is not None
    assert facts.requirements
    assert all(probe.problem is None for probe in facts.probes), facts.probes
    ok = {verdict.capability for verdict in check_all(facts) if verdict.status == "ok"}
    assert ok >= {"run models", "memory", "4-bit", "8-bit"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os; os.kill(os.getpid(), 11)", "the process died of SIGSEGV"),
        ("import os; os._exit(3)", "the process ended with 3"),
        ("raise SystemExit('no licence')", "no licence"),
        ('print(\'{"stage": "torch", "answer": {}}\')', "has no attribute"),
    ],
    ids=["a missing library", "a crash", "an end", "an exit", "a liar"],
)
def test_a_torch_that_cannot_be_imported_is_a_fact(
    shadow: Callable[[str], None], text: str, error: str
) -> None:
    shadow(text)
    facts = gather()
    assert facts.torch is None
    assert facts.torch_error is not None
    assert error in facts.torch_error
    assert facts.four_bit is None
    assert facts.host is not None
    assert next(v for v in check_all(facts) if v.capability == "run models").status == "missing"


def test_a_torch_that_hangs_is_left_when_its_time_is_over(shadow: Callable[[str], None]) -> None:
    shadow("import time; time.sleep(60)")
    began_s = time.monotonic()
    facts = gather(torch_limit_s=1.0)
    assert time.monotonic() - began_s < 6
    assert facts.torch_error == "no answer within 1 s"
    [problem] = [probe.problem for probe in facts.probes if probe.name == "torch"]
    assert problem == "no answer within 1 s"


def test_a_crash_is_laid_to_the_stage_that_was_under_way(shadow: Callable[[str], None]) -> None:
    shadow("import sys; sys.stdout.write('talk')")
    child = Child("torch", ["triton", "torch"], limit_s=30)
    done = Gathering()
    child.finish(done)
    assert "torch" in done.errors
    assert "triton" not in done.errors


@pytest.mark.parametrize("error", [OSError("stale NFS handle"), ValueError("odd"), KeyError("x")])
def test_a_probe_that_fails_leaves_its_fact_unknown(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> None:
        raise error

    done = Gathering()
    assert done.locally("cache", fail) is None
    assert done.runs[0].problem
    monkeypatch.setattr(local, "read_cache", fail)
    monkeypatch.setattr(gather_module, "_torch_stages", lambda _packages: [])
    facts = gather()
    assert facts.cache is None
    downloads = next(v for v in check_all(facts) if v.capability == "downloads")
    assert downloads.status == "limited"


def test_judging_and_gathering_import_no_torch_here() -> None:
    code = (
        "import sys, oomproof.doctor.checks, oomproof.doctor.gather, oomproof.cli.doctor;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_probe_that_hangs_is_left_behind() -> None:
    done = Gathering()
    began_s = time.monotonic()
    assert done.locally("cache", lambda: time.sleep(30), limit_s=0.2) is None
    assert time.monotonic() - began_s < 2
    assert done.runs[0].problem == "no answer within 0.2 s"


def test_without_a_python_to_start_nothing_is_known_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    facts = gather()
    assert facts.torch is None
    assert facts.torch_error == "[Errno 2] No such file or directory: '/nowhere/python'"
    assert facts.packages


def test_an_answer_that_makes_no_sense_is_no_fact() -> None:
    done = Gathering()
    done.answers["four_bit"] = {"works": "perhaps"}
    assert done.trial("four_bit") is None
    assert "works" in done.errors["four_bit"]
