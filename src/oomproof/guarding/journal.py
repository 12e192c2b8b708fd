"""Every unfinished request with the tokens handed out: what a fresh engine goes on from."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from oomproof.engine.messages import SEED_BITS, Event, FinishedEvent, Request


@dataclass(slots=True)
class Entry:
    """A request on its way."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """Of its answer, handed out so far."""
    arithmetic: tuple[str, ...] = ()
    """What its tokens are computed with; another one after a rung that changed it."""
    is_cancelled: bool = False

    def rest(self, arithmetic: tuple[str, ...] = ()) -> Request:
        """What is left of it, as a request of its own.

        Args:
            arithmetic: What the engine computes with, that it is for; empty where an answer is
                resumed as a part of the prompt at any rate.
        """
        request = self.request
        if not self.tokens:
            self.arithmetic = arithmetic
        return replace(
            request,
            prompt_tokens=(*request.prompt_tokens, *self.tokens),
            max_new_tokens=request.max_new_tokens - len(self.tokens),
            resumed_tokens=request.resumed_tokens + len(self.tokens),
            replays=bool(self.tokens and arithmetic) and arithmetic == self.arithmetic,
        )

    def cancelled(self) -> FinishedEvent:
        """Its end, where it was asked for."""
        return FinishedEvent(
            request_id=self.request.id,
            reason="cancelled",
            prompt_tokens=len(self.request.prompt_tokens),
            new_tokens=len(self.tokens),
        )


class Journal:
    """The unfinished requests of an engine, in the order they came in."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries.values()))

    def add(self, request: Request) -> None:
        """Takes a request in; one without a seed gets one, so that its draws can go on."""
        sampling = request.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(SEED_BITS))
        self._entries[request.id] = Entry(request=replace(request, sampling=sampling))

    def get(self, request_id: str) -> Entry | None:
        """The entry of a request, None where it is not on its way."""
        return self._entries.get(request_id)

    def drop(self, request_id: str) -> None:
        """Forgets a request."""
        self._entries.pop(request_id, None)

    def clear(self) -> None:
        """Forgets all of them."""
        self._entries.clear()

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the unfinished requests."""
        return tuple(self._entries)

    @property
    def most_tokens(self) -> int:
        """Prompt and answer of the longest of them, 0 where there is none."""
        return max(
            (
                len(entry.request.prompt_tokens) + entry.request.max_new_tokens
                for entry in self._entries.values()
            ),
            default=0,
        )

    @property
    def has_answers(self) -> bool:
        """Whether any token was handed out."""
        return any(entry.tokens for entry in self._entries.values())

    def record(self, events: Iterable[Event]) -> list[Event]:
        """Writes events down; ends are told in the numbers of the request as it came in."""
        told: list[Event] = []
        for event in events:
            entry = self._entries.get(event.request_id)
            if entry is None:
                continue
            if isinstance(event, FinishedEvent):
                del self._entries[event.request_id]
                told.append(
                    replace(
                        event,
                        prompt_tokens=len(entry.request.prompt_tokens),
                        new_tokens=len(entry.tokens),
                    )
                )
            else:
                entry.tokens.append(event.token)
                told.append(event)
        return told
