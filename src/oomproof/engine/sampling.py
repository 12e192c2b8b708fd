"""The next token from the logits of one position: what sampling means, in plain torch.

Everything is float32 and elementwise or a comparison, so that a kernel can repeat it token for
token. A score is a logit after penalties; a token's distance is how far its score lies below the
best one, over the temperature: its probability is proportional to exp(-distance), and each filter
is an upper bound of the distance. Tokens are drawn by the Gumbel-max trick with random numbers that
depend on the seed, the number of the draw and the token only, so that an answer does not depend on
which others are computed beside it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oomproof.engine.messages import SEED_BITS, SamplingOptions
from oomproof.errors import RequestError

PROMPT_FLAG = 1 << 30
"""Set in a token's count where it is in the prompt; the bits below count it in the answer."""
LARGEST_LOGIT = 1e30
"""What lies above counts as this, so that penalties and differences stay finite."""
_LEAST_TEMPERATURE = 1e-30
_WORD = 0xFFFFFFFF
_PART = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Options as the arithmetic takes them."""

    inverse_temperature: float
    """0 for the most likely token."""
    top_p: float
    reach: float
    """Largest distance that min-p allows; infinity where it is off."""
    repetition: float
    inverse_repetition: float
    presence: float
    frequency: float
    top_k: int
    """0 keeps all."""
    alternatives: int
    """Most likely tokens to report; -1 for no log-probabilities at all."""
    seed: int

    @classmethod
    def of(cls, options: SamplingOptions, seed: int | None) -> Settings:
        """The settings of a request; without a seed, with a fresh one."""
        temperature = options.temperature
        return cls(
            inverse_temperature=1 / max(temperature, _LEAST_TEMPERATURE) if temperature else 0.0,
            top_p=options.top_p,
            reach=abs(math.log(options.min_p)) if options.min_p else math.inf,
            repetition=options.repetition_penalty,
            inverse_repetition=1 / options.repetition_penalty,
            presence=options.presence_penalty,
            frequency=options.frequency_penalty,
            top_k=min(options.top_k, 2**31 - 1),
            alternatives=-1 if options.logprobs is None else options.logprobs,
            seed=secrets.randbits(SEED_BITS) if seed is None else seed,
        )

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the scores."""
        return self.repetition != 1 or self.presence != 0 or self.frequency != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """A token, with its log-probabilities where they were asked for."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """(token, log-probability), best first; fewer where the rest is impossible."""


def draw(
    logits: torch.Tensor, counts: torch.Tensor | None, settings: Settings, number: int
) -> Draw:
    """The next token.

    Args:
        logits: [vocab], any float dtype; a NaN is never drawn.
        counts: int32 [vocab]: PROMPT_FLAG and the count in the answer; None without penalties.
        settings: The request's.
        number: Of this draw in its request, from 0.
    """
    clean = without_nan(logits)
    scores = clean if counts is None else penalised(clean, counts, settings)
    if settings.inverse_temperature == 0:
        token = int(scores.argmax())
    else:
        gaps = distances(scores, settings.inverse_temperature)
        kept = (gaps <= farthest(gaps, settings)).nonzero()[:, 0]
        # Parts bound the memory that random bits take, which are computed in int64.
        noise = [gumbel(random_bits(settings.seed, number, part)) for part in kept.split(_PART)]
        token = int(kept[(torch.cat(noise) - gaps[kept]).argmax()])
    if settings.alternatives < 0:
        return Draw(token=token)
    logprobs = torch.log_softmax(clean, dim=-1)
    ranked = clean.sort(descending=True, stable=True).indices[: settings.alternatives]
    top = zip(ranked.tolist(), logprobs[ranked].tolist(), strict=True)
    return Draw(
        token=token,
        logprob=float(logprobs[token]),
        top_logprobs=tuple(pair for pair in top if pair[1] > -math.inf),
    )


def without_nan(logits: torch.Tensor) -> torch.Tensor:
    """float32 logits, NaN being as impossible as -inf, and none above LARGEST_LOGIT."""
    values = logits.float()
    return values.masked_fill(values.isnan(), -torch.inf).clamp(max=LARGEST_LOGIT)


def penalised(logits: torch.Tensor, counts: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Scores [vocab]: penalties as `SamplingOptions` defines them."""
    answered = counts & (PROMPT_FLAG - 1)
    repeated = torch.where(
        logits > 0, logits * settings.inverse_repetition, logits * settings.repetition
    )
    scores = torch.where(counts != 0, repeated, logits)
    scores = scores - settings.frequency * answered.float()
    return torch.where(answered > 0, scores - settings.presence, scores)


def distances(scores: torch.Tensor, inverse_temperature: float) -> torch.Tensor:
    """How far each score [vocab] lies below the best, over the temperature; inf for -inf."""
    gaps = (scores.max() - scores) * inverse_temperature
    return gaps.masked_fill(scores == -torch.inf, torch.inf)


def farthest(gaps: torch.Tensor, settings: Settings) -> float:
    """The largest distance that the filters keep."""
    limit = settings.reach
    if 0 < settings.top_k < gaps.numel():
        gaps = gaps[gaps <= gaps.topk(settings.top_k, largest=False).values.max()]
    if settings.top_p < 1:
        limit = min(limit, nucleus(gaps, settings.top_p))
    # Where every score is -inf, so is the best one.
    return max(min(limit, float(gaps.max())), float(gaps.min()))


def nucleus(gaps: torch.Tensor, p: float) -> float:
    """Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).

    The smallest distance within which tokens hold at least p of the probability.
    """
    total = (-gaps).exp().double().sum()
    # What lies farther holds less than 1 - p together, however many they are.
    nearest = gaps[gaps <= math.log(gaps.numel() / (1 - p)) - total.log()]
    ordered = nearest.sort().values
    mass = (-ordered).exp().double().cumsum(dim=-1)
    return float(ordered[int((mass < p * total).sum().clamp(max=ordered.numel() - 1))])


def random_bits(seed: int, number: int, tokens: torch.Tensor) -> torch.Tensor:
    """32 random bits for each token, int64 [n]: the first word of Philox4x32-10.

    The seed is the key; the counter is (token, number of the draw, 0, 0).

    Args:
        seed: 63 bits.
        number: Of the draw.
        tokens: int64 [n].
    """
    nothing = torch.zeros_like(tokens)
    counter = torch.stack((tokens, torch.full_like(tokens, number), nothing, nothing))
    return philox_4x32(counter, (seed & _WORD, seed >> 32))[0]


def philox_4x32(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: int64 [4, n] of 32-bit words.
        key: Two 32-bit words.

    Returns:
        int64 [4, n] of random 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products wrap at 64 bits; their two halves are right all the same.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((odd >> 32) & _WORD) ^ c1 ^ k0, ((even >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = odd & _WORD, even & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3))


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32, from 32 random bits each; always finite.

    -log(-log(1 - u)) with u in (0, 1). What is large, and so decides, comes from small u, whose
    logarithm is a series: 1 - u would round it.
    """
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    return -torch.where(u < 2.0**-6, series, -(1 - u).log()).log()


class RequestSampler:
    """Draws the tokens of one request, for an engine that takes them one by one.

    Args:
        options: The request's.
        device: Where the logits are.
        prompt_tokens: The request's prompt.
        resumed_tokens: So many of its last ones are the answer's, drawn before.

    Raises:
        RequestError: The options need the prompt, and it was not given.
    """

    def __init__(
        self,
        options: SamplingOptions,
        device: torch.device,
        prompt_tokens: Sequence[int] | None = None,
        resumed_tokens: int = 0,
    ) -> None:
        if prompt_tokens is None and (options.has_penalties or options.logprobs is not None):
            raise RequestError("this engine has no penalties and no log-probabilities")
        self._settings = Settings.of(options, options.seed)
        self._device = device
        given = tuple(prompt_tokens or ())
        self._prompt_tokens = given[: len(given) - resumed_tokens]
        self._answered = given[len(given) - resumed_tokens :]
        self._counts: torch.Tensor | None = None
        self._number = resumed_tokens

    def sample(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: [vocab], any float dtype.
        """
        return self.draw(logits).token

    def draw(self, logits: torch.Tensor) -> Draw:
        """The next token with its log-probabilities.

        Args:
            logits: [vocab], any float dtype.
        """
        if self._counts is None and self._settings.has_penalties:
            self._counts = torch.zeros(logits.numel(), dtype=torch.int32, device=self._device)
            prompt = torch.tensor(self._prompt_tokens, dtype=torch.int64, device=self._device)
            self._counts[prompt] = PROMPT_FLAG
            for token in self._answered:
                self._counts[token] += 1
        drawn = draw(logits, self._counts, self._settings, self._number)
        self._number += 1
        if self._counts is not None:
            self._counts[drawn.token] += 1
        return drawn


Sampler = RequestSampler
