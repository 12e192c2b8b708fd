"""The losses of a run, as they lie in its checkpoints; what follows from them alone.

Early stopping and the best step are computed from the history, so a resumed run decides as an
unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Losses by step."""

    training: tuple[tuple[int, float], ...]
    """(step, mean loss of its learned tokens, nats)."""
    validation: tuple[tuple[int, float], ...]
    """(step, mean loss of held-out learned tokens, nats)."""

    @property
    def best(self) -> tuple[int, float] | None:
        """The evaluation with the least loss, the earliest of equal ones."""
        finite = [one for one in self.validation if math.isfinite(one[1])]
        return min(finite, key=lambda one: (one[1], one[0]), default=None)

    def is_over(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row, the last ones, brought no new best."""
        if patience is None or self.best is None:
            return False
        best_step = self.best[0]
        return sum(step > best_step for step, _ in self.validation) >= patience


def read_history(entries: Sequence[Mapping[str, Any]]) -> History:
    """From transformers' `log_history`."""
    training = [(e["step"], float(e["loss"])) for e in entries if "loss" in e]
    validation = [(e["step"], float(e["eval_loss"])) for e in entries if "eval_loss" in e]
    return History(training=tuple(training), validation=tuple(dict(validation).items()))


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that is no float."""
    return math.exp(loss) if loss < 700 else math.inf
