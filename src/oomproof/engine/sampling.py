"""The next token from the logits of one position, on the device that computed them."""

from __future__ import annotations

import torch

from oomproof.engine.messages import SamplingOptions


class Sampler:
    """Draws the tokens of one request, with a random state of its own."""

    def __init__(self, options: SamplingOptions, device: torch.device) -> None:
        self._options = options
        self._generator = torch.Generator(device=device)
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def sample(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: [vocab], any float dtype.
        """
        options = self._options
        if options.temperature == 0:
            return int(logits.argmax())
        # The best score is 0 and the division is in float64, so that no temperature overflows.
        scores = (logits.double() - logits.max()) / options.temperature
        if 0 < options.top_k < scores.numel():
            scores = keep_top_k(scores, options.top_k)
        if options.top_p < 1:
            scores = keep_top_p(scores, options.top_p)
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def keep_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Scores [vocab] with all but the k largest at -inf; ties with the k-th are kept."""
    threshold = torch.topk(scores, k).values[-1]
    return scores.masked_fill(scores < threshold, -torch.inf)


def keep_top_p(scores: torch.Tensor, p: float) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).

    Keeps the fewest tokens whose probabilities sum to at least p, always at least one.
    """
    ordered, order = torch.sort(scores, descending=True)
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order, before >= p)
    return scores.masked_fill(dropped, -torch.inf)
