"""What the sampler tells of: a leak, or a term above its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from oomproof.hardware.usage import printable
from oomproof.units import MAX_BYTES

MAX_TEXT = 300
"""Characters of a text in a status file."""
MAX_TIME_S = 1e11
MAX_COUNT = 2**53
MAX_INDEX = 4095

Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Index = Annotated[int, Field(ge=0, le=MAX_INDEX)]
Time = Annotated[float, Field(ge=0, le=MAX_TIME_S, allow_inf_nan=False)]
"""Seconds since 1970."""
Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(printable)]
"""Bounded, and without what could steer a terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorEvent:
    """Something that should not be; told once until it is over."""

    kind: Literal["leak", "spike"]
    at: Time
    device: Index | None
    """The plan's index; None for the host."""
    term: Text
    """Of a spike, the plan's term; of a leak, "allocated" or "rss"."""
    measured_bytes: Bytes
    planned_bytes: Bytes | None = None
    """None for a leak."""
    bytes_per_request: Annotated[float, Field(ge=0, le=MAX_BYTES, allow_inf_nan=False)] | None = (
        None
    )
    """None for a spike."""
    message: Text
    """The event in a line."""

    @property
    def cause(self) -> tuple[str, int | None, str]:
        """Events of one cause are one event until it is over."""
        return self.kind, self.device, self.term


OnEvent = Callable[[MonitorEvent], None]
"""Called with each event, in the thread of the step; what it raises is logged and goes no further.
"""
