"""What the logits of a format say of a text, beside the reference's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

NLL, KL, AGREES = range(3)
"""Rows of what is known of a token."""


def compare(
    logits: Iterator[torch.Tensor], targets: torch.Tensor, out: Sequence[torch.Tensor]
) -> None:
    """Writes the figures of some tokens, format after format.

    Only the reference's log-probabilities and those of one format are there at once.

    Args:
        logits: float32 [tokens, vocab] of the reference, then of each format.
        targets: int64 [tokens]: what they are to predict.
        out: Of the reference, then of each format: float32 [3, tokens], negative log-likelihood,
            D(reference ‖ format) in nats, and 1 where both find the same token most likely.
    """
    reference = torch.log_softmax(next(logits), dim=1)
    probabilities = reference.exp()
    best = reference.argmax(dim=1)
    places = targets.unsqueeze(1)
    out[0][NLL] = -reference.gather(1, places).squeeze(1)
    out[0][KL] = 0
    out[0][AGREES] = 1
    for found, figures in zip(logits, out[1:], strict=True):
        here = torch.log_softmax(found, dim=1)
        figures[NLL] = -here.gather(1, places).squeeze(1)
        figures[AGREES] = (here.argmax(dim=1) == best).float()
        figures[KL] = here.neg_().add_(reference).mul_(probabilities).sum(dim=1)
