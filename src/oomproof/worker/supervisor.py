"""Keeps one worker serving: starts it, proves it with a canary, replaces it, or gives it up.

loading → proving → serving, and back to loading when it fails; down once it failed too often, or
on a broken device. A worker that has not given the canary's first answer again serves nobody; the
first answer of a plan is what later ones of that plan are held against.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from oomproof.errors import (
    OomproofError,
    WorkerDownError,
    WorkerError,
)
from oomproof.guarding.engine import OnEvent, tell_rung
from oomproof.guarding.ladder import LadderEvent
from oomproof.hardware.cgroup import oom_kills
from oomproof.monitoring.events import MonitorEvent
from oomproof.worker.course import Course
from oomproof.worker.failures import (
    FailedError,
    Failure,
    as_down,
    as_told,
    failure_of,
    hung,
    nonsense,
)
from oomproof.worker.launch import Launch, Limits, command, environment
from oomproof.worker.messages import (
    CanaryAnswer,
    Close,
    Command,
    Load,
    Progress,
    Ready,
    Report,
    Told,
    Wanted,
)
from oomproof.worker.process import Ended, WorkerProcess
from oomproof.worker.wire import write

_log = logging.getLogger(__name__)
_KILL_S = 10.0
_LONGEST_PAUSE_S = 8.0

Loaded = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in all)."""


class Supervisor:
    """One worker after another, each for the same model.

    The first one is started at once; `begin` waits for it.

    Args:
        launch: What to load.
        limits: How long to wait, how often to start again; None for what suits the plan.
        on_event: Told of rungs that the worker takes, and of what its monitor finds.
        clock: Seconds, for the window in which replacements are counted.
        sleep: Waits before a replacement where the one before could not load.

    Raises:
        WorkerError: No process can be started.
    """

    def __init__(
        self,
        launch: Launch,
        limits: Limits | None = None,
        *,
        on_event: OnEvent | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._course = Course(launch, limits)
        self._on_event = on_event
        self._clock, self._sleep = clock, sleep
        self._state: Literal["loading", "proving", "serving", "down", "closed"] = "loading"
        self._replaced: deque[float] = deque()
        self._unread: deque[Report | Ended] = deque()
        self.failures: list[OomproofError] = []
        """Everything that a worker was replaced for, or given up."""
        self._down: WorkerDownError | None = None
        self._oom_kills: int | None = None
        """Of this control group, when the worker was started."""
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Of the worker that there is now."""
        return self._process.pid

    @property
    def launch(self) -> Launch:
        """What is loaded by now: another plan after a rung that changed it."""
        return self._course.launch

    def begin(self, told: Loaded | None = None) -> None:
        """Waits for the first worker, and keeps its canary's answer; it is not replaced.

        Raises:
            OomproofError: What the model's loading met, of the type it had there.
            WorkerError: It died, hung, or met a fault.
        """
        try:
            self._wait_until_loaded(told)
            self._prove()
        except FailedError as failed:
            self.close()
            raise self._with_last_words(failed.failure.error) from None
        except BaseException:
            self.close()
            raise
        self._state = "serving"

    def check(self, doing: str) -> OomproofError | None:
        """Looks whether the serving worker failed meanwhile; it is being replaced then.

        Args:
            doing: What it was to do meanwhile, for the error.
        """
        if self._state != "serving":
            return None
        self._unread += self._process.poll()
        try:
            for report in tuple(self._unread):
                if failure := self._failure_of(report, doing):
                    return self._replace(failure)
                if isinstance(report, Told):
                    # A rung's plan is what the next worker loads, so it is not dropped with it.
                    self._unread.remove(report)
                    self._hear(report.event)
        except FailedError as failed:
            return self._replace(failed.failure)
        return None

    def admit(self) -> None:
        """Waits until a worker serves, through as many replacements as there may be.

        Raises:
            WorkerDownError: There is none any more.
        """
        while self._state != "serving":
            if self._state == "closed":
                raise RuntimeError("the engine is closed")
            if self._down is not None:
                raise self._down
            try:
                if self._state == "loading":
                    self._wait_until_loaded(None)
                self._prove()
            except FailedError as failed:
                self._replace(failed.failure)
            else:
                self._state = "serving"

    def send(self, message: Command) -> None:
        """Tells the worker something.

        Raises:
            WorkerError, LadderExhaustedError: It is gone, or reads nothing; it is being replaced.
        """
        try:
            self._send(message)
        except FailedError as failed:
            raise self._replace(failed.failure) from None

    def receive(self) -> Report:
        """The worker's next report, within the limit of a step.

        Raises:
            WorkerError, LadderExhaustedError: It failed; it is being replaced.
        """
        try:
            return self._receive(self._course.limits.step_s, "answering")
        except FailedError as failed:
            raise self._replace(failed.failure) from None

    @property
    def has_unread(self) -> bool:
        """Whether a report is here already that `receive` gives."""
        return any(not isinstance(report, Told | Progress) for report in self._unread)

    def refuse(self, why: str) -> OomproofError:
        """Replaces a worker that said what it cannot mean; its error."""
        return self._replace(nonsense(why))

    def close(self) -> None:
        """Ends the worker, in order where it serves; nothing of it is left."""
        if self._state in ("closed", "down"):
            self._state = "closed"
            return
        serving, self._state = self._state == "serving", "closed"
        if serving:
            with suppress(OSError):
                self._process.send(write(Close()), self._course.limits.close_s)
        else:
            self._process.terminate()
        self._process.finish(self._course.limits.close_s)

    def _start(self) -> WorkerProcess:
        """A new child, which begins to load."""
        launch = self.launch
        self._oom_kills = oom_kills()
        try:
            process = WorkerProcess(
                lambda commands, reports: command(launch, commands, reports),
                environment(launch, os.environ),
            )
        except OSError as error:
            raise WorkerError(f"no process can be started for the model: {error}") from error
        load = Load(
            plan=launch.plan.to_json(indent=None),
            folder=str(launch.folder.absolute()),
            trust_remote_code=launch.trust_remote_code,
            allowed=launch.allowed,
        )
        # A child that is gone already is found when its first report is waited for.
        with suppress(OSError):
            process.send(write(load), self._course.limits.load_s)
        return process

    def _wait_until_loaded(self, told: Loaded | None) -> None:
        while True:
            match self._receive(self._course.limits.load_s, "loading"):
                case Progress(done=done, total=total):
                    if told is not None:
                        told(done, total)
                case Wanted(model=model):
                    self._send(self._course.find(model))
                case Ready(plan=plan):
                    if plan is not None:
                        self._course.follow(plan)
                    self._state = "proving"
                    return
                case other:
                    raise FailedError(nonsense(f"{type(other).__name__} while loading"))

    def _prove(self) -> None:
        """Compares the canary's answer with the first one that was given under this plan."""
        proof: tuple[object, ...] = ()
        tokens: tuple[int, ...] = ()
        # A rung in the middle of an answer makes it one of two plans.
        while proof != self.launch.proof:
            proof, canary = self.launch.proof, self.launch.canary
            if canary is None:
                return
            self._send(canary)
            report = self._receive(self._course.limits.step_s, "answering its canary")
            if not isinstance(report, CanaryAnswer):
                raise FailedError(nonsense(f"{type(report).__name__} for a canary"))
            tokens = report.tokens
        self._course.compare(proof, tokens)

    def _hear(self, event: LadderEvent | MonitorEvent) -> None:
        """Tells what the worker tells; a rung's plan is the worker's from here on."""
        if isinstance(event, LadderEvent):
            self._course.follow(event.plan)
            tell_rung(event, self._on_event)
            return
        _log.warning("%s: %s", self.launch.plan.model, event.message)
        if self._on_event is not None:
            self._on_event(event)

    def _send(self, message: Command) -> None:
        try:
            self._process.send(write(message), self._course.limits.step_s)
        except TimeoutError:
            raise FailedError(hung("reading", self._course.limits.step_s)) from None
        except BrokenPipeError:
            # Why it is gone is among its reports.
            while True:
                self._receive(_KILL_S, "answering")

    def _receive(self, timeout_s: float, doing: str) -> Report:
        while True:
            if not self._unread:
                try:
                    self._unread += self._process.receive(timeout_s)
                except TimeoutError:
                    raise FailedError(hung(doing, timeout_s)) from None
            report = self._unread.popleft()
            if failure := self._failure_of(report, doing):
                raise FailedError(failure)
            match report:
                case Told(event=event):
                    self._hear(event)
                case Progress() if self._state != "loading":
                    pass
                case Ended():
                    raise AssertionError("an end is a failure")
                case _:
                    return report
            # It goes down its ladder: what comes next may take as long as loading.
            timeout_s = max(timeout_s, self._course.limits.load_s)

    def _failure_of(self, report: Report | Ended, doing: str) -> Failure | None:
        return failure_of(
            report,
            doing=doing,
            oom_kills=(self._oom_kills, oom_kills()),
            stderr=self._process.last_words,
        )

    def _replace(self, failure: Failure) -> OomproofError:
        """Lets go of a worker that failed and starts the next one, where there may be one."""
        error = failure.error
        self.failures.append(error)
        if failure.alive:
            self._state = "proving"
            self._unread.clear()
            return as_told(error)
        could_load = self._state != "loading"
        self._process.kill()
        self._process.finish(_KILL_S)
        self._unread.clear()
        self._with_last_words(error)
        why_not = self._why_no_other(failure)
        if why_not is None:
            if not could_load:
                # Such as memory that the one before, or somebody else, has not given back yet.
                self._sleep(min(_LONGEST_PAUSE_S, 2.0 ** (len(self._replaced) - 1)))
            _log.warning("%s; it is started again", error)
            try:
                self._process = self._start()
            except WorkerError as refused:
                why_not = str(refused)
            else:
                self._state = "loading"
                return as_told(error)
        self._state = "down"
        self._down = as_down(error, why_not)
        return self._down

    def _with_last_words(self, error: OomproofError) -> OomproofError:
        """The error with everything that its process wrote, now that it is gone."""
        if isinstance(error, WorkerError):
            error.stderr = self._process.last_words
        return error

    def _why_no_other(self, failure: Failure) -> str | None:
        """Why a worker that failed is not replaced; None where it is, which counts."""
        if failure.final:
            return "its GPU is broken; see `oomproof doctor`"
        now = self._clock()
        while self._replaced and now - self._replaced[0] >= self._course.limits.window_s:
            self._replaced.popleft()
        if len(self._replaced) >= self._course.limits.restarts:
            return (
                f"it failed {len(self._replaced) + 1} times within "
                f"{self._course.limits.window_s / 60:g} minutes"
            )
        self._replaced.append(now)
        return None
