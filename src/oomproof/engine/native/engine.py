"""The native engine: requests in, events out, over memory that was planned.

Requests are admitted to slots while there are KV pages for their prompt and answer; each step moves
every request by a prefill chunk or a token, the decoding ones together. Where decode steps are
recorded the next one is launched before the tokens of the last are handed out: the GPU computes
while the caller looks at them. On one device it is launched before they have even come to the host,
if all requests may go on: one that a stop token ends then has a row too many, which nobody reads.
It knows nothing of text.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from oomproof.engine.admission import check_request
from oomproof.engine.messages import (
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    TokenEvent,
    TokenScore,
)
from oomproof.engine.native.device import NativeDevice
from oomproof.engine.native.kv_pool import PageAllocator
from oomproof.engine.native.meter import NativeMeter
from oomproof.engine.native.pipeline import Drawn, Pipeline
from oomproof.engine.native.scoring import check_tokens, score_tokens
from oomproof.engine.native.workspaces import (
    clear_workspaces,
    give_up_workspaces,
    keep_workspaces,
)
from oomproof.loading.devices import release_devices
from oomproof.memory.native import chunk_tokens, layer_pages
from oomproof.memory.terms import DeviceTerms
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import Plan


@dataclass(slots=True)
class _Active:
    """A request in its slot."""

    request: Request
    slot: int
    position: int = 0
    """Tokens already in the cache."""
    pending: tuple[int, ...] = ()
    """Tokens to process next: what is left of the prompt, or the last token drawn."""
    new_tokens: int = 0
    retired: bool = False
    replay: deque[int] = field(default_factory=deque)
    """Tokens of its answer that come after `pending`, whatever is drawn; see Request.replays."""
    decodes: bool = False
    """Whether the prompt is done."""
    replays: bool = False
    """Whether `pending` is one of those, and its draw not known to the sampler yet."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A decode step that was launched."""

    rows: list[_Active]
    greedy: bool
    turn: int
    """What the pipeline finds its tokens by."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a token that was drawn."""

    active: _Active
    drawn: Drawn
    row: int
    new_tokens: int
    """Of the request, this one counted."""
    is_handed_out: bool
    finished: FinishReason | None


class NativeEngine:
    """Runs requests on devices that a plan filled; implements `engine.protocol.Engine`.

    Args:
        devices: With their weights loaded and pools allocated.
        plan: The plan they were built from.
        spec: The model.
        meter: Measures the devices since before the first of them was built.
    """

    def __init__(
        self, devices: Sequence[NativeDevice], plan: Plan, spec: ModelSpec, meter: NativeMeter
    ) -> None:
        self._plan, self._spec, self._meter = plan, spec, meter
        self._chunk = chunk_tokens(plan.context)
        rows = max(self._chunk, plan.concurrency)
        self._pipeline: Pipeline | None = Pipeline(devices, rows, plan.concurrency)
        windows = {layer.sliding_window or 0: layer for layer in spec.attention}
        self._pages = {
            window: PageAllocator(plan.concurrency, layer_pages(layer, plan.context))
            for window, layer in windows.items()
        }
        self._free_slots = list(range(plan.concurrency))[::-1]
        self._waiting: deque[Request] = deque()
        self._active: list[_Active] = []
        self._cancelled: set[str] = set()
        self._flying: _Flight | None = None
        """What is being computed."""
        keep_workspaces(self)
        self._pipeline.capture(self._chunk)
        self._flies_ahead = self._pipeline.is_recorded
        meter.captured()

    @property
    def idle(self) -> bool:
        """Whether no request is queued or active."""
        return not self._waiting and not self._active

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: Prompt and answer can never fit in the planned context.
        """
        check_request(
            request,
            context=self._plan.context,
            vocab_size=self._spec.vocab_size,
            max_context=self._plan.max_context,
        )
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; unknown ids are ignored."""
        self._cancelled.add(request_id)

    def step(self) -> Sequence[Event]:
        """Advances every active request by a prefill chunk or a token."""
        pipeline = self._running
        with pipeline.streams():
            # In this order: what is in the air uses the slots of requests that may end now.
            landing = self._flying
            self._flying = self._launch_on(landing) if self._goes_on(landing) else None
            outcomes = self._land(landing)
            dropped = list(self._drop_cancelled())
            while self._waiting and self._admit(self._waiting[0]):
                self._waiting.popleft()
            decoding = [active for active in self._active if active.decodes]
            for active in [active for active in self._active if not active.decodes]:
                outcomes += self._prefill(active)
            if decoding and landing is None:
                outcomes += self._land(self._launch(decoding))
            decoding = [active for active in self._active if active.decodes]
            if decoding and self._flies_ahead and self._flying is None:
                self._flying = self._launch(decoding)
        self._meter.sample()
        return [*dropped, *(event for one in outcomes for event in _events(one))]

    def score(self, tokens: Sequence[int], first: int) -> Sequence[TokenScore]:
        """How likely tokens first, first + 1, … are, each after all before it; see Scores."""
        if not self.idle:
            raise RuntimeError("tokens are scored while no request is running")
        check_tokens(tokens, context=self._plan.context, vocab_size=self._spec.vocab_size)
        pipeline = self._running
        pipeline.wait()
        self._flying = None
        slot = self._free_slots[-1]
        taken = {window: pages.take(slot, len(tokens)) for window, pages in self._pages.items()}
        try:
            with pipeline.streams():
                for device in pipeline.devices:
                    if device.pool is not None:
                        device.pool.assign(slot, taken)
                return score_tokens(pipeline, tokens, first, slot=slot, chunk=self._chunk)
        finally:
            for pages in self._pages.values():
                pages.give_back(slot)

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        """Device index → bytes measured so far."""
        return self._meter.terms()

    def close(self) -> None:
        """Gives the model's memory back."""
        self._meter.release()
        if self._pipeline is not None:
            self._pipeline.wait()
        self._flying = None
        self._active.clear()
        self._waiting.clear()
        self._pipeline = None
        gc.collect()
        give_up_workspaces(self)
        clear_workspaces()
        release_devices(self._plan)

    @property
    def _running(self) -> Pipeline:
        if self._pipeline is None:
            raise RuntimeError("the engine is closed")
        return self._pipeline

    def _drop_cancelled(self) -> Iterator[FinishedEvent]:
        for active in tuple(self._active):
            if active.request.id in self._cancelled:
                self._retire(active)
                yield _finished(active.request, "cancelled", new_tokens=active.new_tokens)
        for request in tuple(self._waiting):
            if request.id in self._cancelled:
                self._waiting.remove(request)
                yield _finished(request, "cancelled", new_tokens=0)
        self._cancelled.clear()

    def _admit(self, request: Request) -> bool:
        """Gives a request its slot and pages; False where it has to wait for them."""
        tokens = len(request.prompt_tokens) + request.max_new_tokens
        if not self._free_slots or not all(
            pages.has_room(tokens) for pages in self._pages.values()
        ):
            return False
        slot = self._free_slots.pop()
        taken = {window: pages.take(slot, tokens) for window, pages in self._pages.items()}
        pipeline = self._running
        for device in pipeline.devices:
            if device.pool is not None:
                device.pool.assign(slot, taken)
        prompt = len(request.prompt_tokens) - (request.resumed_tokens if request.replays else 0)
        active = _Active(
            request=request,
            slot=slot,
            pending=request.prompt_tokens[:prompt],
            replay=deque(request.prompt_tokens[prompt:]),
        )
        if not active.replay:
            self._admit_to_sampler(active)
        self._active.append(active)
        return True

    def _admit_to_sampler(self, active: _Active) -> None:
        request, sampling = active.request, active.request.sampling
        self._running.sampler.admit(
            active.slot, sampling, sampling.seed, request.prompt_tokens, request.resumed_tokens
        )

    def _prefill(self, active: _Active) -> list[_Outcome]:
        piece = self._running.piece_of(min(len(active.pending), 2 * self._chunk))
        piece = min(piece, self._chunk)
        tokens, rest = active.pending[:piece], active.pending[piece:]
        sampling = active.request.sampling
        turn = self._running.prefill(
            tokens,
            active.position,
            active.slot,
            draws=not rest and not active.replay,
            greedy=sampling.is_plain_argmax,
        )
        active.position += len(tokens)
        active.pending = rest
        if not rest and active.replay:
            active.pending = (active.replay.popleft(),)
            active.decodes = active.replays = True
        if turn is None:
            return []
        drawn = self._running.read(turn, 1, logprobs=sampling.logprobs is not None)
        return [self._receive(active, drawn, 0)]

    def _launch(self, decoding: list[_Active]) -> _Flight:
        """A decode step of these requests, whose tokens `_land` receives."""
        for active in decoding:
            if active.replays and not active.replay:
                # What was drawn for its slot until now was nobody's; from here on it is its own.
                self._admit_to_sampler(active)
                active.replays = False
        greedy = all(active.request.sampling.is_plain_argmax for active in decoding)
        turn = self._running.decode(
            [active.pending[0] for active in decoding],
            [active.position for active in decoding],
            [active.slot for active in decoding],
            greedy=greedy,
        )
        return self._flight(decoding, turn, greedy=greedy)

    def _goes_on(self, flight: _Flight | None) -> bool:
        """Whether the step after this one is known before its tokens are.

        It has the same rows: no request ends with this token, unless by it, and none begins.
        """
        if flight is None or not (self._flies_ahead and self._running.goes_on):
            return False
        if self._cancelled or (self._waiting and self._free_slots):
            return False
        return len(self._active) == len(flight.rows) and all(
            not active.retired
            and not active.replay
            and active.new_tokens + 1 < active.request.max_new_tokens
            and active.request.sampling.logprobs is None
            for active in flight.rows
        )

    def _launch_on(self, flight: _Flight | None) -> _Flight:
        assert flight is not None
        turn = self._running.decode_on(len(flight.rows), greedy=flight.greedy)
        return self._flight(flight.rows, turn, greedy=flight.greedy)

    def _flight(self, rows: list[_Active], turn: int, *, greedy: bool) -> _Flight:
        for active in rows:
            active.position += 1
        return _Flight(rows, greedy, turn)

    def _land(self, flight: _Flight | None) -> list[_Outcome]:
        """Receives the tokens of a step that was launched, if one was."""
        if flight is None:
            return []
        rows = flight.rows
        wants_logprobs = any(active.request.sampling.logprobs is not None for active in rows)
        drawn = self._running.read(flight.turn, len(rows), logprobs=wants_logprobs)
        outcomes = []
        for row, active in enumerate(rows):
            if active.retired or active.request.id in self._cancelled:
                continue
            if active.replay:
                active.pending = (active.replay.popleft(),)
            else:
                outcomes.append(self._receive(active, drawn, row))
        return outcomes

    def _receive(self, active: _Active, drawn: Drawn, row: int) -> _Outcome:
        """Decides what becomes of a token that was drawn."""
        request, token = active.request, drawn.tokens[row]
        active.decodes = True
        is_handed_out = token not in request.stop_tokens
        finished: FinishReason | None = None if is_handed_out else "stop"
        if is_handed_out:
            active.new_tokens += 1
            active.pending = (token,)
            if active.new_tokens == request.max_new_tokens:
                finished = "length"
        if finished is not None:
            self._retire(active)
        return _Outcome(active, drawn, row, active.new_tokens, is_handed_out, finished)

    def _retire(self, active: _Active) -> None:
        active.retired = True
        self._active.remove(active)
        self._free_slots.append(active.slot)
        for pages in self._pages.values():
            pages.give_back(active.slot)


def _events(outcome: _Outcome) -> Iterator[Event]:
    """What the caller is told."""
    request, drawn, row = outcome.active.request, outcome.drawn, outcome.row
    token, wanted = drawn.tokens[row], request.sampling.logprobs
    if outcome.is_handed_out and wanted is None:
        yield TokenEvent(request_id=request.id, token=token)
    elif outcome.is_handed_out:
        alternatives = zip(
            drawn.top_tokens[row][:wanted], drawn.top_logprobs[row][:wanted], strict=True
        )
        yield TokenEvent(
            request_id=request.id,
            token=token,
            logprob=drawn.logprobs[row],
            # Where fewer tokens are possible at all, the rest of the row is -1.
            top_logprobs=tuple((other, logprob) for other, logprob in alternatives if other >= 0),
        )
    if outcome.finished is not None:
        yield _finished(request, outcome.finished, new_tokens=outcome.new_tokens)


def _finished(request: Request, reason: FinishReason, *, new_tokens: int) -> FinishedEvent:
    return FinishedEvent(
        request_id=request.id,
        reason=reason,
        prompt_tokens=len(request.prompt_tokens),
        new_tokens=new_tokens,
    )
