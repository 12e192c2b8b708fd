"""What every engine does. It knows nothing of text: tokens in, tokens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from oomproof.engine.messages import Event, Request, TokenScore
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import Plan


class Engine(Protocol):
    """Requests in, events out; one `step` at a time, in whichever process it lives."""

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: Prompt and answer can never fit in the planned context.
        """

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; unknown ids are ignored."""

    def step(self) -> Sequence[Event]:
        """Advances every active request by a prefill chunk or a token; nothing when idle."""

    @property
    def idle(self) -> bool:
        """Whether no request is queued or active."""

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        """Device index → bytes measured so far, under the names of the plan's terms."""

    def close(self) -> None:
        """Gives the model's memory back; the engine is of no use afterwards."""


@runtime_checkable
class HasPlan(Protocol):
    """An engine whose plan may become another one while it runs."""

    @property
    def plan(self) -> Plan:
        """The plan it runs by now."""


@runtime_checkable
class Scores(Protocol):
    """An engine that tells how likely given tokens are."""

    def score(self, tokens: Sequence[int], first: int) -> Sequence[TokenScore]:
        """How likely tokens first, first + 1, … are, each after all before it; while idle.

        Args:
            tokens: Of one text.
            first: At least 1.

        Raises:
            RequestError: The tokens do not fit in the planned context.
        """
