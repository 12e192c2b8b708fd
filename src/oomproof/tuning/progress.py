"""What a run tells while it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """An optimizer step."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    """Of this run, padding left out."""
    memory_bytes: int
    """The most that training has held so far, as `measured_bytes` of the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Held-out samples were evaluated."""

    step: int
    loss: float
    perplexity: float
    is_best: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """Something happened that a person should know of."""

    text: str


TuningEvent = StepDone | Evaluated | Said
OnTuning = Callable[[TuningEvent], None]


def nobody(event: TuningEvent) -> None:
    """Listens to nothing."""
    del event
