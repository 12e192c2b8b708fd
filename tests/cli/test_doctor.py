"""`oomproof doctor`: verdicts as a table or as JSON, and an exit code that a script can use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from oomproof.doctor.checks import CAPABILITIES
from oomproof.doctor.facts import Facts, ProbeFacts, from_plain
from tests.cli.invoke import invoke
from tests.doctor.machines import H200, broken_torch


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    facts: Facts = request.param
    monkeypatch.setattr("oomproof.doctor.gather.gather", lambda: facts)


BARE = replace(H200, packages={}, torch=None, four_bit=None, eight_bit=None)
BRACKETS = broken_torch("undefined symbol [bold]x[/bold]")
SLOW = replace(
    H200, probes=(ProbeFacts(name="cache", seconds=3.0, problem="no answer within 3 s"),)
)


@pytest.mark.parametrize("machine", [H200], indirect=True)
@pytest.mark.usefixtures("machine")
def test_a_good_machine_is_exit_code_0() -> None:
    done = invoke("doctor")
    assert (done.code, done.err) == (0, "")
    for capability in CAPABILITIES:
        assert capability.name in done.out


@pytest.mark.parametrize("machine", [BARE], indirect=True)
@pytest.mark.usefixtures("machine")
def test_what_run_needs_and_lacks_is_exit_code_1_with_the_remedy() -> None:
    done = invoke("doctor")
    assert (done.code, done.err) == (1, "")
    assert "pip install 'oomproof[run]'" in done.out


@pytest.mark.parametrize("machine", [H200, BARE], indirect=True)
@pytest.mark.usefixtures("machine")
def test_json_has_verdicts_and_facts_and_whether_all_is_well() -> None:
    done = invoke("doctor", "--json")
    answer = json.loads(done.out)
    assert done.err == ""
    assert set(answer) == {"schema", "ok", "verdicts", "facts"}
    assert answer["schema"] == 1
    verdicts = answer["verdicts"]
    assert {verdict["status"] for verdict in verdicts} <= {"ok", "limited", "missing"}
    failed = any(v["required"] and v["status"] == "missing" for v in verdicts)
    assert done.code == int(failed)
    assert answer["ok"] is not failed
    assert from_plain(answer["facts"]) in (H200, BARE)


@pytest.mark.parametrize("machine", [BRACKETS], indirect=True)
@pytest.mark.usefixtures("machine")
def test_a_finding_with_brackets_is_printed_as_it_is() -> None:
    assert "[bold]x[/bold]" in invoke("doctor").out


@pytest.mark.parametrize("machine", [SLOW], indirect=True)
@pytest.mark.usefixtures("machine")
def test_what_could_not_be_asked_is_said_on_stderr() -> None:
    done = invoke("doctor")
    assert (done.code, done.err) == (0, "not known: cache, no answer within 3 s (3.0 s)\n")


def test_this_machine_gets_its_verdicts() -> None:
    assert len(json.loads(invoke("doctor", "--json").out)["verdicts"]) == len(CAPABILITIES)


@pytest.mark.parametrize("machine", [BARE], indirect=True)
@pytest.mark.usefixtures("machine")
def test_facts_of_one_machine_are_judged_on_another(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    first = invoke("doctor", "--json")
    file.write_text(first.out, encoding="utf-8")
    assert invoke("doctor", "--facts", str(file), "--json") == first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"facts": {}}', "[" * 100_000, "\x00"])
def test_a_file_that_has_no_facts_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "facts.json"
    file.write_text(text, encoding="utf-8")
    assert "doctor --json" in invoke("doctor", "--facts", str(file)).error


def test_a_file_that_is_not_there_is_refused_in_a_line(tmp_path: Path) -> None:
    assert "cannot read" in invoke("doctor", "--facts", str(tmp_path / "none.json")).error
