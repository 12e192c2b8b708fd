"""What the rows of benchmarks/faults.py have in common: engines, answers, lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import oomproof
from benchmarks.fault_world import Troubled, World
from oomproof.engine.messages import Request, SamplingOptions, TokenEvent
from oomproof.engine.protocol import Engine
from oomproof.guarding.engine import GuardedEngine
from oomproof.guarding.ladder import LadderEvent
from oomproof.guarding.situation import Target
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import Hardware
from oomproof.models.resolve import resolve
from oomproof.monitoring.monitor import monitored
from oomproof.planning.plan import Plan
from oomproof.starting import Contract, rehearsable

NEW_TOKENS = 16


class Starts:
    """Starts engines with random weights, watched, in whose steps memory runs out as told."""

    def __init__(self, world: World, steps: Mapping[int, int] | None = None) -> None:
        self.world, self.steps = world, dict(steps or {})
        self.count = [0]
        self.starts = 0

    def __call__(self, target: Target, hardware: Hardware) -> Engine:
        """The next engine."""
        self.starts += 1
        self.world.before_start(target.plan)
        contract = Contract(plan=target.plan, spec=target.spec, hardware=hardware)
        engine = rehearsable(contract).start()
        troubled = Troubled(engine, target.plan, self.world, self.steps, self.count)
        return monitored(troubled, target.plan)


@contextmanager
def guarded(
    target: Target,
    starts: Starts,
    events: list[LadderEvent],
    allowed: tuple[str, ...] = (),
) -> Iterator[GuardedEngine]:
    """An engine behind the ladder."""

    def note(event: Any) -> None:
        if isinstance(event, LadderEvent):
            events.append(event)

    engine = GuardedEngine(
        target,
        starts,
        hardware=starts.world.machine.measure(target.plan),
        allowed=allowed,
        on_event=note,
        machine=starts.world.machine,
    )
    try:
        yield engine
    finally:
        engine.close()


def planned(model: str, **options: Any) -> Target:
    """Four requests in 16 bits on a GPU; on a processor in 32, which others are smaller than."""
    on_gpu = any(device.kind == "cuda" for device in probe().devices)
    format_name = "bf16" if on_gpu else "fp32"
    asked = {"engine": "native", "format": format_name, "concurrency": 4, **options}
    return Target(plan=oomproof.plan(model, **asked), spec=resolve(model))


def answers(engine: Engine, vocab_size: int, requests: int = 2) -> dict[str, list[int]]:
    """Greedy answers to made-up prompts, at once."""
    for number in range(requests):
        engine.submit(
            Request(
                id=str(number),
                prompt_tokens=tuple((31 * number + 7 * i) % vocab_size for i in range(48)),
                max_new_tokens=NEW_TOKENS,
                sampling=SamplingOptions(temperature=0),
            )
        )
    found: dict[str, list[int]] = {str(number): [] for number in range(requests)}
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                found[event.request_id].append(event.token)
    return found


@contextmanager
def reported(row: str) -> Iterator[None]:
    """A row that fails says so, and the next one is tried."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the row's result
        tell(row, is_ok=False, error=f"{type(error).__name__}: {str(error)[:600]}")


def describe(plan: Plan) -> dict[str, Any]:
    """A plan in a row."""
    names = ("model", "format", "kv_format", "context", "concurrency", "engine")
    return {name: getattr(plan, name) for name in names} | {
        "peak_bytes": [device.peak_bytes for device in plan.devices_in_use],
        "kind": plan.devices_in_use[0].kind,
    }


def tell(row: str, *, is_ok: bool, **figures: Any) -> None:
    """One row on stdout."""
    print(json.dumps({"benchmark": "faults", "row": row, "ok": is_ok, **figures}), flush=True)
