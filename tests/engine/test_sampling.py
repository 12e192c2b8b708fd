"""Choosing a token: properties that hold for any logits, and draws that can be repeated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.engine.messages import SamplingOptions
from oomproof.engine.sampling import Sampler, keep_top_k, keep_top_p

CPU = torch.device("cpu")
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=80).map(torch.tensor)


def draw(logits: torch.Tensor, count: int = 1, **options: float) -> list[int]:
    sampler = Sampler(SamplingOptions(**options), CPU)  # type: ignore[arg-type]
    return [sampler.sample(logits) for _ in range(count)]


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.integers(0, 90), st.floats(0.01, 1))
def test_temperature_0_is_greedy_whatever_else_is_asked(
    logits: torch.Tensor, top_k: int, top_p: float
) -> None:
    [token] = draw(logits, temperature=0, top_k=top_k, top_p=top_p)
    assert logits[token] == logits.max()


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.integers(1, 80))
def test_top_k_keeps_the_k_best_and_what_ties_with_the_last_of_them(
    logits: torch.Tensor, k: int
) -> None:
    k = min(k, logits.numel())
    kept = keep_top_k(logits, k) > -torch.inf
    assert kept.sum() >= k
    assert (logits > logits[kept].min()).sum() < k
    assert torch.equal(keep_top_k(logits, k)[kept], logits[kept])
    if not kept.all():
        assert logits[~kept].max() < logits[kept].min()


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.floats(1e-9, 0.999_999))
def test_top_p_keeps_no_token_below_one_that_it_drops(logits: torch.Tensor, p: float) -> None:
    kept = keep_top_p(logits, p) > -torch.inf
    assert kept[logits.argmax()] or (logits[kept] == logits.max()).any()
    assert torch.softmax(logits.double(), dim=-1)[kept].sum() >= p - 1e-5
    if not kept.all():
        assert logits[~kept].max() <= logits[kept].min()


@settings(deadline=None, derandomize=True)
@given(LOGITS, st.integers(0, 80), st.floats(0.01, 1), st.integers(0, 2**63 - 1))
def test_no_token_below_those_that_both_filters_keep_is_drawn(
    logits: torch.Tensor, top_k: int, top_p: float, seed: int
) -> None:
    allowed = logits
    if 0 < top_k < logits.numel():
        allowed = keep_top_k(allowed, top_k)
    if top_p < 1:
        allowed = keep_top_p(allowed, top_p)
    least = logits[allowed > -torch.inf].min()
    for token in draw(logits, 5, top_k=top_k, top_p=top_p, seed=seed):
        # Which of two tokens that tie is kept is nobody's promise.
        assert logits[token] >= least - 1e-5


def test_a_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert draw(logits, 20, top_k=10**9, seed=3) == draw(logits, 20, seed=3)


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.2, 0.05])
    counts = torch.bincount(torch.tensor(draw(probabilities.log(), 4000, seed=0)), minlength=4)
    assert torch.allclose(counts / 4000, probabilities, atol=0.03)


def test_a_lower_temperature_prefers_the_likely_tokens() -> None:
    logits = torch.linspace(0, 3, 50)
    share = {t: draw(logits, 400, temperature=t, seed=1).count(49) for t in (0.1, 1.0, 50.0)}
    assert share[0.1] > share[1.0] > share[50.0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-40, 5e-324])
def test_any_temperature_that_is_accepted_draws_a_token(temperature: float) -> None:
    logits = torch.tensor([0.5, 12.0, -3.0])
    assert draw(logits, temperature=temperature, seed=0) == [1]


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
    mine, other = (Sampler(SamplingOptions(seed=seed), CPU) for seed in (11, 12))
    before = torch.get_rng_state()
    together = [(mine.sample(logits), other.sample(logits)) for _ in range(30)]
    assert [first for first, _ in together] == alone
    assert [second for _, second in together] != alone
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_each_request_draws_afresh() -> None:
    logits = torch.zeros(5000)
    assert draw(logits, 20) != draw(logits, 20)
