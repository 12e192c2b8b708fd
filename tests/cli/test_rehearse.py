"""`oomproof rehearse`: its options; what a rehearsal finds is in tests/engine/test_rehearse.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oomproof import session
from tests.cli.invoke import invoke

QUICK = ("--context", "64", "--format", "bf16", "--no-note")


@pytest.mark.parametrize(
    ("offload", "said"),
    [("gpu", "unknown offload 'gpu': use one of none, cpu"), ("disk", "use --offload cpu")],
)
def test_an_offload_that_there_is_not_is_one_line_and_nothing_is_rehearsed(
    offload: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise AssertionError("something was rehearsed")

    monkeypatch.setattr(session, "rehearse", fail)
    assert said in invoke("rehearse", "tiny", "--offload", offload).error


def test_offload_and_force_reach_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    plan = session.plan

    def listen(model: str, **options: Any) -> object:
        asked.update(options)
        return plan(model, **options)

    monkeypatch.setattr(session, "plan", listen)
    done = invoke("rehearse", "tiny", "--offload", "cpu", "--force", "--json", *QUICK)
    assert (done.code, asked["offload"], asked["force"]) == (0, "cpu", True)
    # What fits is not streamed, and a machine without a GPU has nowhere to stream to.
    assert json.loads(done.out)["kept_its_promise"]
    assert session.plan("tiny", offload="cpu").offload == "none"
