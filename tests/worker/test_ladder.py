"""The ladder in a process of its own: answers go on, the supervisor follows the plan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomproof import session
from oomproof.engine.messages import Request
from oomproof.errors import (
    EngineFaultError,
    LadderExhaustedError,
    RequestError,
    WorkerDownError,
    WorkerError,
)
from oomproof.faults.fault import FaultClass
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.worker.engine import WorkerEngine
from oomproof.worker.launch import Launch, Limits
from tests.compat.checkpoints import copy_of_tiny
from tests.worker.engines import write_script
from tests.worker.workers import answer, drain, expected, request, wait_until_gone, worker

LIMITS = Limits(step_s=60.0, load_s=60.0)
PLANNED: dict[str, Any] = {"format": "fp32", "engine": "native", "context": 256}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("OOMPROOF_HOME", str(folder))
    return folder


@contextmanager
def troubled(
    tmp_path: Path,
    troubles: dict[str, dict[str, str]],
    *,
    told: list[Any] | None = None,
    allowed: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> Iterator[WorkerEngine]:
    """The bundled model in a process of its own, whose calls meet these troubles."""
    script = tmp_path / "troubles.json"
    script.write_text(json.dumps(troubles))
    os.environ["OOMPROOF_TEST_TROUBLES"] = str(script)
    launch = Launch(
        plan=session.plan("tiny", **{**PLANNED, **(options or {})}),
        folder=bundled_folder(),
        vocab_size=resolve("tiny").vocab_size,
        allowed=allowed,
        start="tests.worker.engines:troubled",
    )
    engine = WorkerEngine(
        replace(launch, **changes), LIMITS, on_event=None if told is None else told.append
    )
    try:
        engine.begin()
        yield engine
    finally:
        engine.close()
        del os.environ["OOMPROOF_TEST_TROUBLES"]


def asked(id_: str = "a", new: int = 12) -> Request:
    return request(id_, new, prompt=tuple(range(40, 56)))


# The canary takes five steps of a fresh process.
def test_memory_that_runs_out_in_the_child_costs_neither_the_answer_nor_the_process(
    tmp_path: Path, home: Path
) -> None:
    told: list[Any] = []
    with troubled(tmp_path, {"step": {"25": "gpu"}}, told=told) as engine:
        pid = engine.pid
        calm = answer(engine, asked())
        assert answer(engine, asked()) == calm
        assert (engine.pid, engine.failures) == (pid, ())
    [event] = told
    assert event.rung == "free"
    assert event.kept.parent == home / "post-mortems"


def test_a_rung_that_changes_the_plan_is_followed_and_the_next_worker_loads_it(
    tmp_path: Path,
) -> None:
    told: list[Any] = []
    troubles = {"step": {"8": "gpu", "9": "gpu"}}
    with troubled(tmp_path, troubles, told=told, allowed=("format",)) as engine:
        assert engine.plan.format == "fp32"
        assert len(answer(engine, asked())) == 12
        assert [event.rung for event in told] == ["free", "format"]
        assert engine.plan == told[-1].plan
        assert engine.plan.format == "bf16"
        by_now = answer(engine, asked())
        first = engine.pid
        os.kill(first, signal.SIGKILL)
        assert wait_until_gone(first)
        # Its canary is held against none of another format's.
        try:
            again = answer(engine, asked())
        except WorkerError:
            again = answer(engine, asked())
        assert again == by_now
        assert engine.pid != first
        assert len(engine.failures) == 1
    assert [event.rung for event in told] == ["free", "format"]


def test_the_door_follows_the_plan_too_and_says_the_largest_that_fits(tmp_path: Path) -> None:
    troubles = {"step": {"8": "gpu", "9": "gpu"}}
    with troubled(
        tmp_path, troubles, told=[], allowed=("context",), options={"context": 600}
    ) as engine:
        with pytest.raises(RequestError, match="planned context of 600"):
            engine.submit(asked(new=600))
        assert answer(engine, asked(new=200))
        room = engine.plan.context
        assert 216 <= room < 600
        with pytest.raises(RequestError, match=f"ask for at most {room - 16} new tokens"):
            engine.submit(asked(new=room))
        tight = replace(engine._supervisor.launch.plan, max_context=room)
        engine._supervisor._course.launch = replace(engine._supervisor.launch, plan=tight)
        with pytest.raises(RequestError, match=f"the largest context that fits here is {room}"):
            engine.submit(asked(new=room))
        assert engine.idle


def test_a_request_that_finds_no_room_any_more_is_refused_alone(tmp_path: Path) -> None:
    write_script(tmp_path, submit={"0": "refuse ask for less"})
    with worker(tmp_path) as engine:
        engine.submit(request("a"))
        for _ in range(2):
            with pytest.raises(RequestError, match="ask for less"):
                engine.step()
        engine.cancel("a")
        assert [event.request_id for event in engine.step()] == ["a"]
        assert engine.failures == ()


def test_where_no_rung_helps_the_answer_is_lost_with_a_typed_error_and_the_worker_replaced(
    tmp_path: Path,
) -> None:
    troubles = {"step": {"8": "gpu", "9": "gpu"}}
    with troubled(tmp_path, troubles, told=[]) as engine:
        first = engine.pid
        engine.submit(asked())
        with pytest.raises(LadderExhaustedError, match="--fallback kv8 would go on") as refused:
            drain(engine)
        assert refused.value.exit_code == 3
        assert refused.value.fault.fault_class is FaultClass.SHRINK
        assert refused.value.tried[0] == "free: taken, and it failed again"
        assert len(answer(engine, asked("b"))) == 12
        assert engine.pid != first


def test_a_fault_that_is_fatal_goes_to_the_supervisor(tmp_path: Path) -> None:
    with troubled(tmp_path, {"step": {"8": "cuda 710"}}, told=[]) as engine:
        first = engine.pid
        engine.submit(asked())
        with pytest.raises(WorkerError, match=r"met a fault \(CUDA error 710\)") as told:
            drain(engine)
        assert told.value.fault.fault_class is FaultClass.PROCESS
        assert not isinstance(told.value, EngineFaultError)
        assert len(answer(engine, asked())) == 12
        assert engine.pid != first


def test_a_broken_gpu_ends_it_through_the_ladder_too(tmp_path: Path) -> None:
    with troubled(tmp_path, {"step": {"8": "cuda 214"}}, told=[], allowed=("kv8",)) as engine:
        engine.submit(asked())
        with pytest.raises(WorkerDownError, match="its GPU is broken"):
            drain(engine)


def test_memory_that_runs_out_while_the_child_loads_goes_down_the_ladder(tmp_path: Path) -> None:
    told: list[Any] = []
    troubles = {"start": {"1": "gpu", "2": "gpu"}}
    with troubled(tmp_path, troubles, told=told, allowed=("format",)) as engine:
        assert engine.plan.format == "bf16"
        assert len(answer(engine, asked())) == 12
    assert [event.rung for event in told] == ["free", "format"]


def test_a_smaller_model_is_fetched_by_the_parent_and_brings_its_vocabulary(
    tmp_path: Path,
) -> None:
    big = copy_of_tiny(tmp_path / "big")
    wanted: list[str] = []

    def find(name: str) -> Any:
        wanted.append(name)
        return resolve(name), bundled_folder()

    roomy = {**PLANNED, "context": 1024, "concurrency": 64}
    with troubled(
        tmp_path,
        {"start": {"1": "gpu", "2": "gpu"}},
        told=[],
        allowed=("tiny",),
        plan=session.plan(str(big), **roomy),
        folder=big,
        find=find,
    ) as engine:
        assert engine.plan.model == "tiny"
        assert engine.folder == bundled_folder()
        assert len(answer(engine, asked())) == 12
    assert wanted == ["tiny"]


def test_a_model_that_the_parent_does_not_find_is_one_rung_less(tmp_path: Path) -> None:
    with (
        pytest.raises(LadderExhaustedError, match="a/b: 'a/b' is no model that was named"),
        troubled(
            tmp_path, {"start": {"1": "gpu", "2": "gpu"}}, told=[], allowed=("a/b",), find=None
        ),
    ):
        pytest.fail("it was loaded")


def test_a_plan_that_never_fitted_is_left_before_a_process_is_started() -> None:
    options: dict[str, Any] = {**PLANNED, "concurrency": 64}
    cap = session.plan("tiny", **options).devices[0].peak_bytes - 2**22
    told: list[Any] = []
    with session.load(
        "tiny", cap=cap, fallback="batch", on_event=told.append, worker=True, **options
    ) as model:
        assert 1 <= model.plan.concurrency < 64
        assert model.generate("hello", max_new_tokens=3, temperature=0)
    assert [event.rung for event in told] == ["batch"]
    with pytest.raises(LadderExhaustedError, match="free: the plan never fitted"):
        session.load("tiny", cap="1MiB", fallback="kv8,format", worker=True, **options)


_PARENT = """
import sys
import torch

def refuse(*_arguments, **_options):
    raise AssertionError("CUDA was started in the parent")

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
for name in ("_lazy_init", "init", "mem_get_info", "set_per_process_memory_fraction",
             "get_device_properties", "empty_cache", "synchronize", "current_stream"):
    setattr(torch.cuda, name, refuse)
from oomproof.cli.main import main
sys.argv = ["oomproof", "run", "tiny", "It was", "--max-new-tokens", "5", "--worker",
            "--temperature", "0"]
main()
"""


def test_the_parent_starts_no_cuda_though_it_reads_text_with_torch_at_hand() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PARENT],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_scripted_answers_are_still_whole(tmp_path: Path) -> None:
    with worker(tmp_path) as engine:
        assert answer(engine, request()) == expected(request())
