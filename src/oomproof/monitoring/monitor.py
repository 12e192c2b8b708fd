"""An engine whose memory is watched; to everybody else it is the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from oomproof.engine.messages import Event, FinishedEvent, Request, TokenScore
from oomproof.engine.protocol import Engine, Scores
from oomproof.errors import NotRunnableError
from oomproof.memory.terms import DeviceTerms
from oomproof.monitoring.events import OnEvent
from oomproof.monitoring.sampler import Sampler, open_status_file
from oomproof.planning.plan import Plan


class MonitoredEngine:
    """Implements `engine.protocol.Engine` over another engine.

    Args:
        engine: Loaded, idle.
        sampler: Watches it.
    """

    def __init__(self, engine: Engine, sampler: Sampler) -> None:
        self.engine = engine
        self.sampler = sampler

    @property
    def idle(self) -> bool:
        """Whether no request is queued or active."""
        return self.engine.idle

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: Prompt and answer can never fit in the planned context.
        """
        self.engine.submit(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request at the next step; unknown ids are ignored."""
        self.engine.cancel(request_id)

    def step(self) -> Sequence[Event]:
        """Advances every active request by a prefill chunk or a token; nothing when idle."""
        events = self.engine.step()
        finished = 0
        for event in events:
            finished += isinstance(event, FinishedEvent)
        self.sampler.after_step(finished)
        return events

    def score(self, tokens: Sequence[int], first: int) -> Sequence[TokenScore]:
        """How likely given tokens are; see Scores.

        Raises:
            NotRunnableError: The engine does not tell.
        """
        if not isinstance(self.engine, Scores):
            raise NotRunnableError(
                "this engine does not tell how likely given tokens are",
                remedy="use --engine native",
            )
        return self.engine.score(tokens, first)

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        """Device index → bytes measured so far, under the names of the plan's terms."""
        return self.engine.measured_terms()

    def close(self) -> None:
        """Gives the model's memory back; the engine is of no use afterwards."""
        self.sampler.close()
        self.engine.close()


def monitored(engine: Engine, plan: Plan, on_event: OnEvent | None = None) -> MonitoredEngine:
    """The engine, watched, and shown by `oomproof top`.

    Args:
        engine: Loaded by the plan, idle.
        plan: What it was built from.
        on_event: Told of leaks and of terms above their plan.
    """
    sampler = Sampler(
        plan, engine.measured_terms, on_event=on_event, status_file=open_status_file()
    )
    return MonitoredEngine(engine, sampler)
