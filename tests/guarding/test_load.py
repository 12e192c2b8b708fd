"""Loading: by another plan where memory runs out and that is allowed, or not at all."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oomproof
from oomproof import opening, starting
from oomproof.engine.native.engine import NativeEngine
from oomproof.errors import EngineFaultError, InputError, LadderExhaustedError, PlanDoesNotFitError
from oomproof.monitoring.status_files import read_running, status_folder
from tests.cli.invoke import invoke
from tests.guarding.engines import FailingCall, accelerator_error, out_of_memory

OPTIONS: dict[str, Any] = {"format": "fp32", "engine": "native", "context": 256}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("OOMPROOF_HOME", str(folder))
    return folder


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets the first starts of an engine fail as told; gives the formats that were started."""

    def prepare(*troubles: Exception) -> list[str]:
        left, seen = list(troubles), list[str]()
        original = starting.start_engine

        def start(contract: Any, *arguments: Any, **options: Any) -> Any:
            seen.append(contract.plan.format)
            engine = original(contract, *arguments, **options)
            if left:
                engine.close()
                raise left.pop(0)
            return engine

        monkeypatch.setattr(opening, "start_engine", start)
        return seen

    return prepare


def test_memory_that_runs_out_while_loading_is_tried_once_more(
    starts: Callable[..., list[str]],
) -> None:
    seen = starts(out_of_memory())
    told: list[Any] = []
    with oomproof.load("tiny", on_event=told.append, **OPTIONS) as model:
        assert model.generate("hello", max_new_tokens=3, temperature=0)
    assert seen == ["fp32", "fp32"]
    assert [event.rung for event in told] == ["free"]


def test_what_is_known_of_memory_that_ran_out_is_kept_and_the_event_says_where(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    told: list[Any] = []
    with oomproof.load("tiny", on_event=told.append, **OPTIONS) as model:
        FailingCall(monkeypatch, NativeEngine, "step", {3: out_of_memory})
        assert model.generate("hello", max_new_tokens=6, temperature=0)
        [running] = read_running(status_folder()).statuses
    [event] = told
    summary = json.loads(event.kept.with_suffix(".json").read_text())
    assert event.kept.parent == home / "post-mortems"
    assert (summary["model"], summary["asked_bytes"]) == ("tiny", 20 * 2**20)
    assert len(summary["samples"]) >= 1
    # The engine that went on is the one that `oomproof top` shows, by its own plan.
    assert (running.format, running.requests) == ("fp32", 0)
    assert running.rungs == {"free": 1}
    assert read_running(status_folder()).statuses == ()


def test_an_engine_that_failed_for_good_is_not_shown_as_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with oomproof.load("tiny", **OPTIONS) as model:
        FailingCall(
            monkeypatch, NativeEngine, "step", {2: lambda: accelerator_error(710, "assert")}
        )
        with pytest.raises(EngineFaultError):
            model.generate("hello", max_new_tokens=6, temperature=0)
        assert read_running(status_folder()).statuses == ()


def test_a_smaller_format_is_loaded_where_that_is_allowed_and_the_model_says_so(
    starts: Callable[..., list[str]],
) -> None:
    seen = starts(out_of_memory(), out_of_memory())
    with oomproof.load("tiny", fallback="format", **OPTIONS) as model:
        assert model.plan.format == "bf16"
        assert model.generate("hello", max_new_tokens=3, temperature=0)
    assert seen == ["fp32", "fp32", "bf16"]


def test_without_leave_it_ends_with_what_would_fit(starts: Callable[..., list[str]]) -> None:
    starts(out_of_memory(), out_of_memory())
    with pytest.raises(LadderExhaustedError, match="--fallback format would go on"):
        oomproof.load("tiny", **OPTIONS)


def test_a_plan_that_never_fitted_is_left_for_one_that_does() -> None:
    tight = oomproof.plan("tiny", concurrency=64, **OPTIONS)
    cap = tight.devices[0].peak_bytes - 2**22
    with pytest.raises(PlanDoesNotFitError, match="does not fit"):
        oomproof.load("tiny", concurrency=64, cap=cap, **OPTIONS)
    with oomproof.load("tiny", concurrency=64, cap=cap, fallback="batch", **OPTIONS) as model:
        assert 1 <= model.plan.concurrency < 64
        assert model.plan.cap_bytes == cap
        assert model.generate("hello", max_new_tokens=3, temperature=0)
    with pytest.raises(LadderExhaustedError, match="free: the plan never fitted") as refused:
        oomproof.load("tiny", cap="1MiB", fallback="kv8,format", **OPTIONS)
    assert refused.value.exit_code == 3


def test_another_model_brings_its_own_tokenizer(
    starts: Callable[..., list[str]], tmp_path: Any
) -> None:
    from tests.compat.checkpoints import copy_of_tiny

    folder = copy_of_tiny(tmp_path / "big")
    starts(out_of_memory(), out_of_memory())
    roomy = {**OPTIONS, "context": 1024, "concurrency": 64}
    with oomproof.load(str(folder), fallback=["tiny"], **roomy) as model:
        assert model.plan.model == "tiny"
        assert model.generate("hello", max_new_tokens=3, temperature=0)


def test_a_load_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[weakref.ref[Any]] = []
    from oomproof.engine.native.device import NativeDevice

    original = NativeDevice.allocate_pools

    def fail(device: Any) -> None:
        built.append(weakref.ref(device))
        original(device)
        raise out_of_memory()

    monkeypatch.setattr(NativeDevice, "allocate_pools", fail)
    with pytest.raises(LadderExhaustedError) as refused:
        oomproof.load("tiny", **OPTIONS)
    gc.collect()
    assert len(built) == 2
    assert all(one() is None for one in built)
    assert refused.value.__context__ is None


def test_stop_texts_are_found_across_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0}
    with oomproof.load("tiny", **OPTIONS) as model:
        calm = model.stream("hello", **asked)
        "".join(calm)
        middle = len(model.tokenizer.decode(calm.tokens[:9]))
        stop = calm.text[middle - 3 : middle + 3]
        expected = model.generate("hello", stop=stop, **asked)
        assert 0 < len(expected) < len(calm.text)
        FailingCall(monkeypatch, NativeEngine, "step", {9: out_of_memory})
        stream = model.stream("hello", stop=stop, **asked)
        assert "".join(stream) == expected
        assert stream.finish_reason == "stop"


@pytest.mark.parametrize("command", ["run", "chat"])
def test_an_unknown_rung_is_refused_before_anything_is_planned(command: str) -> None:
    prompt = ("hello",) if command == "run" else ()
    done = invoke(command, "nobody/nothing", *prompt, "--fallback", "kv8,warp")
    assert done.code == 1
    assert "'warp' is no rung of the ladder" in done.err
    with pytest.raises(InputError, match="named twice"):
        oomproof.load("tiny", fallback="kv8,kv8")


def test_run_tells_of_the_rung_and_answers(starts: Callable[..., list[str]]) -> None:
    starts(out_of_memory(), out_of_memory())
    done = invoke(
        *("run", "tiny", "hello", "--max-new-tokens", "4", "--temperature", "0"),
        *("--format", "fp32", "--engine", "native", "--fallback", "format"),
    )
    assert done.code == 0
    assert "going on with free" in done.err
    assert "going on with format: frees" in done.err
    assert done.out.strip()
