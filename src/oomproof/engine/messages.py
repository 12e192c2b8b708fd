"""What goes into an engine and what comes out: plain values, so that a pipe could carry them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oomproof.errors import RequestError
from oomproof.memory.sampler import MAX_ALTERNATIVES

SEED_BITS = 63
"""Of a seed, given or drawn."""
MAX_NEW_TOKENS = 1_000_000
MAX_TEMPERATURE = 100
REPETITION_PENALTIES = (0.01, 100)
"""Bounds within which no finite logit overflows."""


def check_max_new_tokens(count: int) -> None:
    """Refuses a bound of an answer that makes no sense.

    Raises:
        RequestError: It is not from 1 to MAX_NEW_TOKENS.
    """
    if not 1 <= count <= MAX_NEW_TOKENS:
        raise RequestError(f"max-new-tokens {count} must be from 1 to {MAX_NEW_TOKENS:,}")


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How the next token is chosen.

    They act in this order: repetition penalty, presence and frequency penalties, temperature,
    top-k, top-p on what top-k leaves, min-p. A token that ties with the last one kept is kept.
    """

    temperature: float = 1.0
    """0 takes the most likely token; higher is more varied. At most 100."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together hold this probability; in (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one; in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt or answer and multiplies the negative ones
    (CTRL, Keskar et al. 2019, arXiv:1909.05858); 1 is off."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that are in the answer; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit as often as it is in the answer; in [-2, 2]."""
    seed: int | None = None
    """Makes this request's answer repeatable; None draws a fresh one."""
    logprobs: int | None = None
    """Log-probabilities of each token drawn and of this many of the most likely ones beside it;
    None for none at all. They are the model's own: the log-softmax of its logits, before
    penalties, temperature and filters."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise RequestError(f"temperature {self.temperature} must be from 0 to 100")
        if self.top_k < 0:
            raise RequestError(f"top-k {self.top_k} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top-p {self.top_p} must be more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min-p {self.min_p} must be from 0 (off) to 1")
        low, high = REPETITION_PENALTIES
        if not low <= self.repetition_penalty <= high:
            raise RequestError(
                f"repetition-penalty {self.repetition_penalty} must be from {low} to {high}",
                remedy="1 is off",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                option = name.replace("_", "-")
                raise RequestError(f"{option} {getattr(self, name)} must be from -2 to 2")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestError(f"seed {self.seed} must be from 0 to 2^63 - 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_ALTERNATIVES:
            raise RequestError(f"logprobs {self.logprobs} must be from 0 to {MAX_ALTERNATIVES}")

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the scores."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def is_plain_argmax(self) -> bool:
        """Whether the next token is the largest logit's and nothing else is asked for."""
        return self.temperature == 0 and not self.has_penalties and self.logprobs is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to be answered."""

    id: str
    prompt_tokens: tuple[int, ...]
    max_new_tokens: int
    """Bound of the answer, in tokens."""
    sampling: SamplingOptions
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end the answer and are not part of it."""
    resumed_tokens: int = 0
    """So many of the last of prompt_tokens are the answer's own, of an engine that failed: they
    count for the penalties, and draws are numbered after them. max_new_tokens is what is left."""
    replays: bool = False
    """Whether an engine that can computes these as they were at first, a token a step, and not as a
    prompt: rounding is the same then, and so is what follows. It takes as long as it did."""

    def __post_init__(self) -> None:
        if not self.prompt_tokens:
            raise RequestError("the prompt is empty", remedy="give at least one token")
        if not 0 <= self.resumed_tokens < len(self.prompt_tokens):
            raise RequestError(
                f"resumed-tokens {self.resumed_tokens} must be from 0 to "
                f"{len(self.prompt_tokens) - 1}: less than the prompt's tokens"
            )
        check_max_new_tokens(self.max_new_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """A token of an answer."""

    request_id: str
    token: int
    logprob: float | None = None
    """Of the token in the model's own distribution; None where it was not asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the most likely tokens, best first, as many as asked for; fewer
    where the rest is impossible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedEvent:
    """The end of an answer."""

    request_id: str
    reason: FinishReason
    """"stop": a stop token; "length": max_new_tokens reached; "cancelled": asked to end."""
    prompt_tokens: int
    new_tokens: int


Event = TokenEvent | FinishedEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScore:
    """How likely a given token is after those before it."""

    logprob: float
    """In nats, in the model's own distribution."""
    is_most_likely: bool
    """Whether no other is more likely."""
