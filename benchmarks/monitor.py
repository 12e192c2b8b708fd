"""What watching memory costs a decode step: the same engine with and without it, in turns.

    python -m benchmarks.monitor [--model tiny] [--format bf16] [--requests 1] [--seconds 20]

A line of JSON goes to stdout. `hook_us` is a step's call where no look is due, `look_us` a look
with its status file, both alone; `overhead_bound` is what they add up to, as often as looks may be
taken; `overhead_measured` compares median steps of both engines in turns, with the noise of that
(the same engine against itself) as `noise`.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from oomproof.engine.messages import Request, SamplingOptions
from oomproof.engine.protocol import Engine
from oomproof.hardware.probe import probe
from oomproof.models.resolve import resolve
from oomproof.monitoring.monitor import MonitoredEngine
from oomproof.monitoring.sampler import INTERVAL_S, REST_PER_WORK, Sampler
from oomproof.monitoring.status_files import StatusFile
from oomproof.session import plan as make_plan
from oomproof.starting import Contract, rehearsable

_STEPS = 64
_CALLS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    hardware = probe()
    planned = make_plan(
        options.model,
        engine="native",
        format=options.format,
        concurrency=options.requests,
        context=1024,
    )
    contract = Contract(plan=planned, spec=resolve(options.model), hardware=hardware)
    engine = rehearsable(contract).start()
    with tempfile.TemporaryDirectory() as folder:
        sampler = Sampler(planned, engine.measured_terms, status_file=StatusFile(Path(folder)))
        watched = MonitoredEngine(engine, sampler)
        steps = _in_turns((engine, watched, engine), options.requests, options.seconds)
        plain_us, watched_us, again_us = (1e6 * median(times) for times in steps)
        hook_us = _hook_us(sampler)
        look_us = _us(sampler.sample, 200)
    rest_us = max(1e6 * INTERVAL_S, REST_PER_WORK * look_us)
    print(
        json.dumps(
            {
                "device": hardware.devices[0].name,
                "machine": platform.machine(),
                "torch": torch.__version__,
                "model": options.model,
                "format": options.format,
                "requests": options.requests,
                "step_us": round(plain_us, 1),
                "steps_timed": len(steps[0]),
                "hook_us": round(hook_us, 3),
                "look_us": round(look_us, 1),
                "overhead_bound": round(hook_us / plain_us + look_us / (look_us + rest_us), 6),
                "overhead_measured": round(watched_us / plain_us - 1, 5),
                "noise": round(again_us / plain_us - 1, 5),
                "events": [event.message for event in sampler.events],
            }
        )
    )
    watched.close()


def _in_turns(engines: tuple[Engine, ...], requests: int, seconds: float) -> list[list[float]]:
    """Times of decode steps, for each engine; prompts and ends of answers are left out."""
    times: list[list[float]] = [[] for _ in engines]
    began = time.perf_counter()
    turn = 0
    while time.perf_counter() - began < seconds:
        # Another one begins each time, so that none always runs on a warmer cache.
        for number in range(len(engines)):
            which = (turn + number) % len(engines)
            times[which] += _block(engines[which], requests)
        turn += 1
    return times


def _block(engine: Engine, requests: int) -> list[float]:
    for number in range(requests):
        engine.submit(
            Request(
                id=str(number),
                prompt_tokens=(1, 2, 3, 4),
                max_new_tokens=_STEPS,
                sampling=SamplingOptions(temperature=0),
            )
        )
    found = []
    while not engine.idle:
        started = time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - started)
    return found[2:-1]


def _hook_us(sampler: Sampler) -> float:
    """Of a step's call where no look is due."""
    sampler.sample()
    # Calls are over before the next look is due.
    return min(_us(lambda: sampler.after_step(0), _CALLS // 10) for _ in range(10))


def _us(call: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return 1e6 * (time.perf_counter() - started) / count


if __name__ == "__main__":
    main()
