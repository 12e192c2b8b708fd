"""The parent's side: `engine.protocol.Engine` whose model is in a process of its own.

The worker runs ahead of what is read, by as much as a pipe holds; an answer that is cancelled ends
with what was read. A request is answered by one worker from beginning to end, or fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from oomproof.engine.admission import check_request
from oomproof.engine.messages import Event, FinishedEvent, Request, TokenEvent
from oomproof.errors import LadderExhaustedError, OomproofError, RequestError, WorkerError
from oomproof.guarding.engine import OnEvent
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import Plan
from oomproof.worker.launch import Launch, Limits
from oomproof.worker.messages import Cancel, Measure, Measured, Refused, Stepped, Submit
from oomproof.worker.supervisor import Loaded, Supervisor

_LOST = (WorkerError, LadderExhaustedError)
"""What those are told whose worker is gone."""


@dataclass(slots=True)
class _Running:
    """A request that the worker knows."""

    request: Request
    wire_id: str
    new_tokens: int = 0
    """Of its answer, read so far."""


class WorkerEngine:
    """Runs requests in a supervised child process; used from one thread.

    The child is started at once and `begin` waits for it, so that other things can be done
    meanwhile. What was running when a worker failed raises WorkerError from `step`, and again from
    a `step` that has nothing else to do; the next `submit` waits for the next worker. The ladder is
    in the child: a rung is told here, its plan is `plan`, and answers go on; where none helps, what
    was running raises LadderExhaustedError and the worker is replaced.

    Args:
        launch: What to load.
        limits: How long to wait, how often to start again; None for what suits the plan.
        on_event: Told of rungs that are taken, and of what the monitor finds.
    """

    def __init__(
        self, launch: Launch, limits: Limits | None = None, on_event: OnEvent | None = None
    ) -> None:
        self._supervisor = Supervisor(launch, limits, on_event=on_event)
        self._running: dict[str, _Running] = {}
        """By the ids that the worker knows."""
        self._wire_ids: dict[str, str] = {}
        self._dropped: set[str] = set()
        """Cancelled here and not yet there."""
        self._lost: dict[str, _Running] = {}
        self._error: OomproofError | None = None
        self._refusal: RequestError | None = None
        """Of a request that the door let in before the plan became another one; not told yet."""
        self._events: list[Event] = []
        """Not told yet."""
        self._ids = itertools.count()

    @property
    def pid(self) -> int:
        """Of the process that there is now."""
        return self._supervisor.pid

    @property
    def plan(self) -> Plan:
        """The plan that the worker runs by now."""
        return self._supervisor.launch.plan

    @property
    def folder(self) -> Path:
        """Where the files of the model are that it runs by now."""
        return self._supervisor.launch.folder

    @property
    def failures(self) -> Sequence[OomproofError]:
        """Everything that a worker was replaced for, or given up."""
        return tuple(self._supervisor.failures)

    def begin(self, told: Loaded | None = None) -> None:
        """Waits until the model is loaded.

        Args:
            told: Told of bytes loaded, and how many there are.

        Raises:
            OomproofError: What loading met, of the type it had there.
            WorkerError: The process died, hung, or met a fault.
        """
        self._supervisor.begin(told)

    @property
    def idle(self) -> bool:
        """Whether no request is queued or active."""
        return not self._running and not self._events

    def submit(self, request: Request) -> None:
        """Queues a request, at a worker that has proved itself.

        Raises:
            RequestError: Prompt and answer can never fit in the planned context.
            WorkerDownError: There is no worker any more.
            WorkerError, LadderExhaustedError: The worker failed meanwhile, and requests with it.
        """
        launch = self._supervisor.launch
        check_request(
            request,
            context=launch.plan.context,
            vocab_size=launch.vocab_size,
            max_context=launch.plan.max_context,
        )
        running = _Running(request=request, wire_id=str(next(self._ids)))
        sent = False
        while not sent:
            self._admit()
            try:
                self._supervisor.send(Submit(request=replace(request, id=running.wire_id)))
                sent = True
            except _LOST as error:
                if self._running:
                    self._lose(error)
                    raise
                # Nobody lost anything: it waits for the next worker, if there is one.
        self._running[running.wire_id] = running
        self._wire_ids[request.id] = running.wire_id

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; unknown ids are ignored."""
        wire_id = self._wire_ids.pop(request_id, None)
        running = None if wire_id is None else self._running.pop(wire_id)
        if running is not None:
            self._dropped.add(running.wire_id)
            try:
                self._supervisor.send(Cancel(request_id=running.wire_id))
            except _LOST as error:
                self._lose(error)
        else:
            running = self._lost.pop(request_id, None)
        if running is not None:
            self._events.append(
                FinishedEvent(
                    request_id=request_id,
                    reason="cancelled",
                    prompt_tokens=len(running.request.prompt_tokens),
                    new_tokens=running.new_tokens,
                )
            )

    def step(self) -> Sequence[Event]:
        """The events of at least one step of the worker; nothing when idle.

        Raises:
            WorkerError: The worker failed, and every running request with it.
            LadderExhaustedError: Memory ran out, no rung helps, and likewise.
            RequestError: The plan has become another one, with no room for a request.
        """
        if self._running and not self._events:
            try:
                self._take(self._supervisor.receive())
                while self._supervisor.has_unread:
                    self._take(self._supervisor.receive())
            except _LOST as error:
                self._lose(error)
                raise
            if self._refusal is not None:
                refusal, self._refusal = self._refusal, None
                raise refusal
        elif self._lost and not self._events:
            assert self._error is not None
            raise self._error
        events, self._events = self._events, []
        return events

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        """Device index → bytes measured so far.

        Raises:
            WorkerError: The worker failed.
        """
        self._admit()
        try:
            self._supervisor.send(Measure())
            while not isinstance(report := self._supervisor.receive(), Measured):
                self._take(report)
        except _LOST as error:
            self._lose(error)
            raise
        return report.terms

    def close(self) -> None:
        """Ends the process, and with it all of the model's memory."""
        self._running.clear()
        self._wire_ids.clear()
        self._supervisor.close()

    def _admit(self) -> None:
        """Waits for a worker that serves; one that failed while nothing ran fails nobody."""
        error = self._supervisor.check("answering" if self._running else "waiting")
        if error is not None and self._running:
            self._lose(error)
            raise error
        self._supervisor.admit()

    def _take(self, report: object) -> None:
        """Turns a report into events under the ids of their requests."""
        if isinstance(report, Refused) and report.request_id in self._running:
            refused = self._running.pop(report.request_id)
            self._wire_ids.pop(refused.request.id, None)
            self._lost[refused.request.id] = refused
            self._error = self._refusal = report.error
            return
        if isinstance(report, Refused):
            self._dropped.discard(report.request_id)
            return
        if not isinstance(report, Stepped):
            raise self._supervisor.refuse(f"{type(report).__name__} while answering")
        for event in report.events:
            running = self._running.get(event.request_id)
            if running is None:
                if event.request_id not in self._dropped:
                    raise self._supervisor.refuse("an event of a request that it does not have")
                if isinstance(event, FinishedEvent):
                    self._dropped.discard(event.request_id)
                continue
            if isinstance(event, TokenEvent):
                running.new_tokens += 1
            else:
                del self._running[event.request_id]
                self._wire_ids.pop(running.request.id, None)
            self._events.append(replace(event, request_id=running.request.id))

    def _lose(self, error: OomproofError) -> None:
        """What was running is lost with its worker; nothing that it said last is told."""
        self._error = error
        self._lost.update((one.request.id, one) for one in self._running.values())
        self._events = [event for event in self._events if event.request_id not in self._lost]
        self._running.clear()
        self._wire_ids.clear()
        self._dropped.clear()
