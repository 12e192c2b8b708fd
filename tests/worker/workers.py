"""Worker engines over scripted children, and what they leave behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from oomproof.engine.messages import (
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    SamplingOptions,
    TokenEvent,
)
from oomproof.engine.protocol import Engine
from oomproof.planning.plan import Plan
from oomproof.session import plan
from oomproof.worker.engine import WorkerEngine
from oomproof.worker.launch import Launch, Limits
from tests.worker.engines import next_token

QUICK = Limits(step_s=20.0, load_s=20.0, close_s=5.0)


@cache
def planned() -> Plan:
    return plan("tiny", gpus="1x24GiB", context=1024)


def launch(folder: Path, start: str = "scripted") -> Launch:
    return Launch(
        plan=planned(), folder=folder, vocab_size=2048, start=f"tests.worker.engines:{start}"
    )


@contextmanager
def worker(folder: Path, limits: Limits = QUICK, start: str = "scripted") -> Iterator[WorkerEngine]:
    engine = WorkerEngine(launch(folder, start), limits)
    try:
        engine.begin()
        yield engine
    finally:
        engine.close()


def request(id_: str = "a", new: int = 6, prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(
        id=id_,
        prompt_tokens=prompt,
        max_new_tokens=new,
        sampling=SamplingOptions(temperature=0),
    )


def expected(asked: Request) -> list[int]:
    return [next_token(0, asked, count) for count in range(asked.max_new_tokens)]


def answer(engine: Engine, asked: Request) -> list[int]:
    """The tokens of an answer, of which it is made sure that it is whole."""
    engine.submit(asked)
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    assert {event.request_id for event in events} == {asked.id}
    *tokens, end = events
    assert isinstance(end, FinishedEvent)
    assert end.new_tokens == len(tokens)
    return [event.token for event in tokens if isinstance(event, TokenEvent)]


def reason_of(events: list[Event], id_: str) -> FinishReason | None:
    return next(
        (e.reason for e in events if isinstance(e, FinishedEvent) and e.request_id == id_), None
    )


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def wait_until_gone(pid: int, seconds: float = 2.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def descriptors() -> int:
    return psutil.Process().num_fds()


def drain(engine: Engine) -> list[Event]:
    events: list[Any] = []
    while not engine.idle:
        events += engine.step()
    return events
