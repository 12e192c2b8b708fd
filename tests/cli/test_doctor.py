"""`oomproof doctor`: verdicts as a table or as JSON, and an exit code that a script can use."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from oomproof.doctor.checks import CHECKS
from oomproof.doctor.facts import Facts
from tests.cli.invoke import invoke
from tests.doctor.test_checks import GOOD


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    facts: Facts = request.param
    monkeypatch.setattr("oomproof.doctor.facts.gather", lambda: facts)


BARE = replace(GOOD, packages={}, torch=None, bitsandbytes_works=False)
BRACKETS = replace(GOOD, torch=None, torch_error="undefined symbol [bold]x[/bold]")


@pytest.mark.parametrize("machine", [GOOD], indirect=True)
@pytest.mark.usefixtures("machine")
def test_a_good_machine_is_exit_code_0() -> None:
    done = invoke("doctor")
    assert (done.code, done.err) == (0, "")
    assert "FlashAttention" in done.out


@pytest.mark.parametrize("machine", [BARE], indirect=True)
@pytest.mark.usefixtures("machine")
def test_what_run_needs_and_lacks_is_exit_code_1_with_the_remedy() -> None:
    done = invoke("doctor")
    assert (done.code, done.err) == (1, "")
    assert "pip install 'oomproof[run]'" in done.out


@pytest.mark.parametrize("machine", [GOOD, BARE], indirect=True)
@pytest.mark.usefixtures("machine")
def test_json_is_the_verdicts_and_nothing_else() -> None:
    done = invoke("doctor", "--json")
    verdicts = json.loads(done.out)
    assert done.err == ""
    assert {verdict["status"] for verdict in verdicts} <= {"ok", "limited", "missing"}
    failed = any(v["required"] and v["status"] == "missing" for v in verdicts)
    assert done.code == int(failed)


@pytest.mark.parametrize("machine", [BRACKETS], indirect=True)
@pytest.mark.usefixtures("machine")
def test_a_finding_with_brackets_is_printed_as_it_is() -> None:
    assert "[bold]x[/bold]" in invoke("doctor").out


def test_this_machine_gets_its_verdicts() -> None:
    assert len(json.loads(invoke("doctor", "--json").out)) == len(CHECKS)
