"""Choosing tokens, and turning them into text piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.engine.messages import Request, SamplingOptions
from oomproof.engine.sampling import Sampler, keep_top_k, keep_top_p
from oomproof.engine.text import IncrementalDecoder
from oomproof.errors import RequestError

CPU = torch.device("cpu")
LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.0, 2.5])


def test_temperature_0_takes_the_most_likely_token() -> None:
    assert Sampler(SamplingOptions(temperature=0), CPU).sample(LOGITS) == 1


def test_a_seed_repeats_the_draws_and_another_changes_them() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(seed=seed), CPU)
        return [sampler.sample(torch.zeros(1000)) for _ in range(20)]

    assert draws(1) == draws(1) != draws(2)


def test_only_the_kept_tokens_are_ever_drawn() -> None:
    sampler = Sampler(SamplingOptions(top_k=2, seed=0), CPU)
    assert {sampler.sample(LOGITS) for _ in range(200)} == {1, 4}
    sampler = Sampler(SamplingOptions(top_p=0.01, seed=0), CPU)
    assert {sampler.sample(LOGITS) for _ in range(50)} == {1}


@settings(deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=60), st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_tokens_that_hold_the_probability(
    values: list[float], p: float
) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    kept = torch.isfinite(keep_top_p(scores, p))
    probabilities = torch.softmax(scores, dim=-1)
    assert probabilities[kept].sum() >= p - 1e-9
    assert kept.any()
    smallest = probabilities[kept].min()
    assert probabilities[kept].sum() - smallest < p + 1e-9
    assert bool((keep_top_k(scores, 1) > -torch.inf).sum() >= 1)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": 1e9}, {"top_k": -1}, {"top_p": 0}, {"seed": -1}],
)
def test_options_out_of_bounds_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=str(next(iter(options))).replace("_", "-")):
        SamplingOptions(**options)  # type: ignore[arg-type]


def test_an_empty_or_endless_request_is_refused() -> None:
    sampling = SamplingOptions()
    with pytest.raises(RequestError, match="empty"):
        Request(id="a", prompt_tokens=(), max_new_tokens=1, sampling=sampling)
    with pytest.raises(RequestError, match="max-new-tokens 0"):
        Request(id="a", prompt_tokens=(1,), max_new_tokens=0, sampling=sampling)


def _decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@given(st.text(max_size=40))
def test_pieces_of_text_add_up_and_hold_no_broken_character(text: str) -> None:
    decoder = IncrementalDecoder(_decode_bytes)
    pieces = [decoder.push(byte) for byte in text.encode()]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text


def test_what_ends_inside_a_character_is_shown_as_broken() -> None:
    decoder = IncrementalDecoder(_decode_bytes)
    assert [decoder.push(byte) for byte in "é".encode()[:1]] == [""]
    assert decoder.flush() == "\ufffd"
