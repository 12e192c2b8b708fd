"""What goes into an engine: refused at the door where it makes no sense, and plain values."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.engine.messages import (
    MAX_NEW_TOKENS,
    Event,
    FinishedEvent,
    Request,
    SamplingOptions,
    TokenEvent,
)
from oomproof.errors import RequestError

VALID_OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 10**6),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logprobs=st.none() | st.integers(0, 20),
    seed=st.none() | st.integers(0, 2**63 - 1),
)


@settings(deadline=None, derandomize=True)
@given(VALID_OPTIONS)
def test_options_within_their_bounds_are_accepted_as_they_are(options: SamplingOptions) -> None:
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -1e-9),
        ("temperature", 100.001),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.0001),
        ("top_p", float("nan")),
        ("min_p", -0.001),
        ("min_p", 1.001),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 100.5),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", -2.001),
        ("presence_penalty", 2.001),
        ("frequency_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("logprobs", -1),
        ("logprobs", 21),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_an_option_out_of_bounds_is_refused_with_its_name_and_value(
    name: str, value: float
) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingOptions(**{name: value})  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"{name.replace('_', '-')} {value} must be")


def test_a_plain_argmax_is_temperature_0_and_nothing_that_needs_more() -> None:
    assert SamplingOptions(temperature=0, top_k=5, top_p=0.5, min_p=0.5, seed=1).is_plain_argmax
    for name, value in (
        ("temperature", 0.1),
        ("repetition_penalty", 1.1),
        ("presence_penalty", -0.1),
        ("frequency_penalty", 0.1),
        ("logprobs", 0),
    ):
        options = SamplingOptions(**{"temperature": 0, name: value})  # type: ignore[arg-type]
        assert not options.is_plain_argmax
        assert options.has_penalties == name.endswith("penalty")


@pytest.mark.parametrize("count", [0, -1, MAX_NEW_TOKENS + 1])
def test_an_answer_of_no_or_of_too_many_tokens_is_refused(count: int) -> None:
    with pytest.raises(RequestError, match=f"max-new-tokens {count} must be from 1 to 1,000,000"):
        Request(id="a", prompt_tokens=(1,), max_new_tokens=count, sampling=SamplingOptions())


def test_a_request_cannot_be_changed_once_it_was_checked() -> None:
    request = Request(id="a", prompt_tokens=(1,), max_new_tokens=1, sampling=SamplingOptions())
    with pytest.raises(FrozenInstanceError):
        request.max_new_tokens = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    "message",
    [
        Request(
            id="a",
            prompt_tokens=(1, 2),
            max_new_tokens=3,
            sampling=SamplingOptions(seed=4),
            stop_tokens=frozenset({5}),
        ),
        TokenEvent(request_id="a", token=7),
        TokenEvent(request_id="a", token=7, logprob=-0.5, top_logprobs=((7, -0.5), (8, -2.0))),
        FinishedEvent(request_id="a", reason="stop", prompt_tokens=2, new_tokens=1),
    ],
)
def test_messages_travel_through_a_pipe_unchanged(message: Request | Event) -> None:
    assert pickle.loads(pickle.dumps(message)) == message


@pytest.mark.parametrize("resumed", [-1, 3, 4])
def test_what_is_resumed_leaves_a_token_of_the_prompt(resumed: int) -> None:
    with pytest.raises(RequestError, match=rf"resumed-tokens {resumed} must be from 0 to 2"):
        Request(
            id="a",
            prompt_tokens=(1, 2, 3),
            max_new_tokens=1,
            sampling=SamplingOptions(),
            resumed_tokens=resumed,
        )
