"""Tokens become text piece by piece: the pieces add up to the decoded answer, for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from oomproof.engine.text import (
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    IncrementalDecoder,
    StopScanner,
    read_stops,
)
from oomproof.errors import RequestError
from oomproof.models.resolve import bundled_folder

Decode = Callable[[Sequence[int]], str]
BROKEN = "\ufffd"


def pieces_of(tokens: Sequence[int], decode: Decode) -> list[str]:
    decoder = IncrementalDecoder(decode)
    return [*(decoder.push(token) for token in tokens), decoder.flush()]


@pytest.fixture(scope="module")
def bundled() -> Any:
    """The bundled model's tokenizer: bytes joined to tokens, as in Llama 3, Qwen, GPT-2."""
    return Tokenizer.from_file(str(bundled_folder() / "tokenizer.json"))


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=60))
@example("日本語のテキスト 👩‍👩‍👧‍👦 e\u0301 \ufffd")
def test_any_text_comes_back_from_the_bundled_tokenizer_piece_by_piece(
    bundled: Any, text: str
) -> None:
    tokens = bundled.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(tokens, bundled.decode)
    assert "".join(pieces) == bundled.decode(tokens)
    if BROKEN not in text:
        assert not any(BROKEN in piece for piece in pieces)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2047), max_size=40))
def test_any_tokens_at_all_add_up_to_what_they_decode_to(bundled: Any, tokens: list[int]) -> None:
    assert "".join(pieces_of(tokens, bundled.decode)) == bundled.decode(tokens)


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_bytes_that_are_no_text_add_up_too(data: bytes) -> None:
    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    assert "".join(pieces_of(tuple(data), decode)) == data.decode(errors="replace")


class SentencePieces:
    """Llama 2's, Mistral's and Gemma's way: ▁ for a space, bytes for what is not in the vocabulary.

    Its decoder is the one that Llama 2's tokenizer.json lists; ASCII letters are its vocabulary.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of a text: indices into the pieces seen so far."""
        pieces: list[str] = []
        for character in " " + text:
            if character.isascii():
                pieces.append("▁" if character == " " else character)
            else:
                pieces += [f"<0x{byte:02X}>" for byte in character.encode()]
        self._pieces += pieces
        return list(range(len(self._pieces) - len(pieces), len(self._pieces)))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; its first space is left out."""
        return str(self._decoder.decode([self._pieces[token] for token in tokens]))


@settings(deadline=None, derandomize=True)
@given(st.text("ab 日é👍", max_size=30))
@example("a b  c")
@example("日本語で")
@example("👍👍👍👍👍")
def test_characters_that_arrive_as_single_bytes_come_out_whole(text: str) -> None:
    tokenizer = SentencePieces()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    pieces = pieces_of(tokens, tokenizer.decode)
    assert "".join(pieces) == text


def test_a_piece_is_held_back_only_until_its_character_is_whole() -> None:
    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    assert pieces_of("a€b".encode(), decode) == ["a", "", "", "€", "b", ""]


def cut(text: str, stops: Sequence[str]) -> str:
    """What is before the first stop string."""
    places = [text.find(stop) for stop in stops]
    return text[: min((place for place in places if place >= 0), default=len(text))]


STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)
PIECES = st.lists(st.text("abc", max_size=4), max_size=12)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(PIECES, STOPS)
@example(["ab", "a", "b"], ["abb", "ba"])
@example(["a", "b", "c", "d"], ["abcd", "c"])
@example(["ab", "cx"], ["abcd", "c"])
@example(["aaab"], ["aab"])
@example(["ab", "c"], ["abcd", "c"])
def test_what_is_handed_out_is_cut_at_the_first_stop_string_whatever_the_borders(
    pieces: list[str], stops: list[str]
) -> None:
    scanner, handed, whole = StopScanner(stops), "", "".join(pieces)
    longest = max((len(stop) for stop in stops), default=1)
    for number, piece in enumerate(pieces):
        handed += scanner.push(piece)
        so_far = "".join(pieces[: number + 1])
        assert cut(whole, stops).startswith(handed)
        if not scanner.found:
            assert len(so_far) - len(handed) < longest
    handed += scanner.flush()
    assert handed == cut(whole, stops)
    assert scanner.found == (cut(whole, stops) != whole)
    if scanner.found:
        assert scanner.push("more") == ""


def test_text_that_may_become_a_stop_string_waits_and_other_text_does_not() -> None:
    scanner = StopScanner(["\nUser:"])
    assert [scanner.push(piece) for piece in ("Hello\n", "Us", "ers", "!\nUser", ": x", "y")] == [
        "Hello",
        "",
        "\nUsers",
        "!",
        "",
        "",
    ]
    assert scanner.found


def test_without_stop_strings_every_piece_goes_through() -> None:
    scanner = StopScanner(())
    assert (scanner.push("a"), scanner.push(""), scanner.flush(), scanner.found) == (
        "a",
        "",
        "",
        False,
    )


def test_stop_strings_are_given_as_none_one_or_several() -> None:
    assert read_stops(None) == ()
    assert read_stops("###") == ("###",)
    assert read_stops(["a", "b"]) == ("a", "b")
    assert len(read_stops(["a" * MAX_STOP_CHARACTERS] * MAX_STOPS)) == MAX_STOPS


@pytest.mark.parametrize(
    ("stop", "named"),
    [
        ("", "0 characters"),
        (["fine", ""], "0 characters"),
        ("a" * (MAX_STOP_CHARACTERS + 1), "1,001 characters"),
        (["a"] * (MAX_STOPS + 1), "17 stop strings"),
        (["a", 5], "not int"),
    ],
)
def test_stop_strings_beyond_the_bounds_are_refused(stop: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        read_stops(stop)
