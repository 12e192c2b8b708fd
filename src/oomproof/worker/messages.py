"""What a supervisor and its worker say to each other; wire.py is how it is written down.

The ids of requests and events are the supervisor's own here, never used twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oomproof.engine.messages import Event, Request
from oomproof.errors import OomproofError, RequestError
from oomproof.faults.fault import Fault
from oomproof.guarding.ladder import LadderEvent
from oomproof.memory.terms import DeviceTerms
from oomproof.models.spec import ModelSource
from oomproof.monitoring.events import MonitorEvent
from oomproof.planning.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Loads a model; the first message to a worker, and sent once."""

    plan: str
    """Its JSON."""
    folder: str
    """Where the model's files are."""
    trust_remote_code: bool
    allowed: tuple[str, ...] = ()
    """Rungs that the user allows, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Where another model's files are; the answer to Wanted."""

    id: str
    source: ModelSource
    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NotFound:
    """Why there is no such model; the other answer to Wanted."""

    error: OomproofError


@dataclass(frozen=True, kw_only=True, slots=True)
class Submit:
    """Queues a request."""

    request: Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancel:
    """Ends a request."""

    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """Asks for a short greedy answer, while nothing else runs."""

    prompt_tokens: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Asks for the memory measured so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Close:
    """Gives the model's memory back and ends the process."""


Command = Load | Found | NotFound | Submit | Cancel | Canary | Measure | Close
"""What a worker is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Bytes loaded so far."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """The model is loaded."""

    plan: Plan | None
    """What runs by now; None where the engine does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Asks for a smaller model's files, which a rung of the ladder would load."""

    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A rung that is taken, with the plan that it leads to, or what the monitor found.

    Something else always follows: the step, the measurement or the load in which it happened.
    """

    event: LadderEvent | MonitorEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A request that the plan has no room for, by now; the others go on."""

    request_id: str
    error: RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """What a step gave, in order; sent after every step, so that silence means a hang."""

    events: tuple[Event, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryAnswer:
    """The canary's tokens."""

    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Device index → bytes measured so far."""

    terms: Mapping[int, DeviceTerms]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Something was raised; every request that was running is lost."""

    fault: Fault | None
    """What it is; None where that is not known."""
    alive: bool
    """Whether the worker goes on: it took the lost requests out and is idle."""
    type: str
    """Name of the exception's type."""
    text: str
    error: OomproofError | None = None
    """The exception itself, where it is one of ours."""


Report = Progress | Ready | Wanted | Told | Refused | Stepped | CanaryAnswer | Measured | Failed
"""What a worker tells."""
