"""The child's side: `python -m oomproof.worker`, started by process.py and by nobody else.

The main thread loads and steps; a second one reads commands all the time, so that the supervisor's
writes never wait for a step, and ends the process group when the supervisor is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from queue import SimpleQueue
from typing import NoReturn

from oomproof.engine.messages import Event, FinishedEvent, Request, SamplingOptions, TokenEvent
from oomproof.engine.protocol import Engine, HasPlan
from oomproof.errors import (
    EngineFaultError,
    InputError,
    LadderExhaustedError,
    OomproofError,
    RequestError,
)
from oomproof.faults.classify import classify
from oomproof.faults.fault import Fault, FaultClass
from oomproof.guarding.ladder import LadderEvent
from oomproof.monitoring.events import MonitorEvent
from oomproof.worker.frames import FrameReader, ProtocolError, frame
from oomproof.worker.messages import (
    Canary,
    CanaryAnswer,
    Cancel,
    Close,
    Command,
    Failed,
    Found,
    Load,
    Measure,
    Measured,
    NotFound,
    Progress,
    Ready,
    Refused,
    Report,
    Submit,
    Told,
    Wanted,
)
from oomproof.worker.wire import read_command, write, write_step

Start = Callable[[Load, "Parent"], Engine]
"""Takes what to load and whom to tell of it; gives a running engine."""

FAULTED = 70
"""Exit code after a fault that was told."""
_CANARY_ID = "canary"
_PROGRESS_S = 0.05
_READ_BYTES = 65536
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> None:
    """Serves one supervisor.

    Args:
        arguments: File descriptors of commands and reports, the supervisor's process, and
            "module:function" of what loads.
    """
    commands, reports, supervisor = map(int, arguments[:3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for descriptor in (commands, reports):
        os.set_inheritable(descriptor, False)
    _die_with(supervisor)
    inbox: SimpleQueue[Command] = SimpleQueue()
    threading.Thread(target=_listen, args=(commands, inbox), daemon=True).start()
    module, _, function = arguments[3].partition(":")
    channel = _Channel(reports)
    first = inbox.get()
    if not isinstance(first, Load):
        _quit(f"{type(first).__name__} came before Load")
    engine = _load(module, function, first, Parent(channel, inbox), channel)
    _Server(engine, inbox, channel).run()
    engine.close()


class _Channel:
    """Reports on their way to the supervisor, whole, from whichever thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, report: Report) -> None:
        self.send_payload(write(report))

    def send_payload(self, payload: bytes) -> None:
        rest = memoryview(frame(payload))
        with self._lock:
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except BrokenPipeError:
                _end_group()


class Parent:
    """The supervisor, for what loads and for the engine: told of what happens, asked for files."""

    def __init__(self, channel: _Channel, inbox: SimpleQueue[Command]) -> None:
        self._channel, self._inbox = channel, inbox
        self._told_at = 0.0

    def progress(self, done: int, total: int) -> None:
        """Tells of bytes loaded, and how many there are."""
        now = time.monotonic()
        if done == total or now - self._told_at > _PROGRESS_S:
            self._told_at = now
            self._channel.send(Progress(done=done, total=total))

    def tell(self, event: LadderEvent | MonitorEvent) -> None:
        """Tells of a rung, or of what the monitor found."""
        self._channel.send(Told(event=event))

    def find(self, model: str) -> Found:
        """A smaller model's files, which only the supervisor may download; while loading only.

        Raises:
            OomproofError: There are none.
        """
        self._channel.send(Wanted(model=model))
        answer = self._inbox.get()
        if isinstance(answer, NotFound):
            raise answer.error
        if not isinstance(answer, Found):
            _quit(f"{type(answer).__name__} came for a model")
        return answer


def _load(module: str, function: str, load: Load, parent: Parent, channel: _Channel) -> Engine:
    """The engine, or a failure and the end."""
    try:
        start: Start = getattr(import_module(module), function)
        engine = start(load, parent)
    except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor is told
        failed = _describe(error)
    else:
        channel.send(Ready(plan=engine.plan if isinstance(engine, HasPlan) else None))
        return engine
    channel.send(failed)
    sys.stderr.flush()
    # No clean-up: after some faults every further call fails, or hangs.
    os._exit(FAULTED)


class _Server:
    """Runs an engine by commands until it is told to close."""

    def __init__(self, engine: Engine, inbox: SimpleQueue[Command], channel: _Channel) -> None:
        self._engine, self._inbox, self._channel = engine, inbox, channel
        self._running: set[str] = set()

    def run(self) -> None:
        while True:
            try:
                if not self._advance():
                    return
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor is told
                failed = _describe(error)
            # Outside the handler: its traceback would keep alive what the step had allocated.
            self._recover(failed)

    def _advance(self) -> bool:
        """Takes what was commanded, waiting where there is nothing else to do, and runs a step."""
        while self._engine.idle or not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Close):
                return False
            self._obey(command)
        events = self._engine.step()
        for event in events:
            if isinstance(event, FinishedEvent):
                self._running.discard(event.request_id)
        self._channel.send_payload(write_step(events))
        return True

    def _obey(self, command: Command) -> None:
        match command:
            case Submit(request=request):
                try:
                    self._engine.submit(request)
                except RequestError as error:
                    # The plan may have become another one since the request was sent.
                    self._channel.send(Refused(request_id=request.id, error=error))
                else:
                    self._running.add(request.id)
            case Cancel(request_id=request_id):
                if request_id in self._running:
                    self._engine.cancel(request_id)
            case Measure():
                self._channel.send(Measured(terms=self._engine.measured_terms()))
            case Canary():
                self._channel.send(CanaryAnswer(tokens=self._sing(command)))
            case _:
                _quit(f"{type(command).__name__} came while serving")

    def _sing(self, canary: Canary) -> tuple[int, ...]:
        request = Request(
            id=_CANARY_ID,
            prompt_tokens=canary.prompt_tokens,
            max_new_tokens=canary.max_new_tokens,
            sampling=SamplingOptions(temperature=0.0),
        )
        self._engine.submit(request)
        events: list[Event] = []
        while not self._engine.idle:
            events += self._engine.step()
        return tuple(event.token for event in events if isinstance(event, TokenEvent))

    def _recover(self, failed: Failed) -> None:
        """Tells a failure; goes on where the process is sound and lets go of what was running."""
        alive = _is_sound(failed) and self._let_go()
        self._channel.send(replace(failed, alive=alive))
        if not alive:
            # No clean-up: after such a fault every further call fails, or hangs.
            sys.stderr.flush()
            os._exit(FAULTED)

    def _let_go(self) -> bool:
        """Takes out every request; whether that worked."""
        try:
            for request_id in (*self._running, _CANARY_ID):
                self._engine.cancel(request_id)
            self._engine.step()
        except Exception:  # noqa: BLE001 - then the process is not sound after all
            return False
        self._running.clear()
        return self._engine.idle


def _is_sound(failed: Failed) -> bool:
    """Whether the process may go on: memory ran out, or a request was wrong, and nothing broke."""
    if isinstance(failed.error, InputError):
        return True
    if isinstance(failed.error, LadderExhaustedError):
        # Its engine is gone; a fresh process has no caches, and begins again.
        return False
    return failed.fault is not None and failed.fault.fault_class is FaultClass.SHRINK


def _describe(error: Exception) -> Failed:
    traceback.print_exception(error)
    carried = getattr(error, "fault", None)
    fault = carried if isinstance(carried, Fault) else classify(error)
    if isinstance(error, EngineFaultError):
        # Its advice is for the process that it is in; the supervisor has better.
        return Failed(fault=fault, alive=False, type="a fault", text=error.message)
    return Failed(
        fault=fault,
        alive=False,
        type=type(error).__name__,
        text=str(error),
        error=error if isinstance(error, OomproofError) else None,
    )


def _listen(descriptor: int, inbox: SimpleQueue[Command]) -> None:
    reader = FrameReader()
    while piece := os.read(descriptor, _READ_BYTES):
        try:
            for payload in reader.feed(piece):
                inbox.put(read_command(payload))
        except ProtocolError as error:
            _quit(str(error))
    # The supervisor keeps its end open for as long as it lives.
    _end_group()


def _die_with(supervisor: int) -> None:
    """Asks Linux to end this process with its supervisor, also while it hangs in a call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        _end_group()


def _quit(why: str) -> NoReturn:
    sys.stderr.write(f"not served: {why}\n")
    sys.stderr.flush()
    os._exit(FAULTED)


def _end_group() -> NoReturn:
    """Ends this process, and the compilers that it may have started."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(FAULTED)
