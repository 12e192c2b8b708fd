"""Text in, text out, over an engine and a tokenizer that are made up."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache

import pytest
from pydantic import TypeAdapter, ValidationError

from oomproof.engine.messages import (
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    SamplingOptions,
    TokenEvent,
)
from oomproof.engine.model import (
    DEFAULT_MAX_NEW_TOKENS,
    GenerationDefaults,
    Message,
    Model,
    TokenLogprobs,
)
from oomproof.errors import RequestError
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import Plan
from oomproof.session import plan

END = ord("!")
"""The token that ends an answer."""
CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


@cache
def planned(context: int = 64) -> Plan:
    return plan("tiny", gpus="1x24GiB", context=context)


class Letters:
    """A tokenizer whose tokens are code points."""

    stop_tokens = frozenset({END})

    def __init__(self, *, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self.encode("".join(f"<{m['role'][0]}:{m['content']}>" for m in messages))

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


class Parrot:
    """An engine that answers each prompt with the prompt, a token a step, `slots` at once."""

    def __init__(self, slots: int = 2) -> None:
        self._slots = slots
        self._requests: dict[str, Request] = {}
        self._left: dict[str, deque[int]] = {}
        self._cancelled: set[str] = set()
        self.submitted: list[Request] = []
        self.closed = False

    def submit(self, request: Request) -> None:
        if len(request.prompt_tokens) > 64:
            raise RequestError("too long")
        self.submitted.append(request)
        self._requests[request.id] = request
        self._left[request.id] = deque(request.prompt_tokens)

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def step(self) -> Sequence[Event]:
        events: list[Event] = []
        ended = [r for r in self._requests.values() if r.id in self._cancelled]
        events += [self._end(request, "cancelled") for request in ended]
        for request in list(self._requests.values())[: self._slots]:
            left = self._left[request.id]
            token = left.popleft() if left else END
            if token in request.stop_tokens:
                events.append(self._end(request, "stop"))
                continue
            wanted = request.sampling.logprobs
            top = tuple((token + rank, -1.0 - rank) for rank in range(wanted or 0))
            logprob = None if wanted is None else -1.0
            events.append(
                TokenEvent(request_id=request.id, token=token, logprob=logprob, top_logprobs=top)
            )
            if len(request.prompt_tokens) - len(left) == request.max_new_tokens:
                events.append(self._end(request, "length"))
        return events

    def _end(self, request: Request, reason: FinishReason) -> FinishedEvent:
        del self._requests[request.id]
        prompt = len(request.prompt_tokens)
        new = prompt - len(self._left[request.id])
        return FinishedEvent(
            request_id=request.id, reason=reason, prompt_tokens=prompt, new_tokens=new
        )

    @property
    def idle(self) -> bool:
        return not self._requests

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        return {0: DeviceTerms(weights=1)}

    def close(self) -> None:
        self.closed = True


def parrot(
    defaults: GenerationDefaults | None = None, *, has_chat_template: bool = True, slots: int = 2
) -> tuple[Model, Parrot]:
    engine = Parrot(slots)
    tokenizer = Letters(has_chat_template=has_chat_template)
    return Model(engine, tokenizer, planned(), defaults), engine


def test_an_answer_comes_in_pieces_that_add_up_to_it() -> None:
    model, _ = parrot()
    stream = model.stream("hello", raw=True)
    assert list(stream) == list("hello")
    assert stream.text == "hello"
    assert stream.tokens == [ord(letter) for letter in "hello"]
    assert (stream.finish_reason, stream.prompt_tokens) == ("stop", 5)
    assert list(stream) == []


def test_a_stop_token_is_no_part_of_the_answer() -> None:
    assert parrot()[0].generate("ab!cd", raw=True) == "ab"


def test_an_answer_ends_at_its_bound() -> None:
    model, _ = parrot()
    stream = model.stream("hello", raw=True, max_new_tokens=2)
    assert "".join(stream) == "he"
    assert stream.finish_reason == "length"


def test_an_answer_that_stops_at_once_is_empty_and_has_no_speed() -> None:
    stream = parrot()[0].stream("!", raw=True)
    assert "".join(stream) == ""
    assert stream.first_token_s is None
    assert stream.tokens_per_second is None
    assert stream.finished_s is not None


def test_speed_counts_the_tokens_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = parrot()
    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stream = model.stream("abcde", raw=True, max_new_tokens=5)
    assert stream.tokens_per_second is None
    list(stream)
    assert (stream.first_token_s, stream.finished_s) == (2.0, 4.0)
    assert stream.tokens_per_second == 4 / 2.0


def test_streams_may_be_read_in_turns_and_none_loses_a_token() -> None:
    model, _ = parrot(slots=2)
    words = ("first", "second one", "third")
    streams = [model.stream(word, raw=True) for word in words]
    pieces: list[list[str]] = [[], [], []]
    unfinished = set(range(3))
    while unfinished:
        for index in sorted(unfinished):
            piece = next(streams[index], None)
            if piece is None:
                unfinished.remove(index)
            else:
                pieces[index].append(piece)
    assert tuple("".join(found) for found in pieces) == words


def test_reading_the_last_stream_first_gives_each_its_own_answer() -> None:
    model, _ = parrot(slots=1)
    streams = [model.stream(word, raw=True) for word in ("one", "two", "three")]
    assert ["".join(stream) for stream in reversed(streams)] == ["three", "two", "one"]


@pytest.mark.parametrize("stop", ["lo w", ["zz", "lo w", "world"]])
def test_an_answer_is_cut_before_a_stop_string_and_its_request_ended(stop: str | list[str]) -> None:
    model, engine = parrot()
    stream = model.stream("hello world", raw=True, stop=stop)
    assert "".join(stream) == "hel"
    assert (stream.text, stream.finish_reason) == ("hel", "stop")
    assert len(stream.tokens) == len("hello w")
    assert engine.idle
    assert stream.finished_s is not None
    stream.cancel()
    assert stream.finish_reason == "stop"


def test_what_only_looked_like_a_stop_string_is_part_of_the_answer() -> None:
    model, _ = parrot()
    stream = model.stream("ab abc", raw=True, stop="abcd")
    assert "".join(stream) == "ab abc"
    assert stream.finish_reason == "stop"
    cancelled = model.stream("abcd", raw=True, stop="abcx")
    while len(cancelled.tokens) < 2:
        model.advance()
    cancelled.cancel()
    assert (cancelled.text, cancelled.finish_reason) == ("ab", "cancelled")


@pytest.mark.parametrize(
    ("bound", "text", "reason"), [(4, "a", "stop"), (3, "abc", "length"), (5, "a", "stop")]
)
def test_a_stop_string_goes_before_the_bound(bound: int, text: str, reason: str) -> None:
    model, engine = parrot()
    stream = model.stream("abcdefgh", raw=True, stop="bcd", max_new_tokens=bound)
    assert ("".join(stream), stream.finish_reason) == (text, reason)
    assert engine.idle


def test_a_stop_string_that_another_one_might_have_begun_before_counts_at_the_end() -> None:
    stream = parrot()[0].stream("xabc", raw=True, stop=["abcd", "c"])
    assert ("".join(stream), stream.finish_reason) == ("xab", "stop")


def test_a_stop_string_of_one_stream_leaves_the_others_alone() -> None:
    model, _ = parrot(slots=2)
    streams = [model.stream("one two", raw=True, stop=" "), model.stream("one two", raw=True)]
    assert ["".join(stream) for stream in streams] == ["one", "one two"]


def test_log_probabilities_come_with_the_tokens_where_they_are_asked_for() -> None:
    model, _ = parrot()
    stream = model.stream("ab", raw=True, logprobs=2)
    assert stream.logprobs == []
    list(stream)
    assert stream.logprobs == [
        TokenLogprobs(token=token, logprob=-1.0, top=((token, -1.0), (token + 1, -2.0)))
        for token in (ord("a"), ord("b"))
    ]
    unasked = model.stream("ab", raw=True)
    list(unasked)
    assert unasked.logprobs == []


def test_many_prompts_are_answered_in_their_order() -> None:
    model, engine = parrot(slots=2)
    prompts = [f"prompt {number}" for number in range(7)]
    assert model.generate_all(prompts, raw=True) == prompts
    assert engine.idle


def test_a_refused_prompt_among_many_leaves_no_request_behind() -> None:
    model, engine = parrot()
    with pytest.raises(RequestError, match="too long"):
        model.generate_all(["fine", "x" * 65, "fine too"], raw=True)
    model.advance()
    assert engine.idle


def test_a_cancelled_answer_keeps_what_it_had_and_ends() -> None:
    model, engine = parrot()
    stream, other = model.stream("hello", raw=True), model.stream("world", raw=True)
    assert next(stream) == "h"
    stream.cancel()
    assert stream.finish_reason == "cancelled"
    assert "".join(stream) == ""
    assert stream.text == "h"
    stream.cancel()
    assert "".join(other) == "world"
    assert engine.idle


def test_a_waiting_request_can_be_cancelled() -> None:
    model, _ = parrot(slots=1)
    first, waiting = model.stream("hello", raw=True), model.stream("never", raw=True)
    waiting.cancel()
    assert (waiting.text, waiting.finish_reason) == ("", "cancelled")
    assert "".join(first) == "hello"
    assert model.generate("again", raw=True) == "again"


def test_cancelling_what_is_over_changes_nothing() -> None:
    model, _ = parrot()
    stream = model.stream("hi", raw=True)
    list(stream)
    stream.cancel()
    assert (stream.text, stream.finish_reason) == ("hi", "stop")


def test_a_message_goes_through_the_chat_template_and_a_raw_text_does_not() -> None:
    model, engine = parrot()
    assert model.generate("hi") == "<u:hi>"
    assert model.generate("hi", raw=True) == "hi"
    assert model.generate(CONVERSATION) == "<u:a><a:b><u:c>"
    assert len({request.id for request in engine.submitted}) == 3


def test_without_a_chat_template_a_text_is_continued_and_a_conversation_refused() -> None:
    model, _ = parrot(has_chat_template=False)
    assert model.generate("hi") == "hi"
    with pytest.raises(RequestError, match="no chat template"):
        model.generate(CONVERSATION)


def test_a_conversation_cannot_be_raw_and_the_reason_given_is_true() -> None:
    model, _ = parrot()
    with pytest.raises(RequestError) as refused:
        model.generate(CONVERSATION, raw=True)
    assert "has no chat template" not in str(refused.value)


def test_the_models_own_sampling_options_hold_where_none_are_asked_for() -> None:
    own = {"temperature": 0.3, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05}
    asked = {
        "temperature": 0,
        "top_k": 0,
        "top_p": 1,
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 5,
        "logprobs": 2,
    }
    model, engine = parrot(GenerationDefaults(**own))  # type: ignore[arg-type]
    model.stream("a", raw=True)
    model.stream("a", raw=True, **asked)  # type: ignore[arg-type]
    found = [request.sampling for request in engine.submitted]
    assert found == [SamplingOptions(**own), SamplingOptions(**asked)]  # type: ignore[arg-type]


def test_a_model_without_options_of_its_own_samples_plainly() -> None:
    model, engine = parrot()
    model.stream("a", raw=True)
    assert engine.submitted[0].sampling == SamplingOptions()


def test_stop_tokens_of_the_model_are_read_as_one_or_several() -> None:
    assert GenerationDefaults().stop_tokens == frozenset()
    assert GenerationDefaults(eos_token_id=3).stop_tokens == {3}
    assert GenerationDefaults(eos_token_id=(3, 4)).stop_tokens == {3, 4}


@pytest.mark.parametrize(
    "text",
    [
        '{"min_p": 2}',
        '{"min_p": NaN}',
        '{"min_p": "low"}',
        '{"repetition_penalty": 0}',
        '{"repetition_penalty": NaN}',
        '{"repetition_penalty": 1e999}',
    ],
)
def test_a_models_own_options_are_read_strictly(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(GenerationDefaults).validate_json(text)


def test_a_models_own_options_may_be_null() -> None:
    read = TypeAdapter(GenerationDefaults).validate_json
    assert read('{"repetition_penalty": 1.05, "min_p": null}') == GenerationDefaults(
        repetition_penalty=1.05
    )


def test_an_answer_is_bounded_by_512_tokens_or_by_the_room_that_is_left() -> None:
    model, engine = parrot()
    model.stream("x" * 10, raw=True)
    assert engine.submitted[-1].max_new_tokens == 64 - 10
    roomy = Model(engine, Letters(), planned(1024))
    roomy.stream("x" * 10, raw=True)
    assert engine.submitted[-1].max_new_tokens == DEFAULT_MAX_NEW_TOKENS


def test_an_option_out_of_bounds_is_refused_before_the_engine_sees_it() -> None:
    model, engine = parrot()
    with pytest.raises(RequestError, match="temperature -1"):
        model.stream("a", temperature=-1)
    with pytest.raises(RequestError, match="prompt is empty"):
        model.stream("", raw=True)
    with pytest.raises(RequestError, match="logprobs 21"):
        model.stream("a", logprobs=21)
    with pytest.raises(RequestError, match="17 stop strings"):
        model.stream("a", stop=["a"] * 17)
    assert engine.submitted == []


def test_a_with_block_closes_the_engine_even_after_an_error() -> None:
    model, engine = parrot()
    with pytest.raises(ZeroDivisionError), model:
        _ = 1 / 0
    assert engine.closed
    assert model.measured_terms()[0].weights == 1
