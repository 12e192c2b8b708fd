"""The ladder of a rehearsal, on an engine that only counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from oomproof.engine.messages import Event, FinishedEvent, Request, TokenEvent
from oomproof.engine.rehearsal import LADDER, NEW_TOKENS, Rung, climb, rungs_of
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import Plan
from oomproof.session import plan


class CountingEngine:
    """Answers every active request with a token a step, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._active: dict[str, int] = {}

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        self._active[request.id] = request.max_new_tokens
        self.most_at_once = max(self.most_at_once, len(self._active))

    def cancel(self, request_id: str) -> None:
        raise AssertionError("a rehearsal cancels nothing")

    def step(self) -> Sequence[Event]:
        events: list[Event] = []
        for name in tuple(self._active):
            self._active[name] -= 1
            events.append(TokenEvent(request_id=name, token=1))
            if not self._active[name]:
                del self._active[name]
                events.append(
                    FinishedEvent(request_id=name, reason="length", prompt_tokens=1, new_tokens=1)
                )
        return events

    @property
    def idle(self) -> bool:
        return not self._active

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        return {}

    def close(self) -> None:
        pass


def planned(context: int, concurrency: int = 1) -> Plan:
    made = plan("llama-3.1-8b", gpus="80GiB", format="nf4-dq")
    return replace(made, context=context, concurrency=concurrency)


def test_the_ladder_ends_at_the_planned_context() -> None:
    assert rungs_of(planned(8192)) == [
        (1, 64, NEW_TOKENS),
        (1, 512, NEW_TOKENS),
        (1, 4096, NEW_TOKENS),
        (1, 8192 - NEW_TOKENS, NEW_TOKENS),
    ]


@pytest.mark.parametrize("context", [1, 2, 3, 64, 65, 96, 97, 512, 4096, 4128, 4129, 100_000])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_every_rung_fits_in_the_context_and_the_last_one_fills_it(
    context: int, concurrency: int
) -> None:
    rungs = rungs_of(planned(context, concurrency))
    assert all(prompt >= 1 and new >= 1 for _, prompt, new in rungs)
    assert all(prompt + new <= max(2, context) for _, prompt, new in rungs)
    requests, prompt, new = rungs[-1]
    if context > 1:
        assert prompt + new == context
        assert requests == concurrency
    prompts = [length for _, length, _ in rungs]
    assert prompts == sorted(prompts)


def test_all_requests_of_the_last_rung_run_at_once() -> None:
    engine = CountingEngine()
    rungs = climb(engine, planned(1024, concurrency=4), 1000)
    assert engine.most_at_once == 4
    assert [rung.requests for rung in rungs] == [1, 1, 1, 4]
    assert engine.idle


def test_prompts_are_random_tokens_of_the_vocabulary_and_the_same_each_time() -> None:
    first, second = CountingEngine(), CountingEngine()
    for engine in (first, second):
        climb(engine, planned(600), 50)
    assert [r.prompt_tokens for r in first.requests] == [r.prompt_tokens for r in second.requests]
    tokens = {token for request in first.requests for token in request.prompt_tokens}
    assert tokens <= set(range(50))
    assert len(tokens) > 40
    assert [len(request.prompt_tokens) for request in first.requests] == [*LADDER[:2], 568]


def test_each_rung_is_told_as_it_ends() -> None:
    told: list[Rung] = []
    assert climb(CountingEngine(), planned(600), 50, told.append) == told


def test_speeds_are_tokens_over_their_time() -> None:
    rung = Rung(requests=2, prompt_tokens=100, new_tokens=8, first_token_s=0.5, decode_s=3.0)
    assert rung.prefill_tokens_per_second == 200
    assert rung.tokens_per_second == 5
    lone = Rung(requests=1, prompt_tokens=100, new_tokens=1, first_token_s=0.5, decode_s=0.0)
    assert lone.tokens_per_second is None
