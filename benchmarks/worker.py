"""What a process of its own costs: each token, each start.

    python benchmarks/worker.py [MODEL] [--format bf16] [--repeats 9] > results.jsonl

"channel": an engine that answers at once, in this process and behind a worker, so that nothing but
the way of a token is timed. "paced": the same with steps of a millisecond, as a GPU's. "model":
MODEL (`tiny` unless told), decoding greedily, here and behind a worker in turn. "start": a process
of its own for each, from nothing to the first token.
One JSON line a figure goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import oomproof
from oomproof import session
from oomproof.engine.messages import Event, FinishedEvent, Request, SamplingOptions, TokenEvent
from oomproof.engine.protocol import Engine
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import Plan
from oomproof.worker.child import Parent
from oomproof.worker.engine import WorkerEngine
from oomproof.worker.launch import Launch
from oomproof.worker.messages import Load

_PACE_S = 0.001


class Instant:
    """Answers every request with a token a step, at no cost but a given time."""

    def __init__(self, step_s: float = 0.0) -> None:
        self._step_s = step_s
        self._left: dict[str, int] = {}

    @property
    def idle(self) -> bool:
        """Whether nothing is left to answer."""
        return not self._left

    def submit(self, request: Request) -> None:
        """Begins to answer."""
        self._left[request.id] = request.max_new_tokens

    def cancel(self, request_id: str) -> None:
        """Ends an answer."""
        self._left.pop(request_id, None)

    def step(self) -> Sequence[Event]:
        """A token of every answer."""
        ready = time.perf_counter() + self._step_s
        while time.perf_counter() < ready:
            pass
        events: list[Event] = []
        for id_ in tuple(self._left):
            self._left[id_] -= 1
            events.append(TokenEvent(request_id=id_, token=123_456))
            if not self._left[id_]:
                del self._left[id_]
                events.append(
                    FinishedEvent(request_id=id_, reason="length", prompt_tokens=1, new_tokens=1)
                )
        return events

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Nothing."""


def start_instant(_load: Load, _parent: Parent) -> Instant:
    """What a worker starts for "channel"."""
    return Instant()


def start_paced(_load: Load, _parent: Parent) -> Instant:
    """What a worker starts for "paced"."""
    return Instant(_PACE_S)


def us_per_token(engine: Engine, requests: int, new_tokens: int) -> float:
    """Microseconds a token takes until it is read."""
    for number in range(requests):
        engine.submit(
            Request(
                id=str(number),
                prompt_tokens=(1,),
                max_new_tokens=new_tokens,
                sampling=SamplingOptions(temperature=0),
            )
        )
    started = time.perf_counter()
    while not engine.idle:
        engine.step()
    return 1e6 * (time.perf_counter() - started) / (requests * new_tokens)


def in_turns(
    here: Engine, there: Engine, requests: int, new_tokens: int, repeats: int
) -> dict[str, float]:
    """Medians of both, and of what a worker adds; the first turn of each is not counted."""
    turns = [
        (us_per_token(here, requests, new_tokens), us_per_token(there, requests, new_tokens))
        for _ in range(repeats + 1)
    ][1:]
    return {
        "here_us_a_token": median(one for one, _ in turns),
        "worker_us_a_token": median(other for _, other in turns),
        "added_us_a_token": median(other - one for one, other in turns),
    }


def channel(plan: Plan, repeats: int, what: str) -> None:
    """Times an engine that needs no model."""
    start = {"channel": "start_instant", "paced": "start_paced"}[what]
    here = Instant(_PACE_S if what == "paced" else 0.0)
    with tempfile.TemporaryDirectory() as folder:
        launch = Launch(
            plan=plan, folder=Path(folder), vocab_size=2, start=f"benchmarks.worker:{start}"
        )
        worker = WorkerEngine(launch)
        try:
            worker.begin()
            for requests in (1, 16):
                tell(what, requests, in_turns(here, worker, requests, 900, repeats))
        finally:
            worker.close()


def model(plan: Plan, repeats: int) -> None:
    """Times a model."""
    with session.load(plan) as here, session.load(plan, worker=True) as there:
        for requests in (1, plan.concurrency):
            # The engines themselves: what is told is the way of a token, not its text.
            engines = (here._engine, there._engine)  # noqa: SLF001
            tell("model", requests, in_turns(*engines, requests, 200, repeats))


_START = """
import time; began = time.perf_counter()
import json, sys, psutil, oomproof
from oomproof import session
plan = oomproof.plan(sys.argv[1], format=sys.argv[2])
model = session.load(plan, worker=sys.argv[3] == "worker")
next(model.stream("hello", temperature=0))
took = time.perf_counter() - began
here = psutil.Process()
memory = [one.memory_info().rss for one in (here, *here.children())]
model.close()
print(json.dumps({"first_token_s": took, "rss_bytes": memory,
                  "all_s": time.perf_counter() - began}))
"""


def start(name: str, format_name: str) -> None:
    """Times whole processes."""
    for where in ("here", "worker") * 3:
        done = subprocess.run(
            [sys.executable, "-c", _START, name, format_name, where],
            capture_output=True,
            text=True,
            check=True,
        )
        print(json.dumps({"what": "start", "where": where, **json.loads(done.stdout)}), flush=True)


def tell(what: str, requests: int, figures: Mapping[str, float]) -> None:
    rounded = {name: round(figure, 2) for name, figure in figures.items()}
    print(json.dumps({"what": what, "requests": requests, **rounded}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    sys.path.append(str(Path(__file__).parents[1]))
    plan = oomproof.plan(options.model, format=options.format, context=1024, concurrency=4)
    print(json.dumps({"what": "machine", "plan": plan.model, "cores": os.cpu_count()}))
    for what in ("channel", "paced"):
        channel(plan, options.repeats, what)
    model(plan, options.repeats)
    start(options.model, options.format)


if __name__ == "__main__":
    main()
