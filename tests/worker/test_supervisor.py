"""Faults of every kind: what was running is told, and the next answer is right."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomproof import session
from oomproof.engine.messages import Request
from oomproof.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    NotRunnableError,
    OomproofError,
    PlanDoesNotFitError,
    PlanMismatchError,
    WorkerDownError,
    WorkerError,
)
from oomproof.worker.engine import WorkerEngine
from oomproof.worker.launch import Limits
from oomproof.worker.supervisor import Supervisor
from tests.worker.engines import read_calls, write_script
from tests.worker.workers import (
    QUICK,
    answer,
    children,
    descriptors,
    drain,
    expected,
    launch,
    request,
    wait_until_gone,
    worker,
)

STICKY = (700, 702, 710, *range(714, 720), 999)
MOMENTS = ("load", "prefill", "decode 3", "idle", "close")


def die_at(folder: Path, moment: str) -> None:
    """A worker dies at a moment; it is told, another takes its place, and nothing is left."""
    # The first answer is served by process 0; what dies in its load is process 1.
    act = {"1" if moment == "load" else "0": "die SIGKILL"}
    first = {"prefill": {"0": "die SIGKILL"}} if moment == "load" else {}
    write_script(folder, **{moment: act, **first})
    before = descriptors()
    with worker(folder) as engine:
        pids = {engine.pid}
        if moment == "idle":
            os.kill(engine.pid, signal.SIGKILL)
        if moment in ("load", "prefill", "decode 3"):
            with pytest.raises(WorkerError) as told:
                answer(engine, request(new=20))
            assert told.value.signal == "SIGKILL"
            assert "SIGKILL while answering" in str(told.value)
        if moment == "idle":
            # Its end may be seen before the next request is sent, or after.
            with suppress(WorkerError):
                answer(engine, request())
        if moment != "close":
            assert answer(engine, request()) == expected(request())
            error = engine.failures[-1]
            assert isinstance(error, WorkerError)
            assert error.signal == "SIGKILL"
            assert len(engine.failures) == (2 if moment == "load" else 1)
        pids.add(engine.pid)
    assert all(wait_until_gone(pid) for pid in pids)
    assert descriptors() == before


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_worker_is_told_and_replaced(tmp_path: Path, moment: str) -> None:
    with worker(tmp_path):  # lazy descriptors of the first process that is ever started
        pass
    (tmp_path / "starts").unlink()
    die_at(tmp_path, moment)


def test_a_real_model_answers_alike_before_and_after_its_process_was_killed() -> None:
    with session.load("tiny", format="bf16", context=256, worker=True) as model:
        engine = model._engine
        assert isinstance(engine, WorkerEngine)
        options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 60, "raw": True}
        whole = model.generate("It was a dark night", **options)
        stream = model.stream("It was a dark night", **options)
        next(stream)
        first = engine.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(WorkerError, match="SIGKILL while answering"):
            "".join(stream)
        assert model.generate("It was a dark night", **options) == whole
        assert engine.pid != first
    assert wait_until_gone(engine.pid, 0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_kills_at_random_times_never_give_a_wrong_answer(tmp_path: Path) -> None:
    chance = random.Random(7)
    limits = replace(QUICK, restarts=1000)
    before = descriptors()
    lost = 0
    with worker(tmp_path, limits) as engine:
        for _ in range(50):
            asked = request(new=chance.randrange(1, 900))
            victim, delay = engine.pid, chance.uniform(0, 0.05)
            killer = os.fork()
            if killer == 0:
                time.sleep(delay)
                os.kill(victim, signal.SIGKILL)
                os._exit(0)
            try:
                assert answer(engine, asked) == expected(asked)
            except WorkerError:
                lost += 1
            os.waitpid(killer, 0)
            assert answer(engine, request()) == expected(request())
        assert lost
        killed = engine.failures
    assert {error.signal for error in killed if isinstance(error, WorkerError)} == {"SIGKILL"}
    assert not [child for child in children() if child.pid == engine.pid]
    assert descriptors() == before


@pytest.mark.parametrize("code", STICKY)
def test_a_sticky_fault_is_met_once_and_its_process_replaced(tmp_path: Path, code: int) -> None:
    write_script(tmp_path, **{"decode 2": {"0": f"cuda {code}"}})
    with worker(tmp_path) as engine:
        first = engine.pid
        with pytest.raises(WorkerError, match=rf"CUDA error {code}\) while answering") as told:
            answer(engine, request())
        began = time.monotonic()
        assert told.value.code == code
        assert "AcceleratorError" in told.value.stderr
        assert answer(engine, request()) == expected(request())
        assert time.monotonic() - began < 10
        assert wait_until_gone(first)
    calls = [call for number, call in read_calls(tmp_path) if number == 0]
    assert calls[-1] == "decode 2"


@pytest.mark.parametrize("code", [214, 220])
def test_no_process_is_started_on_a_broken_gpu(tmp_path: Path, code: int) -> None:
    write_script(tmp_path, prefill={"*": f"cuda {code}"})
    with worker(tmp_path) as engine:
        for _ in range(2):
            with pytest.raises(WorkerDownError, match="its GPU is broken") as told:
                answer(engine, request())
            assert told.value.code == code
    assert {number for number, _ in read_calls(tmp_path)} == {0}


def test_the_fourth_failure_within_ten_minutes_is_the_last(tmp_path: Path) -> None:
    write_script(tmp_path, prefill={"*": "cuda 700"})
    with worker(tmp_path) as engine:
        for _ in range(3):
            with pytest.raises(WorkerError) as told:
                answer(engine, request())
            assert not isinstance(told.value, WorkerDownError)
        last = engine.pid
        for _ in range(2):
            with pytest.raises(
                WorkerDownError,
                match=r"not started again: it failed 4 times within 10 minutes",
            ):
                answer(engine, request())
        with pytest.raises(WorkerDownError):
            engine.measured_terms()
        assert wait_until_gone(last)
    assert {number for number, _ in read_calls(tmp_path)} == {0, 1, 2, 3}


def test_failures_that_are_long_ago_do_not_count(tmp_path: Path) -> None:
    write_script(tmp_path, load={"*": "", "1": "exit 3", "2": "exit 3"})
    now = 0.0
    supervisor = Supervisor(
        launch(tmp_path), replace(QUICK, restarts=1), clock=lambda: now, sleep=lambda _: None
    )
    try:
        supervisor.begin()
        os.kill(supervisor.pid, signal.SIGKILL)
        while supervisor.check("waiting") is None:
            time.sleep(0.01)
        now = 600.0
        with pytest.raises(WorkerDownError, match=r"code 3 while loading.*2 times within 10"):
            supervisor.admit()
    finally:
        supervisor.close()
    assert len(supervisor.failures) == 3


def test_a_process_that_cannot_load_is_tried_again_after_longer_and_longer_pauses(
    tmp_path: Path,
) -> None:
    write_script(tmp_path, load={"1": "full", "2": "full"})
    pauses: list[float] = []
    supervisor = Supervisor(launch(tmp_path), QUICK, sleep=pauses.append)
    try:
        supervisor.begin()
        os.kill(supervisor.pid, signal.SIGKILL)
        while supervisor.check("waiting") is None:
            time.sleep(0.01)
        supervisor.admit()
    finally:
        supervisor.close()
    assert pauses == [2.0, 4.0]
    assert isinstance(supervisor.failures[1], PlanDoesNotFitError)


def test_a_worker_that_answers_its_canary_otherwise_serves_nobody(tmp_path: Path) -> None:
    write_script(tmp_path, prefill={"0": "die SIGSEGV"}, sing={"1": "wrong", "2": "cuda 719"})
    with worker(tmp_path) as engine:
        with pytest.raises(WorkerError, match="SIGSEGV"):
            answer(engine, request())
        assert answer(engine, request()) == expected(request())
        died, wrong, faulty = engine.failures
    assert "SIGSEGV" in str(died)
    assert "answers its canary with" in str(wrong)
    assert "CUDA error 719" in str(faulty)
    assert [number for number, call in read_calls(tmp_path) if call == "submit"] == [0, 3]


@pytest.mark.parametrize("act", ["hang", "hold", "die SIGSTOP"])
def test_a_step_that_takes_too_long_ends_its_process(tmp_path: Path, act: str) -> None:
    write_script(tmp_path, **{"decode 2": {"0": act}})
    with worker(tmp_path, replace(QUICK, step_s=1.0)) as engine:
        first = engine.pid
        with pytest.raises(WorkerError, match="no sign of life for 1 s while answering"):
            answer(engine, request())
        assert wait_until_gone(first)
        assert answer(engine, request()) == expected(request())


def submit_all(engine: WorkerEngine, requests: Sequence[Request]) -> None:
    for one in requests:
        engine.submit(one)


def test_a_stopped_worker_does_not_hold_up_whoever_writes_to_it(tmp_path: Path) -> None:
    with worker(tmp_path, replace(QUICK, step_s=1.0)) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        long = request(prompt=(1999,) * 1000)
        with pytest.raises(WorkerError, match="no sign of life"):
            submit_all(engine, [replace(long, id=str(n), max_new_tokens=20) for n in range(100)])
        assert answer(engine, request()) == expected(request())


def test_a_load_that_hangs_is_ended(tmp_path: Path) -> None:
    write_script(tmp_path, load={"0": "hang"})
    engine = WorkerEngine(launch(tmp_path), replace(QUICK, load_s=1.5))
    with pytest.raises(WorkerError, match=r"no sign of life for 1\.5 s while loading"):
        engine.begin()
    assert wait_until_gone(engine.pid)


def test_a_close_that_hangs_is_ended(tmp_path: Path) -> None:
    write_script(tmp_path, close={"0": "hang"})
    with worker(tmp_path, replace(QUICK, close_s=0.5)) as engine:
        pass
    assert wait_until_gone(engine.pid, 0.1)


def test_a_fault_that_its_process_survives_costs_no_process(tmp_path: Path) -> None:
    write_script(tmp_path, **{"prefill": {"0": "slow 0.2"}, "decode 2": {"0": "memory"}})
    with worker(tmp_path) as engine:
        first = engine.pid
        engine.submit(request("a"))
        engine.submit(request("b"))
        with pytest.raises(WorkerError, match="MemoryError while answering: no more"):
            drain(engine)
        assert answer(engine, request(new=2)) == expected(request(new=2))
        assert engine.pid == first
    sung = [call for _, call in read_calls(tmp_path) if call == "canary"]
    assert len(sung) == 2


def test_an_unknown_exception_is_fatal_for_its_process(tmp_path: Path) -> None:
    write_script(tmp_path, **{"decode 2": {"0": "bug"}})
    with worker(tmp_path) as engine:
        first = engine.pid
        with pytest.raises(WorkerError, match="ZeroDivisionError while answering: a bug"):
            answer(engine, request())
        assert answer(engine, request()) == expected(request())
        assert wait_until_gone(first)


def step_until_it_raises(engine: WorkerEngine) -> None:
    for _ in range(100):
        engine.step()


def test_every_request_that_ran_is_told_until_it_is_let_go(tmp_path: Path) -> None:
    write_script(tmp_path, **{"prefill": {"0": "slow 0.2"}, "decode 2": {"0": "cuda 700"}})
    with worker(tmp_path) as engine:
        engine.submit(request("a"))
        engine.submit(request("b", new=20))
        for _ in range(3):
            with pytest.raises(WorkerError, match="CUDA error 700"):
                step_until_it_raises(engine)
        assert answer(engine, request("c")) == expected(request("c"))
        with pytest.raises(WorkerError, match="CUDA error 700"):
            engine.step()
        for id_ in ("a", "b"):
            engine.cancel(id_)
            assert [event.request_id for event in engine.step()] == [id_]
        assert engine.step() == []


@pytest.mark.parametrize(
    "sent",
    [
        r"\x02\x00\x00\x00\x01x",
        r"\x01\xff\xff\xff\xff",
        r"\x01\x00\x00\x00\x00",
        r"\x01\x00\x00\x00\x04nope",
        r'\x01\x00\x00\x00\x09["ready"]',
        r'\x01\x00\x00\x00\x15["step",[["17",2000]]]',
        r'\x01\x00\x00\x00\x12["canary answer",[]]'.replace("\\x12", "\\x14"),
    ],
)
def test_a_worker_that_sends_what_it_should_not_is_replaced(tmp_path: Path, sent: str) -> None:
    write_script(tmp_path, **{"decode 2": {"0": f"garbage {sent}"}})
    with worker(tmp_path) as engine:
        first = engine.pid
        with pytest.raises(WorkerError, match="sent what it should not"):
            answer(engine, request())
        assert answer(engine, request()) == expected(request())
        assert wait_until_gone(first)


@pytest.mark.parametrize(
    "error",
    [
        PlanDoesNotFitError("1.2 GiB missing", shortfall_bytes=1234, remedy="use nf4-dq"),
        PlanMismatchError(("a: planned cuda:0, found cpu", "b")),
        MissingDependencyError("bitsandbytes", install="pip install bitsandbytes"),
        ConfigError("a/config.json", "is -3", field="num_hidden_layers"),
        CheckpointError("model.safetensors", "is cut off", remedy="again"),
        NotRunnableError("no engine"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_loading_refuses_is_the_same_error_here(tmp_path: Path, error: OomproofError) -> None:
    made = {
        PlanDoesNotFitError: "PlanDoesNotFitError('1.2 GiB missing', shortfall_bytes=1234, "
        "remedy='use nf4-dq')",
        PlanMismatchError: "PlanMismatchError(('a: planned cuda:0, found cpu', 'b'))",
        MissingDependencyError: "MissingDependencyError('bitsandbytes', "
        "install='pip install bitsandbytes')",
        ConfigError: "ConfigError('a/config.json', 'is -3', field='num_hidden_layers')",
        CheckpointError: "CheckpointError('model.safetensors', 'is cut off', remedy='again')",
        NotRunnableError: "NotRunnableError('no engine')",
    }[type(error)]
    (tmp_path / "error.txt").write_text(made)
    engine = WorkerEngine(launch(tmp_path, "refusing"), Limits())
    with pytest.raises(type(error)) as told:
        engine.begin()
    assert str(told.value) == str(error)
    assert vars(told.value) == vars(error)
    assert told.value.exit_code == error.exit_code
    assert wait_until_gone(engine.pid)


def test_a_process_that_ends_while_it_loads_says_how_with_its_last_words(tmp_path: Path) -> None:
    engine = WorkerEngine(launch(tmp_path, "missing"))
    with pytest.raises(WorkerError, match="AttributeError while loading") as told:
        engine.begin()
    assert "Traceback" in told.value.stderr


def test_a_process_that_cannot_be_started_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    with pytest.raises(WorkerError, match="no process can be started"):
        WorkerEngine(launch(tmp_path))
    assert descriptors() == before
