"""True faults on one GPU: memory runs out, is stolen, has to come back; an assert fails.

    python benchmarks/faults.py [GROUP …] [--model llama-3.2-1b] > faults-h200.jsonl

"rungs": torch's limit is lowered in the middle of two answers and its allocator asked for more; the
    engine goes on by the ladder: once more, one by one, and by each rung that may be allowed.
"steal": another process takes 20 GiB of a card that has no 20 GiB too many, between plan and load
    (it goes again; it stays), and all that is left between load and generate.
"assert": a device-side assert in a worker, which is replaced.
"requests": 200 requests; "cycles": 20 times loaded and closed, after twice. Memory is back within
    1 MiB.

Random weights at true shapes, but for "assert" and "cycles", which load the bundled model. A group
is a process of its own with a limit of time, after which it and all that it started are killed;
every row is one line of JSON on stdout as soon as it is known. Without a GPU memory is made up,
with the bundled model, and "assert" is a number that the engine raises.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import oomproof
from benchmarks.fault_engines import Starts, answers, guarded, planned, reported, tell
from benchmarks.fault_rungs import rung_rows, steal_rows
from benchmarks.fault_world import GpuWorld, MadeUpWorld, World
from benchmarks.rehearsals import machine
from oomproof.errors import WorkerError
from oomproof.guarding.engine import GuardedEngine
from oomproof.guarding.ladder import LadderEvent
from oomproof.hardware.probe import probe
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.units import MIB
from oomproof.worker.child import Parent
from oomproof.worker.engine import WorkerEngine
from oomproof.worker.launch import Launch
from oomproof.worker.messages import Load

LIMITS_S = {"rungs": 200.0, "steal": 120.0, "assert": 90.0, "requests": 60.0, "cycles": 120.0}
"""What a group may take before it is killed; less than half is expected."""
_BACK_BYTES = MIB


def start_asserting(load: Load, parent: Parent) -> GuardedEngine:
    """What the worker of "assert" starts: the real thing, broken once a file is there."""
    from oomproof.engine.native.engine import NativeEngine
    from oomproof.worker import loading

    asked, step = Path(os.environ["OOMPROOF_BENCH_FAULT"]), NativeEngine.step

    def broken(engine: NativeEngine) -> Any:
        if asked.exists():
            asked.unlink()
            fail_an_assert()
        return step(engine)

    setattr(NativeEngine, "step", broken)  # noqa: B010 - mypy takes no other method
    return loading.start(load, parent)


def fail_an_assert() -> None:
    """An index out of bounds on the device, or the same number without one."""
    import torch

    if not torch.cuda.is_available():
        error: Any = torch.AcceleratorError("CUDA error: device-side assert triggered")
        error.error_code = 710
        raise error
    row = torch.zeros(4, device="cuda")
    row[torch.tensor([1 << 20], device="cuda")].sum().item()
    torch.cuda.synchronize()


def assert_rows(_model: str, world: World) -> None:
    """A worker that meets a device-side assert, and the next one."""
    plan, events = planned("tiny", context=512, concurrency=2).plan, list[str]()
    vocab_size = resolve("tiny").vocab_size
    with reported("assert"), tempfile.TemporaryDirectory() as folder:
        fault = Path(folder) / "fault"
        os.environ["OOMPROOF_BENCH_FAULT"] = str(fault)
        launch = Launch(
            plan=plan,
            folder=bundled_folder(),
            vocab_size=vocab_size,
            allowed=("kv8",),
            start="benchmarks.faults:start_asserting",
        )
        engine = WorkerEngine(launch, on_event=lambda event: events.append(event.message))
        try:
            engine.begin()
            calm, first = answers(engine, vocab_size), engine.pid
            fault.touch()
            lost = None
            try:
                answers(engine, vocab_size)
            except WorkerError as error:
                lost = error
            began = time.perf_counter()
            found = answers(engine, vocab_size)
            replaced_s = time.perf_counter() - began
            is_other = engine.pid != first
        finally:
            engine.close()
    import torch

    tell(
        "assert",
        is_ok=lost is not None and lost.code == 710 and found == calm and is_other,
        code=None if lost is None else lost.code,
        said=str(lost),
        same_tokens=found == calm,
        replaced_s=round(replaced_s, 2),
        parent_has_cuda=torch.cuda.is_initialized(),
        events=events,
        used_bytes_after=world.used_bytes(),
    )


def request_rows(model: str, world: World) -> None:
    """200 requests of one engine."""
    target = planned(model, context=1024)
    starts, events = Starts(world), list[LadderEvent]()
    with reported("requests-200"), guarded(target, starts, events) as engine:
        answers(engine, target.spec.vocab_size, 4)
        before, began = world.used_bytes(), time.perf_counter()
        for _ in range(50):
            answers(engine, target.spec.vocab_size, 4)
        grown = world.used_bytes() - before
        tell(
            "requests-200",
            is_ok=abs(grown) <= _BACK_BYTES and not events,
            grown_bytes=grown,
            wall_s=round(time.perf_counter() - began, 2),
        )


def cycle_rows(_model: str, world: World) -> None:
    """Loaded and closed 20 times, by what users call."""
    with reported("cycles-20"):
        sizes: list[int] = []
        began = time.perf_counter()
        for _ in range(22):
            with oomproof.load("tiny", format="bf16", engine="native", context=512) as model:
                model.generate("It was a dark night", max_new_tokens=8, temperature=0)
            sizes.append(world.used_bytes())
        # The first one makes the context and its modules, the second what a second one needs.
        grown = [size - sizes[1] for size in sizes[2:]]
        tell(
            "cycles-20",
            is_ok=max(map(abs, grown)) <= _BACK_BYTES,
            grown_bytes=grown[-1],
            most_bytes=max(grown),
            second_bytes=sizes[1] - sizes[0],
            each_bytes=grown,
            wall_s=round(time.perf_counter() - began, 2),
        )


GROUPS: dict[str, Callable[[str, World], None]] = {
    "rungs": rung_rows,
    "steal": steal_rows,
    "assert": assert_rows,
    "requests": request_rows,
    "cycles": cycle_rows,
}


def run_group(group: str, model: str, limit_s: float) -> bool:
    """A group in a process of its own; whether every row of it was right.

    Its lines are handed on as they come. What runs longer than its limit is killed with all that
    it started, and a line says so.
    """
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", group, "--model", model],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    timer = threading.Timer(limit_s, _kill_group, (child.pid,))
    timer.start()
    is_ok, rows, facts = True, 0, machine()
    assert child.stdout is not None
    try:
        for line in child.stdout:
            try:
                row = json.loads(line)
            except ValueError:
                sys.stderr.write(line)
                continue
            is_ok, rows = is_ok and row["ok"], rows + 1
            print(json.dumps({**row, "group": group, **facts}), flush=True)
        code = child.wait()
    finally:
        timer.cancel()
    if code or not rows:
        why = f"killed after {limit_s:g} s" if code == -signal.SIGKILL else f"exit code {code}"
        tell(f"{group}-all", is_ok=False, error=why)
    return is_ok and rows > 0 and not code


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def main() -> None:
    """Runs the groups that are asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=[])
    parser.add_argument("--model", default=None)
    parser.add_argument("--child", choices=GROUPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    has_gpu = any(device.kind == "cuda" for device in probe().devices)
    model = arguments.model or ("llama-3.2-1b" if has_gpu else "tiny")
    if arguments.child:
        GROUPS[arguments.child](model, GpuWorld() if has_gpu else MadeUpWorld())
        return
    results = [run_group(group, model, LIMITS_S[group]) for group in arguments.groups or GROUPS]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
