"""An engine that outlives what its memory does: failures are classified, and answers go on.

It wraps whatever a factory starts and keeps a journal of every request. Where memory runs out, the
engine is given up as a whole, the ladder names the next plan, and what is left of every request is
submitted to an engine of that plan. No exception is kept while that happens: a traceback holds the
frames that hold the tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from oomproof.engine.admission import check_request
from oomproof.engine.messages import Event, Request, TokenScore
from oomproof.engine.protocol import Engine, Scores
from oomproof.errors import (
    EngineFaultError,
    InputError,
    LadderExhaustedError,
    NotRunnableError,
    OomproofError,
    RequestError,
)
from oomproof.faults.fault import FaultClass
from oomproof.guarding.journal import Journal
from oomproof.guarding.ladder import Ladder, LadderEvent, event_of
from oomproof.guarding.machine import Machine, free_caches
from oomproof.guarding.situation import Failure, Situation, Target, judge
from oomproof.guarding.waiting import retry_after_waiting
from oomproof.hardware.spec import Hardware
from oomproof.memory.terms import DeviceTerms
from oomproof.models.spec import ModelSpec
from oomproof.monitoring.events import MonitorEvent
from oomproof.monitoring.monitor import MonitoredEngine
from oomproof.planning.plan import Plan

log = logging.getLogger(__name__)

Start = Callable[[Target, Hardware], Engine]
"""Starts an engine; what it raises may hold tensors, what it returned is all there is."""
OnEvent = Callable[[LadderEvent | MonitorEvent], None]
"""Told of every rung, and of what the monitor finds; each has a `message`, a line for people."""
T = TypeVar("T")


class GuardedEngine:
    """Runs requests through engines of a factory; implements `engine.protocol.Engine`.

    Args:
        target: What to start from.
        start: The factory.
        hardware: The machine, as the plan found it.
        allowed: Rungs that the user allows, in order (`fallback.read_fallback`).
        on_event: Told of every rung that is taken.
        failure: Why the target cannot be started at all: the ladder begins at once.
        machine: What is free on it, and who holds the rest.

    Raises:
        LadderExhaustedError: Memory runs out while loading, and no allowed rung helps.
        EngineFaultError: A device failed for good while loading.
        OomproofError: As the factory raises it.
    """

    def __init__(
        self,
        target: Target,
        start: Start,
        *,
        hardware: Hardware,
        allowed: Sequence[str] = (),
        on_event: OnEvent | None = None,
        failure: Failure | None = None,
        machine: Machine | None = None,
    ) -> None:
        self._target, self._start = target, start
        self._machine = machine or Machine()
        self._on_event = on_event
        self._ladder = Ladder(allowed)
        self.inner: Engine | None = None
        """What runs by now; None while there is nothing."""
        self._broken: Engine | None = None
        """What met a fatal fault, until it is closed."""
        self._closed_terms: Mapping[int, DeviceTerms] | None = None
        """What was measured last, once it is closed."""
        self._journal = Journal()
        self._inside: set[str] = set()
        """Requests that the engine has."""
        self._interrupted: set[str] = set()
        self._ready: list[Event] = []
        self._one_by_one = False
        self._dead: Callable[[], OomproofError] | None = None
        self._is_loaded = False
        failure = failure or self._try_start(target, hardware)
        if failure is not None:
            self._recover(failure)
        self._is_loaded = True

    @property
    def target(self) -> Target:
        """What runs by now."""
        return self._target

    @property
    def plan(self) -> Plan:
        """The plan it runs by now."""
        return self._target.plan

    @property
    def counts(self) -> Mapping[str, int]:
        """Rung → how often it was taken."""
        return self._ladder.counts

    @property
    def idle(self) -> bool:
        """Whether no request is queued or active."""
        return not self._journal and not self._ready

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: Prompt and answer can never fit in the planned context.
            LadderExhaustedError, EngineFaultError: The engine has ended.
        """
        self._check()
        plan = self.plan
        check_request(
            request,
            context=plan.context,
            vocab_size=self._target.spec.vocab_size,
            max_context=plan.max_context,
        )
        self._journal.add(request)
        try:
            _, failure = self._attempt(self._feed)
        except RequestError:
            self._journal.drop(request.id)
            raise
        if failure is not None:
            self._recover(failure)

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; unknown ids are ignored."""
        entry = self._journal.get(request_id)
        if entry is None:
            return
        entry.is_cancelled = True
        if self.inner is not None and request_id in self._inside:
            self.inner.cancel(request_id)

    def step(self) -> Sequence[Event]:
        """Advances every active request by a prefill chunk or a token.

        Where memory runs out it recovers instead, and nothing new is handed out.

        Raises:
            LadderExhaustedError: No allowed rung helps; every running request has ended.
            EngineFaultError: A device failed for good; every running request has ended.
        """
        self._check()
        events, failure = self._attempt(self._advance)
        if failure is not None:
            self._recover(failure)
        ready, self._ready = self._ready, []
        return [*ready, *self._record(events or ())]

    def score(self, tokens: Sequence[int], first: int) -> Sequence[TokenScore]:
        """How likely given tokens are; see Scores. It recovers as `step` does, and asks again.

        Raises:
            NotRunnableError: The engine does not tell.
            LadderExhaustedError, EngineFaultError: As `step`.
        """
        while True:
            self._check()
            scores, failure = self._attempt(lambda inner: _score(inner, tokens, first))
            if failure is None:
                return scores or ()
            self._recover(failure)

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        """Device index → bytes measured so far, of the engine that runs now."""
        if self._closed_terms is not None:
            return self._closed_terms
        while True:
            self._check()
            terms, failure = self._attempt(lambda inner: inner.measured_terms())
            if failure is None:
                return terms or {}
            self._recover(failure)

    def close(self) -> None:
        """Gives the model's memory back."""
        self._closed_terms = self._closed_terms or {}
        self._journal.clear()
        inner, self.inner, self._broken = self.inner, None, None
        if inner is not None:
            if (failure := _worse(inner.close)) is not None:
                raise self._end(failure, None)
            self._closed_terms = inner.measured_terms()

    def _check(self) -> None:
        if self._dead is not None:
            raise self._dead()
        if self._closed_terms is not None:
            raise RuntimeError("the engine is closed")
        if self.inner is None:
            # A recovery was interrupted: by Ctrl-C, say.
            failure = self._try_start(self._target, self._machine.measure(self.plan))
            if failure is not None:
                self._recover(failure)

    def _attempt(self, call: Callable[[Engine], T]) -> tuple[T | None, Failure | None]:
        """What a call of the engine gives, or its failure; what is the user's is raised."""
        assert self.inner is not None
        try:
            return call(self.inner), None
        except Exception as error:
            failure = self._judged(error)
            if failure is None:
                raise
        return None, failure

    def _judged(self, error: Exception) -> Failure | None:
        """As `judge`; where memory ran out, what is known of it is kept while it is still held."""
        failure = judge(error)
        if failure is None or failure.fault.fault_class is not FaultClass.SHRINK:
            return failure
        return replace(failure, kept=self._machine.keep(error, self.plan, self.inner))

    def _advance(self, inner: Engine) -> Sequence[Event]:
        self._feed(inner)
        return inner.step()

    def _feed(self, inner: Engine) -> None:
        """Hands the engine what it does not have yet; one by one, where that rung was taken."""
        for entry in self._journal:
            request_id = entry.request.id
            if request_id in self._inside:
                continue
            if entry.is_cancelled:
                self._journal.drop(request_id)
                self._ready.append(entry.cancelled())
                continue
            if self._one_by_one and self._inside:
                return
            inner.submit(entry.rest(arithmetic_of(self.plan)))
            self._inside.add(request_id)

    def _record(self, events: Sequence[Event]) -> list[Event]:
        told = self._journal.record(events)
        if not told:
            return told
        unfinished = set(self._journal.ids)
        self._inside &= unfinished
        self._interrupted &= unfinished
        if not self._interrupted:
            self._one_by_one = False
            self._ladder.rest()
        return told

    def _recover(self, failure: Failure) -> None:
        """Goes down the ladder until an engine has every unfinished request again."""
        found: Failure | None = failure
        while found is not None:
            found = self._drop(found)
            self._interrupted = set(self._journal.ids)
            if found.is_fatal:
                raise self._end(found, None)
            found = self._take_next(found)
            if found is None:
                _, found = self._attempt(self._feed)

    def _drop(self, failure: Failure) -> Failure:
        """Gives the engine up, with all that it holds; the worse of its failures."""
        inner, self.inner = self.inner, None
        self._inside.clear()
        if failure.is_fatal:
            # Every call of CUDA fails from here on, those of closing and of destructors too: a
            # process that ends now must not have run them.
            self._broken = inner
            if isinstance(inner, MonitoredEngine):
                inner.sampler.close()
            return failure
        closing = None if inner is None else _worse(inner.close)
        # What it holds is not garbage before the last name of it is gone.
        inner = None
        return closing or _worse(free_caches) or failure

    def _take_next(self, failure: Failure) -> Failure | None:
        """Takes a rung and starts its plan; its failure."""
        situation = self._situation(failure)
        try:
            rung, proposal = self._ladder.next(situation)
        except LadderExhaustedError as error:
            ended = error.with_traceback(None)
        else:
            self._tell(event_of(rung, proposal, situation))
            self._one_by_one = self._one_by_one or proposal.one_by_one
            if not proposal.waits:
                return self._try_start(proposal.target, proposal.hardware or situation.hardware)
            return retry_after_waiting(
                lambda: self._try_start(proposal.target, self._machine.measure(self.plan)),
                tell=lambda seconds: self._tell(
                    LadderEvent(
                        rung=rung.name,
                        plan=self.plan,
                        message=f"waiting {seconds:.1f} s for "
                        + ("; ".join(map(str, situation.holders[:3])) or "the device"),
                    )
                ),
                sleep=self._machine.sleep,
            )
        raise self._end(failure, ended)

    def _try_start(self, target: Target, hardware: Hardware) -> Failure | None:
        # What comes next builds on what was tried last, whether it starts or not.
        self._target = target
        try:
            self.inner = self._start(target, hardware)
        except Exception as error:
            failure = self._judged(error)
            if failure is None:
                raise
            failure = replace(failure, while_starting=True)
        else:
            if isinstance(self.inner, MonitoredEngine) and self.counts:
                self.inner.sampler.tell_rungs(self.counts)
            return None
        return failure if failure.is_fatal else _worse(free_caches) or failure

    def _situation(self, failure: Failure) -> Situation:
        plan = self.plan
        return Situation(
            target=self._target,
            failure=failure,
            hardware=self._machine.measure(plan),
            least_context=self._journal.most_tokens,
            requests=len(self._journal),
            has_answers=self._journal.has_answers,
            holders=self._machine.holders(plan),
            find=_too_late if self._is_loaded else self._machine.find,
        )

    def _tell(self, event: LadderEvent) -> None:
        tell_rung(event, self._on_event)

    def _end(self, failure: Failure, exhausted: LadderExhaustedError | None) -> OomproofError:
        """Ends every request; from here on every call raises the same."""
        ids = self._journal.ids
        self._journal.clear()
        self._ready.clear()
        if exhausted is not None:
            text, tried, remedy = failure.text, exhausted.tried, exhausted.remedy
            self._dead = lambda: LadderExhaustedError(
                text,
                fault=failure.fault,
                tried=tried,
                shortfall_bytes=failure.missing_bytes,
                remedy=remedy,
            )
        else:
            self._dead = lambda: EngineFaultError(
                failure.text,
                fault=failure.fault,
                request_ids=ids,
                remedy="every later call of CUDA in this process fails too: start a fresh one"
                if failure.fault.fault_class is FaultClass.PROCESS
                else "no process works on this GPU until it was reset: see `oomproof doctor`",
            )
        return self._dead()


def tell_rung(event: LadderEvent, on_event: OnEvent | None) -> None:
    """Tells of a rung; where nobody listens, the logger is the one to tell."""
    log.log(logging.WARNING if on_event is None else logging.INFO, "%s", event.message)
    if on_event is not None:
        on_event(event)


def arithmetic_of(plan: Plan) -> tuple[str, ...]:
    """What decides the bits of a plan's answers, where its engine can compute them again.

    Our own on GPUs, that read weights at the memory's speed: elsewhere an answer's tokens one by
    one would take too long, and are a part of the prompt.
    """
    devices = plan.devices_in_use
    if plan.engine != "native" or any(
        device.kind != "cuda" or device.streamed_layers is not None for device in devices
    ):
        return ()
    layers = [str(device.layers) for device in devices]
    searched = ("searched",) if plan.search else ()
    mixed = (f"{tensor}: {name}" for tensor, name in plan.tensor_formats.items())
    kinds = (plan.format, *mixed, *searched, plan.kv_format, plan.compute_dtype)
    return (plan.fingerprint, *kinds, *layers)


def _too_late(_model: str) -> ModelSpec:
    raise InputError("a model that is loaded already has its tokenizer, and no other's")


def _worse(give_back: Callable[[], None]) -> Failure | None:
    """The fatal failure that giving memory back meets; any other leaves it no less given back."""
    try:
        give_back()
    except Exception as error:
        failure = judge(error)
        if failure is None:
            raise
        return failure if failure.is_fatal else None
    return None


def _score(inner: Engine, tokens: Sequence[int], first: int) -> Sequence[TokenScore]:
    if not isinstance(inner, Scores):
        raise NotRunnableError(
            "this engine does not tell how likely given tokens are", remedy="use --engine native"
        )
    return inner.score(tokens, first)
