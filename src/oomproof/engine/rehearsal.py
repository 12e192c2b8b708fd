"""Fills a loaded model to what was planned, and times it: a prefill ladder, then every request.

It knows the engine's interface and nothing of weights: prompts are random tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from oomproof.engine.messages import FinishedEvent, Request, SamplingOptions, TokenEvent
from oomproof.engine.protocol import Engine
from oomproof.planning.plan import Plan

LADDER = (64, 512, 4096)
"""Prompt lengths before the planned context, in tokens."""
NEW_TOKENS = 32
_SEED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """Requests of one length, all at once."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    """Of each request."""
    first_token_s: float
    """From the beginning to the first token of the first request."""
    decode_s: float
    """From there to the last token of the last one."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second; of one request where there is one."""
        return self.prompt_tokens / self.first_token_s

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens a second, all requests together; None where there was one token."""
        tokens = self.requests * self.new_tokens - 1
        return tokens / self.decode_s if tokens and self.decode_s > 0 else None


def rungs_of(plan: Plan) -> list[tuple[int, int, int]]:
    """(requests, prompt tokens, new tokens) of each rung, the planned context and requests last."""
    new_tokens = max(1, min(NEW_TOKENS, plan.context // 2))
    longest = plan.context - new_tokens
    prompts = [length for length in LADDER if length < longest] + ([longest] if longest else [])
    rungs = [(1, length, new_tokens) for length in prompts]
    if plan.concurrency > 1 and longest:
        rungs.append((plan.concurrency, longest, new_tokens))
    return rungs or [(1, 1, 1)]


def climb(
    engine: Engine, plan: Plan, vocab_size: int, done: Callable[[Rung], None] | None = None
) -> list[Rung]:
    """Runs every rung of the ladder, shortest first.

    Args:
        engine: Loaded by the plan, idle.
        plan: Its context and concurrency are filled.
        vocab_size: Prompts are random tokens below it.
        done: Told of each rung.

    Raises:
        RequestError: A request that the plan promises is refused.
    """
    chooser = random.Random(_SEED)  # noqa: S311 - prompts, not secrets
    rungs = []
    for requests, prompt_tokens, new_tokens in rungs_of(plan):
        rung = _run(engine, chooser, vocab_size, requests, prompt_tokens, new_tokens)
        rungs.append(rung)
        if done is not None:
            done(rung)
    return rungs


def _run(
    engine: Engine,
    chooser: random.Random,
    vocab_size: int,
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
) -> Rung:
    started = time.perf_counter()
    for number in range(requests):
        tokens = tuple(chooser.randrange(vocab_size) for _ in range(prompt_tokens))
        # Every filter that needs memory of its own is on.
        sampling = SamplingOptions(temperature=0.8, top_k=50, top_p=0.95, seed=number)
        engine.submit(
            Request(
                id=f"rung-{prompt_tokens}-{number}",
                prompt_tokens=tokens,
                max_new_tokens=new_tokens,
                sampling=sampling,
            )
        )
    started = time.perf_counter()
    first = last = started
    waiting = requests
    while waiting:
        for event in engine.step():
            last = time.perf_counter()
            if isinstance(event, TokenEvent) and first == started:
                first = last
            waiting -= isinstance(event, FinishedEvent)
    return Rung(
        requests=requests,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        first_token_s=first - started,
        decode_s=last - first,
    )
