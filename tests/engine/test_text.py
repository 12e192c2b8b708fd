"""Tokens become text piece by piece: the pieces add up to the decoded answer, for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from oomproof.engine.text import IncrementalDecoder
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
