"""A child process, its two pipes, its last words and its end.

One thread starts the child, reads its reports and reaps it: Linux sends a child the signal that it
asked for when the *thread* that started it ends, so this thread must live as long as the child. A
second one keeps the last lines that the child prints. Neither is ever interrupted by Ctrl-C, so no
report is torn.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from typing import IO

from oomproof.worker.frames import FrameReader, ProtocolError, frame
from oomproof.worker.messages import Report
from oomproof.worker.wire import read_report

TAIL_BYTES = 16_384
"""Of what a child prints, kept for error reports."""
_READ_BYTES = 65536
_BATCHES = 64
"""Reads that wait for their consumer before the child has to."""
_LAST_WORDS_S = 1.0
_REAP_S = 10.0
_PIPE_ATOMIC_BYTES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The child is gone, and was reaped."""

    returncode: int
    """As subprocess gives it: negative for a signal."""
    garbled: str | None = None
    """What it sent that was no report; it was killed for that."""


class _Shared:
    """What the threads know; they do not hold the process object, so that it can be collected."""

    def __init__(self) -> None:
        self.inbox: Queue[Sequence[Report | Ended]] = Queue(maxsize=_BATCHES)
        self.lock = threading.Lock()
        self.started = threading.Event()
        self.refused: OSError | None = None
        self.pid: int | None = None
        """Of the child, and of its group."""
        self.may_signal = False
        """Not once the child may be reaped: its number may be another's then."""
        self.thread: threading.Thread | None = None
        self.tail = bytearray()
        self.ended: Ended | None = None

    def signal(self, number: int) -> None:
        """Signals the child's whole group, where it is not gone."""
        with self.lock:
            if self.pid is not None and self.may_signal:
                # macOS refuses to signal a group of zombies.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, number)


class WorkerProcess:
    """A child that takes commands and gives reports.

    Args:
        command: Makes its command line from the numbers of its ends of the pipes.
        environment: Its variables, all of them.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(
        self, command: Callable[[int, int], Sequence[str]], environment: Mapping[str, str]
    ) -> None:
        childs_commands, self._commands = os.pipe()
        reports, childs_reports = os.pipe()
        os.set_blocking(self._commands, False)
        self._shared = shared = _Shared()
        arguments = command(childs_commands, childs_reports)
        self._finalizer = weakref.finalize(self, _finish, shared, self._commands, os.getpid())
        shared.thread = threading.Thread(
            target=_attend,
            args=(shared, arguments, environment, (childs_commands, childs_reports), reports),
            name="oomproof worker",
            daemon=True,
        )
        shared.thread.start()
        shared.started.wait()
        if shared.refused is not None:
            self._finalizer()
            raise shared.refused
        assert shared.pid is not None
        self.pid = shared.pid
        """Of the child."""

    def send(self, payload: bytes, timeout_s: float) -> None:
        """Sends a command, whole; the child reads all the time.

        Raises:
            TimeoutError: It does not.
            BrokenPipeError: It is gone.
        """
        data = memoryview(frame(payload))
        deadline = time.monotonic() + timeout_s
        sent = 0
        try:
            while sent < len(data):
                try:
                    sent += os.write(self._commands, data[sent:])
                except BlockingIOError:
                    self._wait_for_room(deadline)
        except BaseException:
            # Such as Ctrl-C: half a command cannot be taken back.
            if sent or len(data) > _PIPE_ATOMIC_BYTES:
                self.kill()
            raise

    def _wait_for_room(self, deadline: float) -> None:
        poller = select.poll()
        poller.register(self._commands, select.POLLOUT)
        if not poller.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            raise TimeoutError

    def receive(self, timeout_s: float) -> Sequence[Report | Ended]:
        """The reports that came together, at least one; the very last is `Ended`.

        Raises:
            TimeoutError: None came.
        """
        if self._shared.ended is not None and self._shared.inbox.empty():
            # Told again to whom Ctrl-C interrupted while it was told.
            return [self._shared.ended]
        try:
            return self._shared.inbox.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError from None

    def poll(self) -> Sequence[Report | Ended]:
        """The reports that are here already."""
        found: list[Report | Ended] = []
        with suppress(Empty):
            while True:
                found += self._shared.inbox.get_nowait()
        return found

    def terminate(self) -> None:
        """Asks it to end, also while it loads."""
        self._shared.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and whatever it started, at once."""
        self._shared.signal(signal.SIGKILL)

    def finish(self, timeout_s: float) -> None:
        """Waits for its end, kills it where that does not come, and closes the pipes."""
        _wait(self._shared, timeout_s)
        self._finalizer()

    @property
    def last_words(self) -> str:
        """The last lines that it printed."""
        return bytes(self._shared.tail).decode(errors="replace")


def _attend(
    shared: _Shared,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    childs: tuple[int, int],
    reports: int,
) -> None:
    """The life of a child, from its start to its end."""
    try:
        process = subprocess.Popen(
            arguments,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=childs,
            process_group=0,
        )
    except OSError as error:
        shared.refused = error
        os.close(reports)
        return
    finally:
        for descriptor in childs:
            os.close(descriptor)
        if shared.refused is not None:
            shared.started.set()
    shared.pid, shared.may_signal = process.pid, True
    shared.started.set()
    assert process.stdout is not None
    talk = threading.Thread(target=_keep_tail, args=(process.stdout, shared.tail), daemon=True)
    talk.start()
    garbled = _read_reports(reports, shared.inbox)
    shared.signal(signal.SIGKILL)
    with shared.lock:
        shared.may_signal = False
    returncode = process.wait()
    talk.join(_LAST_WORDS_S)
    shared.ended = Ended(returncode=returncode, garbled=garbled)
    shared.inbox.put([shared.ended])


def _read_reports(reports: int, inbox: Queue[Sequence[Report | Ended]]) -> str | None:
    """Hands reports over until the child closes its end; what was no report, where one was not."""
    reader = FrameReader()
    try:
        while piece := os.read(reports, _READ_BYTES):
            if batch := [read_report(payload) for payload in reader.feed(piece)]:
                inbox.put(batch)
    except ProtocolError as error:
        return str(error)
    finally:
        os.close(reports)
    return None


def _keep_tail(stream: IO[bytes], tail: bytearray) -> None:
    with stream:
        while piece := os.read(stream.fileno(), _READ_BYTES):
            tail += piece
            del tail[:-TAIL_BYTES]


def _wait(shared: _Shared, timeout_s: float) -> None:
    """Waits until the child is reaped, taking the reports that nobody reads any more."""
    deadline = time.monotonic() + timeout_s
    while shared.thread is not None and shared.thread.is_alive() and time.monotonic() < deadline:
        shared.thread.join(0.002)
        with suppress(Empty):
            while True:
                shared.inbox.get_nowait()


def _finish(shared: _Shared, commands: int, owner: int) -> None:
    """Nothing of a child is left behind; also at this process's exit, and not in a fork of it."""
    if os.getpid() != owner:
        return
    shared.signal(signal.SIGKILL)
    _wait(shared, _REAP_S)
    os.close(commands)
