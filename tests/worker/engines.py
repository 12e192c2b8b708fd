"""Engines that do as they are told, for a child to start: "tests.worker.engines:scripted".

A script is a file in the model's folder: {"step": {"0": "die SIGKILL", …}}, by the number of the
process (0 for the first) or "*" for all. Every call is noted in `calls`, with that number.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oomproof.engine.messages import Event, FinishedEvent, Request, TokenEvent
from oomproof.engine.protocol import Engine
from oomproof.errors import OomproofError, PlanDoesNotFitError, RequestError
from oomproof.memory.terms import DeviceTerms
from oomproof.worker.child import Parent
from oomproof.worker.messages import Load

AcceleratorError = type("AcceleratorError", (RuntimeError,), {"__module__": "torch"})


def torch_error(code: int) -> Exception:
    """As torch raises it, without torch."""
    error: Any = AcceleratorError("CUDA error: something")
    error.error_code = code
    return error  # type: ignore[no-any-return]


def write_script(folder: Path, **moments: Mapping[str, str]) -> Path:
    """Says what happens in the processes that load from this folder."""
    (folder / "script.json").write_text(json.dumps(moments))
    return folder


def read_calls(folder: Path) -> list[tuple[int, str]]:
    """(number of the process, call) of each call so far."""
    lines = (folder / "calls").read_text().splitlines()
    return [(int(number), call) for number, _, call in (line.partition(" ") for line in lines)]


def next_token(number: int, request: Request, so_far: int) -> int:
    """What every sound process answers."""
    return (sum(request.prompt_tokens) + 31 * so_far + 7) % 2000 + number


class Scripted:
    """Answers by a rule, a token a request a step, unless its script says otherwise."""

    def __init__(self, folder: Path, *, notes: bool = True) -> None:
        self._folder, self._notes = folder, notes
        path = folder / "script.json"
        self._script = json.loads(path.read_text()) if path.exists() else {}
        starts = folder / "starts"
        self.number = int(starts.read_text()) if starts.exists() else 0
        starts.write_text(str(self.number + 1))
        self._active: dict[str, tuple[Request, int]] = {}
        self._cancelled: set[str] = set()

    def at(self, moment: str) -> str:
        """Notes a call, and does what the script has for it."""
        if self._notes:
            with (self._folder / "calls").open("a") as calls:
                calls.write(f"{self.number} {moment}\n")
        acts = self._script.get(moment, {})
        act: str = acts.get(str(self.number), acts.get("*", ""))
        do(act)
        return act

    @property
    def idle(self) -> bool:
        return not self._active

    def submit(self, request: Request) -> None:
        canary = request.id == "canary"
        self.at("canary" if canary else "submit")
        self._active[request.id] = (request, 0)

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def step(self) -> Sequence[Event]:
        events: list[Event] = []
        for id_ in self._cancelled & set(self._active):
            request, count = self._active.pop(id_)
            events.append(finished(request, "cancelled", count))
        self._cancelled.clear()
        for id_, (request, count) in list(self._active.items()):
            canary = id_ == "canary"
            if not canary:
                self.at("prefill" if count == 0 else f"decode {count}" if count < 9 else "decode")
            wrong = canary and self.at("sing") == "wrong"
            token = next_token(1 if wrong else 0, request, count)
            if token in request.stop_tokens:
                del self._active[id_]
                events.append(finished(request, "stop", count))
                continue
            events.append(TokenEvent(request_id=id_, token=token))
            self._active[id_] = (request, count + 1)
            if count + 1 == request.max_new_tokens:
                del self._active[id_]
                events.append(finished(request, "length", count + 1))
        return events

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        self.at("measure")
        return {0: DeviceTerms(weights=5, workspace=-1), 3: DeviceTerms()}

    def close(self) -> None:
        self.at("close")


def finished(request: Request, reason: Any, count: int) -> FinishedEvent:
    return FinishedEvent(
        request_id=request.id,
        reason=reason,
        prompt_tokens=len(request.prompt_tokens),
        new_tokens=count,
    )


def do(act: str) -> None:  # noqa: C901 - one case an act
    """One act of a script."""
    kind, _, rest = act.partition(" ")
    match kind:
        case "die":
            os.kill(os.getpid(), getattr(signal, rest))
            time.sleep(30)
        case "exit":
            os._exit(int(rest))
        case "hang":
            time.sleep(60)
        case "hold":  # holds Python's lock, so that no other thread runs
            ctypes.PyDLL(None).sleep(60)
        case "slow":
            time.sleep(float(rest))
        case "cuda":
            raise torch_error(int(rest))
        case "refuse":
            raise RequestError("there is no room for it by now", remedy=rest)
        case "memory":
            raise MemoryError("no more")
        case "bug":
            raise ZeroDivisionError("a bug")
        case "full":
            raise PlanDoesNotFitError("GPU 0 is full", shortfall_bytes=7, remedy="free it")
        case "noise":
            print("noise " * 1000, flush=True)
            sys.stderr.write("more noise\n")
            os.write(1, b"\x00\xff" * 100_000)
        case "garbage":
            report_fd = int(sys.argv[2])
            os.write(report_fd, rest.encode().decode("unicode_escape").encode("latin1"))
        case "orphan":
            os.system(f"sleep 300 & echo $! >> {rest}")


def scripted(load: Load, parent: Parent) -> Scripted:
    """Starts a Scripted engine, telling of 10 bytes on the way."""
    engine = Scripted(Path(load.folder))
    parent.progress(5, 10)
    engine.at("load")
    parent.progress(10, 10)
    return engine


def quiet(load: Load, parent: Parent) -> Scripted:
    """As `scripted`, without notes: for timing."""
    return Scripted(Path(load.folder), notes=False)


def refusing(load: Load, parent: Parent) -> Scripted:
    """Raises the error that the folder's error.txt has, as Python's expression."""
    from oomproof import errors

    error = eval((Path(load.folder) / "error.txt").read_text(), vars(errors))
    assert isinstance(error, OomproofError)
    raise error


class _Sticky:
    """A real engine that meets a true fault of CUDA's once a file is there."""

    def __init__(self, engine: Engine, asked: Path) -> None:
        self._engine, self._asked = engine, asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> Sequence[Event]:
        if self._asked.exists():
            self._asked.unlink()
            _fail_an_assert()
        return self._engine.step()


def _fail_an_assert() -> None:
    """An index out of bounds on the device: CUDA's error 710."""
    import torch

    row = torch.zeros(4, device="cuda")
    row[torch.tensor([1 << 20], device="cuda")].sum().item()
    torch.cuda.synchronize()


def sticky(load: Load, parent: Parent) -> Any:
    """Starts the real engine, to be broken later."""
    from oomproof.worker.loading import start

    return _Sticky(start(load, parent), Path(os.environ["OOMPROOF_TEST_FAULT"]))


def troubled(load: Load, parent: Parent) -> Any:
    """Starts the real engine; the variable names a file with what its calls meet.

    {"step": {"4": "memory", "9": "cuda 710"}, "start": {"1": "memory"}}: the number of the call,
    counted over all engines of all processes, and as in `do`, with "gpu" for a GPU's memory.
    """
    from oomproof import starting
    from oomproof.engine.native.engine import NativeEngine
    from oomproof.worker import loading

    script = Path(os.environ["OOMPROOF_TEST_TROUBLES"])
    troubles = json.loads(script.read_text())
    counts = script.with_name("counts")

    def meet(call: str) -> None:
        lines = counts.read_text().split() if counts.exists() else []
        counts.write_text(" ".join([*lines, call]))
        act = troubles.get(call, {}).get(str(lines.count(call) + 1), "")
        if act == "gpu":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`")
        do(act)

    step, started = NativeEngine.step, starting.start_engine

    def failing_step(engine: Any) -> Sequence[Event]:
        meet("step")
        return step(engine)

    def failing_start(*arguments: Any, **options: Any) -> Engine:
        meet("start")
        return started(*arguments, **options)

    vars(loading)["start_engine"] = failing_start
    setattr(NativeEngine, "step", failing_step)  # noqa: B010 - mypy takes no other method
    return loading.start(load, parent)
