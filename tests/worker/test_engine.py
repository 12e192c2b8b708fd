"""Answers through a process of its own: the engine's interface, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from oomproof import session
from oomproof.engine.messages import FinishedEvent, TokenEvent
from oomproof.engine.model import Model
from oomproof.errors import RequestError, WorkerError
from oomproof.memory.terms import DeviceTerms
from oomproof.worker.engine import WorkerEngine
from oomproof.worker.launch import limits_of
from tests.worker.engines import read_calls, write_script
from tests.worker.workers import (
    answer,
    children,
    descriptors,
    drain,
    expected,
    launch,
    planned,
    request,
    wait_until_gone,
    worker,
)


@pytest.fixture(scope="module")
def beside() -> Iterator[tuple[Model, Model]]:
    """The bundled model in this process, and in one of its own."""
    made = session.plan("tiny", format="bf16", context=256, concurrency=4)
    with session.load(made) as here, session.load(made, worker=True) as there:
        yield here, there


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 5},
        {"seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
        {"seed": 2, "stop": ["e", "o t"], "presence_penalty": 0.5, "frequency_penalty": -0.5},
        {"temperature": 0, "raw": True, "logprobs": 3},
    ],
    ids=str,
)
def test_answers_are_those_of_the_engine_in_this_process(
    beside: tuple[Model, Model], options: dict[str, object]
) -> None:
    here, there = (
        model.stream("It was a dark night", max_new_tokens=60, **options)  # type: ignore[arg-type]
        for model in beside
    )
    assert "".join(here) == "".join(there)
    assert here.tokens == there.tokens
    assert here.logprobs == there.logprobs
    assert here.finish_reason == there.finish_reason


def test_the_other_engine_answers_alike_too() -> None:
    made = session.plan("tiny", format="nf4-dq", context=64, engine="transformers")
    answers = []
    for apart in (False, True):
        with session.load(made, worker=apart) as model:
            answers.append(model.generate("It was", temperature=0, max_new_tokens=9, raw=True))
    assert answers[0] == answers[1]


def test_several_requests_at_once_are_answered_alike(beside: tuple[Model, Model]) -> None:
    prompts = [f"{word} " * 20 for word in ("one", "two", "three", "four", "five", "six")]
    here, there = (
        model.generate_all(prompts, max_new_tokens=20, temperature=0) for model in beside
    )
    assert here == there


def test_what_can_never_fit_is_refused_in_the_same_words(beside: tuple[Model, Model]) -> None:
    said = []
    for model in beside:
        with pytest.raises(RequestError) as refused:
            model.stream("word " * 500)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_measured_memory_comes_from_the_process_that_holds_it(beside: tuple[Model, Model]) -> None:
    here, there = (model.measured_terms()[0] for model in beside)
    assert (here.weights, here.kv_cache) == (there.weights, there.kv_cache)


def test_a_cancelled_answer_ends_with_what_was_read(tmp_path: Path) -> None:
    with worker(tmp_path) as engine:
        engine.submit(request("a", new=900))
        engine.submit(request("b", new=30))
        events = list(engine.step())
        engine.cancel("a")
        engine.cancel("never seen")
        assert not engine.idle
        events += engine.step()
        read = [e for e in events if isinstance(e, TokenEvent) and e.request_id == "a"]
        assert events[-1] == FinishedEvent(
            request_id="a", reason="cancelled", prompt_tokens=3, new_tokens=len(read)
        )
        rest = events + drain(engine)
        assert [e.token for e in rest if isinstance(e, TokenEvent) and e.request_id == "b"] == (
            expected(request("b", new=30))
        )
        assert not [e for e in rest if e.request_id == "a" and e not in events]
        assert answer(engine, request("a")) == expected(request("a"))


def test_what_was_measured_and_told_meanwhile_is_not_lost(tmp_path: Path) -> None:
    with worker(tmp_path) as engine:
        engine.submit(request(new=50))
        assert engine.measured_terms() == {
            0: DeviceTerms(weights=5, workspace=-1),
            3: DeviceTerms(),
        }
        tokens = [e.token for e in drain(engine) if isinstance(e, TokenEvent)]
        assert tokens == expected(request(new=50))
        assert engine.step() == []


def test_loading_tells_its_progress(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    engine = WorkerEngine(launch(tmp_path))
    engine.begin(lambda done, total: told.append((done, total)))
    engine.close()
    assert told[-1] == (10, 10)


def test_what_the_child_prints_reaches_no_pipe_of_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    everywhere = {"*": "noise"}
    write_script(tmp_path, load=everywhere, prefill=everywhere, close=everywhere)
    with worker(tmp_path) as engine:
        assert answer(engine, request()) == expected(request())
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_does_not_reach_the_child(tmp_path: Path) -> None:
    with worker(tmp_path) as engine:
        assert os.getpgid(engine.pid) == engine.pid != os.getpgrp()
        os.kill(engine.pid, signal.SIGINT)
        assert answer(engine, request()) == expected(request())
        assert engine.failures == ()


def test_closing_leaves_no_process_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    import threading

    with worker(tmp_path):
        pass
    before, threads = descriptors(), threading.active_count()
    with worker(tmp_path) as engine:
        answer(engine, request())
        pid = engine.pid
    assert wait_until_gone(pid)
    assert descriptors() == before
    assert threading.active_count() == threads
    assert not [child for child in children() if child.pid == pid]
    assert (1, "close") in read_calls(tmp_path)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(request(new=1000))


def test_closing_in_the_middle_of_an_answer_and_of_a_load_ends_the_child(tmp_path: Path) -> None:
    write_script(tmp_path, load={"1": "slow 20"})
    with worker(tmp_path) as engine:
        engine.submit(request(new=1000))
        engine.step()
    assert wait_until_gone(engine.pid)
    loading = WorkerEngine(launch(tmp_path))
    loading.close()
    assert wait_until_gone(loading.pid)


def test_an_engine_that_is_forgotten_takes_its_process_along(tmp_path: Path) -> None:
    engine = WorkerEngine(launch(tmp_path))
    engine.begin()
    pid = engine.pid
    del engine
    assert wait_until_gone(pid)


def test_compilers_that_the_child_started_end_with_it(tmp_path: Path) -> None:
    write_script(tmp_path, load={"*": f"orphan {tmp_path / 'orphans'}"})
    with worker(tmp_path) as engine:
        engine.submit(request(new=1000))
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(WorkerError):
            drain(engine)
        assert answer(engine, request()) == expected(request())
    killed, closed = map(int, (tmp_path / "orphans").read_text().split())
    assert wait_until_gone(killed)
    assert wait_until_gone(closed)


_PARENT = """
import sys, time
from pathlib import Path
from tests.worker.workers import launch, request
from oomproof.worker.engine import WorkerEngine
engine = WorkerEngine(launch(Path(sys.argv[1])))
engine.begin()
assert "torch" not in sys.modules
engine.submit(request(new=1000))
engine.step()
print(engine.pid, flush=True)
{end}
"""


def run_parent(folder: Path, end: str) -> tuple[subprocess.Popen[str], int]:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT.format(end=end), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


@pytest.mark.parametrize("busy", ["", "hang", "hold"])
def test_a_child_is_gone_with_its_killed_parent_and_the_parent_never_had_torch(
    tmp_path: Path, busy: str
) -> None:
    if busy == "hold" and sys.platform != "linux":
        pytest.skip("only Linux ends a child that holds Python's lock")
    write_script(tmp_path, **{"decode 2": {"0": busy}})
    parent, child = run_parent(tmp_path, "time.sleep(60)")
    with parent:
        parent.kill()
    assert wait_until_gone(child)


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_parent_that_ends_without_closing_reaps_its_child(tmp_path: Path, end: str) -> None:
    parent, child = run_parent(tmp_path, end)
    with parent:
        parent.wait(10)
    assert wait_until_gone(child, 0.1)


def test_slow_plans_get_more_time_for_a_step() -> None:
    quick = session.plan("llama-3.1-8b", gpus="RTX 4090")
    slow = session.plan("llama-3.1-8b", gpus="RTX 4090", concurrency=4, format="nf4")
    assert 60 < limits_of(quick).step_s < limits_of(slow).step_s < 600
    assert limits_of(planned()).step_s == 900  # no speed is known for "1x24GiB"
