"""Choosing a token: against a slow reference in plain Python, and draws that can be repeated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oomproof.engine.messages import SamplingOptions
from oomproof.engine.sampling import (
    PROMPT_FLAG,
    RequestSampler,
    Sampler,
    Settings,
    distances,
    farthest,
    gumbel,
    penalised,
    philox_4x32,
    random_bits,
    without_nan,
)
from oomproof.errors import RequestError

CPU = torch.device("cpu")
# Multiples of 1/8 are the same in float32 and float64, so that ties are ties in both.
EIGHTHS = st.integers(-80, 80).map(lambda eighths: eighths / 8)
LOGITS = st.lists(EIGHTHS, min_size=1, max_size=40)
OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 100]),
    top_p=st.sampled_from([0.05, 0.31, 0.77, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 0.43, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 2.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
    seed=st.integers(0, 2**63 - 1),
)


def probabilities(
    logits: Sequence[float],
    options: SamplingOptions,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
) -> list[float]:
    """What each token's probability should be: the definition, step by step, in float64."""
    scores = list(logits)
    for token in {*prompt, *answer}:
        factor = options.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(answer):
        scores[token] -= options.presence_penalty
        scores[token] -= options.frequency_penalty * answer.count(token)
    weights = [math.exp((score - max(scores)) / options.temperature) for score in scores]
    if 0 < options.top_k < len(weights):
        least = sorted(weights, reverse=True)[options.top_k - 1]
        weights = [weight if weight >= least else 0 for weight in weights]
    if options.top_p < 1:
        reached = 0.0
        for least in sorted(weights, reverse=True):
            reached += least
            if reached >= options.top_p * sum(weights):
                weights = [weight if weight >= least else 0 for weight in weights]
                break
    least = options.min_p * max(weights)
    weights = [weight if weight >= least else 0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


def counts_of(prompt: Sequence[int], answer: Sequence[int], vocab_size: int) -> torch.Tensor:
    counts = torch.zeros(vocab_size, dtype=torch.int32)
    counts[list(prompt)] = PROMPT_FLAG
    for token in answer:
        counts[token] += 1
    return counts


def draw(logits: torch.Tensor, count: int = 1, /, **options: float) -> list[int]:
    sampler = RequestSampler(SamplingOptions(**options), CPU, ())  # type: ignore[arg-type]
    return [sampler.sample(logits) for _ in range(count)]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(LOGITS, OPTIONS, st.data())
def test_the_tokens_kept_are_those_of_the_definition(
    logits: list[float], options: SamplingOptions, data: st.DataObject
) -> None:
    tokens = st.lists(st.integers(0, len(logits) - 1), max_size=6)
    prompt, answer = data.draw(tokens), data.draw(tokens)
    asked = Settings.of(options, 0)
    counts = counts_of(prompt, answer, len(logits))
    scores = penalised(without_nan(torch.tensor(logits)), counts, asked)
    gaps = distances(scores, asked.inverse_temperature)
    kept = (gaps <= farthest(gaps, asked)).nonzero()[:, 0].tolist()
    expected = probabilities(logits, options, prompt, answer)
    assert kept == [token for token, share in enumerate(expected) if share > 0]


@settings(deadline=None, derandomize=True)
@given(LOGITS, OPTIONS, st.data())
def test_every_token_drawn_is_one_that_its_penalties_and_filters_allow(
    logits: list[float], options: SamplingOptions, data: st.DataObject
) -> None:
    prompt = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=6))
    sampler, answer = RequestSampler(options, CPU, prompt), list[int]()
    for _ in range(5):
        expected = probabilities(logits, options, prompt, answer)
        answer.append(sampler.sample(torch.tensor(logits)))
        assert expected[answer[-1]] > 0


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(seed=1),
        SamplingOptions(seed=2, temperature=2.0),
        SamplingOptions(seed=3, temperature=0.5, top_k=4),
        SamplingOptions(seed=4, top_p=0.8),
        SamplingOptions(seed=5, min_p=0.2),
        SamplingOptions(seed=6, top_k=6, top_p=0.9, min_p=0.05),
    ],
)
def test_draws_follow_the_probabilities(options: SamplingOptions) -> None:
    logits, draws = [2.0, -1.0, 1.5, 0.0, 0.5, 1.5, -3.0, 1.0], 2000
    sampler = RequestSampler(options, CPU, ())
    found = [sampler.sample(torch.tensor(logits)) for _ in range(draws)]
    for token, share in enumerate(probabilities(logits, options)):
        deviation = math.sqrt(draws * share * (1 - share))
        assert abs(found.count(token) - draws * share) <= 4 * deviation


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.integers(0, 90), st.floats(0.01, 1), st.floats(0, 1))
def test_temperature_0_is_greedy_whatever_else_is_asked(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    [token] = draw(torch.tensor(logits), temperature=0, top_k=top_k, top_p=top_p, min_p=min_p)
    assert token == logits.index(max(logits))


def test_penalties_also_decide_what_is_most_likely() -> None:
    logits = torch.tensor([3.0, 2.5, 2.0])
    sampler = RequestSampler(SamplingOptions(temperature=0, repetition_penalty=1.5), CPU, [0])
    assert [sampler.sample(logits) for _ in range(4)] == [1, 0, 0, 0]
    assert draw(logits, 4, temperature=0, presence_penalty=0.75) == [0, 1, 0, 0]
    assert draw(logits, 6, temperature=0, frequency_penalty=0.375) == [0, 0, 1, 0, 1, 2]


def test_the_frequency_penalty_counts_and_the_repetition_penalty_sees_the_prompt() -> None:
    scores = penalised(
        torch.tensor([4.0, -4.0, 4.0, -4.0, 4.0]),
        counts_of([0, 1], [2, 2, 3], 5),
        Settings.of(
            SamplingOptions(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25),
            0,
        ),
    )
    assert scores.tolist() == [2.0, -8.0, 2.0 - 0.5 - 0.5, -8.0 - 0.5 - 0.25, 4.0]


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    for options in ({"top_k": 2}, {"top_p": 0.8}, {"min_p": math.exp(-2) * (1 - 1e-6)}):
        assert set(draw(logits, 300, seed=1, **options)) == {0, 1, 2, 3}


def test_equal_tokens_are_drawn_equally_often() -> None:
    found = draw(torch.zeros(4), 2000, seed=1, top_p=0.1, top_k=1)
    assert all(420 < found.count(token) < 580 for token in range(4))


def test_a_lower_temperature_prefers_the_likely_tokens() -> None:
    logits = torch.linspace(0, 3, 50)
    share = {t: draw(logits, 400, temperature=t, seed=1).count(49) for t in (0.1, 1.0, 50.0)}
    assert share[0.1] > share[1.0] > share[50.0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-40, 5e-324])
def test_any_temperature_that_is_accepted_draws_a_token(temperature: float) -> None:
    logits = torch.tensor([0.5, 12.0, -3.0])
    assert draw(logits, temperature=temperature, seed=0) == [1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}])
def test_what_is_impossible_is_never_drawn(options: dict[str, float]) -> None:
    inf, nan = math.inf, math.nan
    assert set(draw(torch.tensor([-inf, nan, 1.0, -inf]), 20, seed=1, **options)) == {2}
    assert set(draw(torch.tensor([0.0, nan, inf, -inf]), 20, seed=1, **options)) == {2}
    assert draw(torch.tensor([nan, nan, -inf]), seed=1, min_p=0.5, **options) == [0]
    penalties = {"repetition_penalty": 0.01, "presence_penalty": 2, "frequency_penalty": -2}
    assert set(draw(torch.tensor([1.0, inf, -inf, nan]), 20, **penalties, **options)) == {1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_any_float_type_are_drawn_from(dtype: torch.dtype) -> None:
    logits = torch.linspace(-5, 5, 100).to(dtype)
    assert draw(logits, 10, seed=9, top_k=40, top_p=0.9) == draw(
        logits.float(), 10, seed=9, top_k=40, top_p=0.9
    )


def test_a_request_draws_alike_beside_others_and_whatever_torch_was_seeded_with() -> None:
    logits = torch.zeros(5000)
    alone = draw(logits, 30, seed=11)
    torch.manual_seed(99)
    mine, other = (RequestSampler(SamplingOptions(seed=seed), CPU) for seed in (11, 12))
    before = torch.get_rng_state()
    together = [(mine.sample(logits), other.sample(logits)) for _ in range(30)]
    assert [first for first, _ in together] == alone
    assert [second for _, second in together] != alone
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_each_request_draws_afresh() -> None:
    logits = torch.zeros(5000)
    assert draw(logits, 20) != draw(logits, 20)


def test_philox_gives_the_published_vectors() -> None:
    """Known answers of Random123, the authors' own library."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        words = torch.tensor(counter).unsqueeze(1)
        assert philox_4x32(words, key)[:, 0].tolist() == expected


def test_random_bits_depend_on_the_seed_the_draw_and_the_token_alone() -> None:
    tokens = torch.arange(1000)
    bits = random_bits(5, 3, tokens)
    assert torch.equal(random_bits(5, 3, tokens[700:]), bits[700:])
    for seed, number in ((6, 3), (5, 4), (5 + 2**32, 3)):
        assert (random_bits(seed, number, tokens) != bits).float().mean() > 0.99


def test_noise_is_finite_and_has_the_gumbel_distribution() -> None:
    extremes = gumbel(torch.tensor([0, 1, 2**26 - 1, 2**26, 2**31, 2**32 - 1]))
    assert extremes.isfinite().all()
    assert torch.equal(extremes, extremes.sort(descending=True).values)
    noise = gumbel(random_bits(1, 0, torch.arange(200_000))).double()
    assert abs(noise.mean() - 0.577216) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    for x in (-1.0, 0.0, 1.0, 3.0, 6.0):
        assert abs((noise <= x).double().mean() - math.exp(-math.exp(-x))) < 0.004


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.integers(0, 20))
@example([1.0, -math.inf, 1.0, -math.inf], 3)
def test_log_probabilities_are_the_models_own(logits: list[float], wanted: int) -> None:
    options = SamplingOptions(
        temperature=0.5, top_k=2, repetition_penalty=2.0, presence_penalty=1, logprobs=wanted
    )
    drawn = RequestSampler(options, CPU, [0]).draw(torch.tensor(logits))
    total = math.log(sum(math.exp(logit) for logit in logits))
    assert drawn.logprob == pytest.approx(logits[drawn.token] - total, abs=1e-4)
    best = sorted(range(len(logits)), key=lambda token: -logits[token])
    best = [token for token in best if logits[token] > -math.inf][:wanted]
    assert [token for token, _ in drawn.top_logprobs] == best
    for token, logprob in drawn.top_logprobs:
        assert logprob == pytest.approx(logits[token] - total, abs=1e-4)


def test_no_log_probabilities_are_computed_unasked() -> None:
    drawn = RequestSampler(SamplingOptions(), CPU).draw(torch.zeros(3))
    assert (drawn.logprob, drawn.top_logprobs) == (None, ())


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(repetition_penalty=1.1),
        SamplingOptions(frequency_penalty=1),
        SamplingOptions(logprobs=0),
    ],
)
def test_an_engine_that_does_not_give_the_prompt_is_told_what_it_cannot_do(
    options: SamplingOptions,
) -> None:
    with pytest.raises(RequestError, match="no penalties and no log-probabilities"):
        Sampler(options, CPU)
