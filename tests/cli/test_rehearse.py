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


def test_a_fine_tuning_is_rehearsed_without_data() -> None:
    arguments = ("rehearse", "tiny", "--tune", "--context", "64", "--batch-size", "2")
    done = invoke(*arguments, "--rank", "4", "--checkpointing", "layers")
    assert done.code == 0, done.err
    assert "steps of 2 sequences of 64 random tokens, 2 at once" in done.err
    assert "activations kept: inputs of layers, attention in all 5" in done.err
    assert "tokens/s" in done.out
    plain = json.loads(invoke(*arguments, "--json").out)
    assert plain["kept_its_promise"]
    assert plain["kept"] == {"attention": 5, "mid": 5, "qkv": 5, "gate_up": 5}
    assert len(plain["losses"]) == 3


def test_a_fine_tuning_above_its_plan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from oomproof.tuning.rehearsal import TuningRehearsal

    monkeypatch.setattr(TuningRehearsal, "exceeded", ("H200 took 9 GiB, planned were 8 GiB",))
    done = invoke("rehearse", "tiny", "--tune", "--context", "64", "--batch-size", "1")
    assert done.code == 1
    assert "error: H200 took 9 GiB, planned were 8 GiB: keep a --reserve" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rank", "4"), "--rank is about training: add --tune"),
        (("--tune", "--offload", "cpu"), "--offload has no meaning with --tune"),
        (("--tune", "--rank", "0"), "rank 0 must be from 1 to 1024"),
        (("--tune", "--optimizer", "sgd"), "unknown optimizer 'sgd'"),
        (("--tune", "--context", "9k"), "context 9,216 is beyond"),
        (("--tune", "--format", "fit"), "format fit is not trained on"),
    ],
)
def test_options_of_a_rehearsed_fine_tuning_are_checked(
    arguments: tuple[str, ...], said: str
) -> None:
    done = invoke("rehearse", "tiny", *arguments)
    assert done.code == 1
    assert said in done.err
