"""What goes into an engine and what comes out: plain values, so that a pipe could carry them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from oomproof.errors import RequestError

MAX_NEW_TOKENS = 1_000_000


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
    """How the next token is chosen."""

    temperature: float = 1.0
    """0 takes the most likely token; higher is more varied. At most 100."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together hold this probability; in (0, 1]."""
    seed: int | None = None
    """Makes this request's answer repeatable; None draws a fresh one."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise RequestError(f"temperature {self.temperature} must be from 0 to 100")
        if self.top_k < 0:
            raise RequestError(f"top-k {self.top_k} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top-p {self.top_p} must be more than 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestError(f"seed {self.seed} must be from 0 to 2^63 - 1")


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

    def __post_init__(self) -> None:
        if not self.prompt_tokens:
            raise RequestError("the prompt is empty", remedy="give at least one token")
        check_max_new_tokens(self.max_new_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """A token of an answer."""

    request_id: str
    token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedEvent:
    """The end of an answer."""

    request_id: str
    reason: FinishReason
    """"stop": a stop token; "length": max_new_tokens reached; "cancelled": asked to end."""
    prompt_tokens: int
    new_tokens: int


Event = TokenEvent | FinishedEvent
