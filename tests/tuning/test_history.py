"""What is decided from the history of losses alone."""

from __future__ import annotations

import math

from oomproof.tuning.history import History, perplexity, read_history


def history(*losses: float) -> History:
    entries = [{"step": n, "eval_loss": loss} for n, loss in enumerate(losses, 1)]
    return read_history([{"step": 1, "loss": 3.0}, *entries, {"step": 9, "train_loss": 1.0}])


def test_the_best_is_the_earliest_of_the_least_and_never_nan() -> None:
    assert history(3.0, 2.0, 2.0, math.nan).best == (2, 2.0)
    assert history().best is None
    assert history().training == ((1, 3.0),)


def test_patience_counts_evaluations_since_the_best() -> None:
    found = history(3.0, 2.0, 2.5, 2.4)
    assert found.is_over(2)
    assert not found.is_over(3)
    assert not found.is_over(None)


def test_a_loss_beyond_floats_is_an_infinite_perplexity() -> None:
    assert perplexity(1e4) == math.inf
    assert perplexity(0.0) == 1.0
