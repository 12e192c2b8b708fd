"""`oomproof chat`, its lines piped in: answers to stdout, everything else to stderr."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from oomproof import session
from oomproof.engine.model import Message, Model, Prompt, Stream
from oomproof.errors import RequestError, WorkerDownError, WorkerError
from tests.cli.invoke import Outcome, invoke


@pytest.fixture(scope="module")
def loaded() -> Iterator[Model]:
    with session.load("tiny", format="bf16", context=256) as model:
        yield model


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, loaded: Model) -> list[list[Message]]:
    """Lets `chat` use one loaded model; the conversations that it was asked, in order."""
    conversations: list[list[Message]] = []
    stream = Model.stream

    def record(model: Model, prompt: Prompt, **options: object) -> Stream:
        assert not isinstance(prompt, str)
        conversations.append([dict(message) for message in prompt])
        return stream(model, prompt, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "load", lambda *_arguments, **_options: loaded)
    monkeypatch.setattr(Model, "close", lambda _model: None)
    monkeypatch.setattr(Model, "stream", record)
    return conversations


def chat(lines: str | bytes, *options: str) -> Outcome:
    return invoke("chat", "tiny", "--seed", "1", "--max-new-tokens", "6", *options, stdin=lines)


def test_two_turns_are_one_conversation(asked: list[list[Message]]) -> None:
    done = chat("Who goes there?\nAnd then?\n")
    assert done.code == 0
    assert [[message["role"] for message in turn] for turn in asked] == [
        ["user"],
        ["user", "assistant", "user"],
    ]
    first_answer = asked[1][1]["content"]
    assert done.out.startswith(first_answer + "\n")
    assert asked[1][2]["content"] == "And then?"


def test_clear_forgets_what_was_said(asked: list[list[Message]]) -> None:
    done = chat("Who goes there?\n/clear\nAnd then?\n")
    assert [len(turn) for turn in asked] == [1, 1]
    assert "forgotten" in done.err


def test_help_and_unknown_commands_are_talk_and_no_turns(asked: list[list[Message]]) -> None:
    done = chat("/help\n/nope now\n/\n\n   \n")
    assert (done.code, done.out, asked) == (0, "", [])
    for command in ("/clear", "/plan", "/memory", "/quit"):
        assert command in done.err
    assert "no command /nope; /help lists them" in done.err


def test_stop_strings_and_penalties_reach_every_turn(
    asked: list[list[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, object]] = []
    stream = Model.stream

    def record(model: Model, prompt: Prompt, **options: object) -> Stream:
        given.append(options)
        return stream(model, prompt, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "stream", record)
    options = ("--stop", "a", "--stop", "b", "--presence-penalty", "0.5", "--min-p", "0.1")
    done = chat("Who goes there?\nAnd then?\n", *options)
    assert done.code == 0
    expected = {"stop": ("a", "b"), "presence_penalty": 0.5, "min_p": 0.1}
    assert [expected | one for one in given] == given
    assert len(given) == 2
    assert not {"a", "b"} & set(done.out)


@pytest.mark.parametrize("last", ["/quit", "/exit", "  /quit  "])
def test_quit_leaves_and_reads_no_further(asked: list[list[Message]], last: str) -> None:
    assert chat(f"{last}\nnever asked\n").code == 0
    assert asked == []


@pytest.mark.parametrize("lines", ["", "\n", "hello", "hello\n"])
def test_the_end_of_the_input_leaves_too(asked: list[list[Message]], lines: str) -> None:
    assert chat(lines).code == 0
    assert len(asked) == bool(lines.strip())


def test_plan_and_memory_can_be_asked_for(asked: list[list[Message]]) -> None:
    done = chat("/plan\n/memory\n")
    assert done.code == 0
    assert "up to 1,024 tokens of context" in done.out
    assert "memory of 0 cpu" in done.err


def test_a_conversation_beyond_the_context_is_told_and_goes_on_after_clear(
    asked: list[list[Message]],
) -> None:
    done = chat(f"Hello?\n{'word ' * 300}\nShort?\n/clear\nAnother?\n")
    assert done.code == 0
    assert "planned context of 256" in done.err
    assert "/clear forgets the conversation" in done.err
    assert [len(turn) for turn in asked] == [1, 3, 3, 1]
    assert asked[2][2]["content"] == "Short?"


def test_a_refused_turn_leaves_the_conversation_as_it_was(
    asked: list[list[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_model: Model, prompt: Prompt, **_options: object) -> Stream:
        asked.append([dict(m) for m in prompt if not isinstance(m, str)])
        raise RequestError("not now")

    monkeypatch.setattr(Model, "stream", refuse)
    done = chat("one\ntwo\n")
    assert [len(turn) for turn in asked] == [1, 1]
    assert done.err.count("error: not now") == 2
    assert done.code == 0


def test_ctrl_c_ends_the_answer_and_the_conversation_goes_on(
    asked: list[list[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Stream.__next__

    def interrupted(stream: Stream) -> str:
        if len(asked) == 1 and len(stream.tokens) >= 2:
            raise KeyboardInterrupt
        return original(stream)

    monkeypatch.setattr(Stream, "__next__", interrupted)
    done = chat("Who goes there?\nAnd then?\n")
    assert done.code == 0
    assert len(asked) == 2
    assert done.out.startswith(asked[1][1]["content"] + "\n")


def test_a_line_that_is_no_text_is_no_traceback(asked: list[list[Message]]) -> None:
    done = chat(b"hello\ncaf\xe9\nbye\n")
    assert done.code in (0, 1)
    assert "error: " in done.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--temperature", "-1"), "temperature -1"),
        (("--top-p", "0"), "top-p 0"),
        (("--min-p", "-1"), "min-p -1"),
        (("--repetition-penalty", "0"), "repetition-penalty 0"),
        (("--presence-penalty", "-3"), "presence-penalty -3"),
        (("--frequency-penalty", "3"), "frequency-penalty 3"),
        (("--stop", ""), "stop string of 0 characters"),
        (("--max-new-tokens", "0"), "max-new-tokens 0"),
    ],
)
def test_a_wrong_option_is_told_before_the_conversation_begins(
    asked: list[list[Message]], options: tuple[str, ...], named: str
) -> None:
    assert named in chat("hello\n", *options).error
    assert asked == []


def test_a_lost_answer_is_told_and_the_conversation_goes_on(
    asked: list[list[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [WorkerError("it was ended by SIGKILL", signal="SIGKILL")]
    original = Stream.__next__

    def fail_once(stream: Stream) -> str:
        if errors:
            raise errors.pop()
        return original(stream)

    monkeypatch.setattr(Stream, "__next__", fail_once)
    done = chat("Who goes there?\nAnd then?\n")
    assert done.code == 0
    assert "error: it was ended by SIGKILL" in done.err
    assert [[message["content"] for message in turn] for turn in asked] == [
        ["Who goes there?"],
        ["And then?"],
    ]


def test_a_model_that_is_lost_for_good_ends_the_chat(
    asked: list[list[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_stream: Stream) -> str:
        raise WorkerDownError("it failed 4 times")

    monkeypatch.setattr(Stream, "__next__", fail)
    done = chat("Who goes there?\nAnd then?\n")
    assert done.code == 1
    assert done.err.endswith("error: it failed 4 times\n")
    assert len(asked) == 1
