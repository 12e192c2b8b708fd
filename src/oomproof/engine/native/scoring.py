"""How likely given tokens are: a prompt's chunks, whose logits are looked at row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from oomproof.engine.messages import TokenScore
from oomproof.engine.native.pipeline import Pipeline
from oomproof.errors import RequestError


def check_tokens(tokens: Sequence[int], *, context: int, vocab_size: int) -> None:
    """Refuses tokens that cannot be scored; the last one is predicted and takes no room.

    Raises:
        RequestError: They are too many, or one is outside the vocabulary.
    """
    processed = len(tokens) - 1
    if processed > context:
        raise RequestError(
            f"{processed:,} tokens to score do not fit in the planned context of {context:,}",
            remedy=f"score fewer, or plan with --context {processed}",
        )
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise RequestError(f"a token to score is outside the vocabulary of {vocab_size:,}")


def score_tokens(
    pipeline: Pipeline, tokens: Sequence[int], first: int, *, slot: int, chunk: int
) -> list[TokenScore]:
    """Of tokens first, first + 1, …, in a slot that has pages for all of them.

    Logits are reduced on the host, so that nothing is allocated on the device. The caller is on the
    pipeline's streams.

    Args:
        pipeline: Idle.
        tokens: Of one text.
        first: At least 1: each token is predicted by those before it.
        slot: Of a request.
        chunk: The most tokens of a call.
    """
    found: list[TokenScore] = []
    inputs = tokens[:-1]
    for start in range(0, len(inputs), chunk):
        part = inputs[start : start + chunk]
        pipeline.prefill(part, start, slot, draws=False, greedy=True)
        begin = max(0, first - 1 - start)
        if begin < len(part):
            targets = tokens[start + begin + 1 : start + len(part) + 1]
            found += _scores(pipeline.logits(begin, len(part)), targets)
    return found


def _scores(pieces: Iterator[torch.Tensor], targets: Sequence[int]) -> Iterator[TokenScore]:
    done = 0
    for logits in pieces:
        wanted = torch.tensor(targets[done : done + len(logits)]).unsqueeze(1)
        own = logits.gather(1, wanted).squeeze(1)
        logprobs = own.double() - logits.double().logsumexp(dim=1)
        most = own >= logits.amax(dim=1)
        done += len(logits)
        for logprob, is_most_likely in zip(logprobs.tolist(), most.tolist(), strict=True):
            yield TokenScore(logprob=logprob, is_most_likely=is_most_likely)
