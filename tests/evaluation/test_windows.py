"""Windows: every token of a text predicted once, and every useless text refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from oomproof.errors import InputError
from oomproof.evaluation.windows import cut_windows, read_text, refuse_unknown_tokens


class Letters:
    """A token a character."""

    def __init__(self, *prefix: int) -> None:
        self._prefix = prefix

    @property
    def prefix(self) -> tuple[int, ...]:
        return self._prefix

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        return [ord(letter) for letter in text], [n + 1 for n in range(len(text))]


def letters(tokens: tuple[int, ...]) -> str:
    return "".join(map(chr, tokens))


def test_with_a_beginning_every_token_is_predicted_once() -> None:
    windows = cut_windows("abcdefghij", Letters(0), tokens=100, context=4, name="text")
    assert [letters(targets) for targets in windows.targets] == ["abcd", "efgh"]
    assert [letters(inputs) for inputs in windows.inputs] == ["\0abc", "\0efg"]
    assert (windows.tokens, windows.context, windows.scored, windows.text_bytes) == (8, 4, 4, 8)


def test_without_one_a_window_begins_with_the_token_before_it() -> None:
    windows = cut_windows("abcdefghij", Letters(), tokens=100, context=4, name="text")
    assert [letters(inputs) for inputs in windows.inputs] == ["abcd", "efgh"]
    assert [letters(targets) for targets in windows.targets] == ["bcde", "fghi"]
    assert windows.text_bytes == 8


def test_a_longer_beginning_takes_room_of_the_window() -> None:
    windows = cut_windows("abcdefghij", Letters(0, 1), tokens=7, context=4, name="text")
    assert [letters(targets) for targets in windows.targets] == ["abc", "def"]
    assert [letters(inputs) for inputs in windows.inputs] == ["\0\1ab", "\0\1de"]


def test_bytes_are_those_of_what_is_predicted() -> None:
    windows = cut_windows("aéüb😀x", Letters(), tokens=4, context=4, name="text")
    assert windows.text_bytes == len("éüb😀".encode())


@pytest.mark.parametrize(
    ("text", "tokens", "context", "words"),
    [
        ("abc", 100, 8, "3 tokens to predict, a window of 8 needs 8: use a longer text, or --con"),
        ("", 100, 8, "0 tokens to predict"),
        ("abcdefghij", 3, 8, "tokens 3 are less than a window of 8: use --tokens 8 or more"),
    ],
)
def test_less_than_a_window_is_refused(text: str, tokens: int, context: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        cut_windows(text, Letters(0), tokens=tokens, context=context, name="text")


def test_a_context_that_the_beginning_fills_is_refused() -> None:
    with pytest.raises(InputError, match="no room beside the 3 tokens"):
        cut_windows("abcdefghij", Letters(0, 1, 2), tokens=9, context=2, name="text")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"MZ\0\0", "binary file"),
        (b"caf\xe9 au lait", "no UTF-8 text: byte 3"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_text(path, 10)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_text(tmp_path / "none", 10)
    with pytest.raises(InputError, match="is a folder"):
        read_text(tmp_path, 10)
    with pytest.raises(InputError, match="no name of a file"):
        read_text(Path("a\0b"), 10)


def test_a_long_file_is_read_no_further_than_needed_and_not_cut_in_a_character(
    tmp_path: Path,
) -> None:
    path = tmp_path / "text"
    path.write_text("é" * (1 << 20), encoding="utf-8")
    path.write_bytes(b"a" + path.read_bytes())
    text = read_text(path, 10)
    assert 1 << 18 < len(text) < 1 << 20
    assert set(text[1:]) == {"é"}


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(path, 10) == "abc"


class Halves(Letters):
    """Two tokens a character, which both end with it."""

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        return [n % 2 for n in range(2 * len(text))], [n // 2 + 1 for n in range(2 * len(text))]


def test_tokens_that_end_no_character_are_refused() -> None:
    with pytest.raises(InputError, match="end no character: use more --tokens"):
        cut_windows("😀x", Halves(), tokens=1, context=1, name="text")


def test_a_token_without_an_embedding_is_refused() -> None:
    refuse_unknown_tokens([(0, 9), (4, 5)], 10, name="text 'a'")
    with pytest.raises(InputError, match="text 'a' has token 9, outside the vocabulary of 9"):
        refuse_unknown_tokens([(0, 9), (4, 5)], 9, name="text 'a'")
