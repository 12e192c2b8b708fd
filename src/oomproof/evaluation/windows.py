"""A text as equal windows of tokens, the same for every format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from oomproof.errors import InputError

DEFAULT_TOKENS = 32 * 1024
DEFAULT_CONTEXT = 2048
LEAST_CONTEXT = 2
_LEAST_READ_BYTES = 1 << 20
_BYTES_PER_TOKEN = 64
"""Bytes of text that are read for each token that is scored: no tokenizer needs as many."""


class TextTokenizer(Protocol):
    """What windows need of a tokenizer."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Special tokens that begin a document."""

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens without special ones, and the character where each ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Inputs and what they predict."""

    inputs: tuple[tuple[int, ...], ...]
    """Each `context` tokens."""
    targets: tuple[tuple[int, ...], ...]
    """The tokens that the last rows of a window predict: `scored` each."""
    text_bytes: int
    """UTF-8 bytes of all targets."""

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return len(self.inputs[0])

    @property
    def scored(self) -> int:
        """Tokens that a window predicts."""
        return len(self.targets[0])

    @property
    def tokens(self) -> int:
        """Tokens that are predicted in all."""
        return len(self.targets) * self.scored


def read_text(path: Path, tokens: int) -> str:
    """The beginning of a file, enough for so many tokens.

    Raises:
        InputError: It cannot be read, is empty, or is no UTF-8 text.
    """
    bound = max(_LEAST_READ_BYTES, tokens * _BYTES_PER_TOKEN)
    if path.is_dir():
        raise InputError(f"text {str(path)!r} is a folder", remedy="name a file of UTF-8 text")
    try:
        with path.open("rb") as file:
            raw = file.read(bound + 1)
    except OSError as error:
        raise InputError(f"text {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"text {str(path)[:80]!r} is no name of a file") from None
    if not raw.strip():
        raise InputError(f"text {str(path)!r} is empty", remedy="name a file with text in it")
    if b"\0" in raw:
        raise InputError(
            f"text {str(path)!r} is a binary file: it has a zero byte",
            remedy="name a file of UTF-8 text",
        )
    is_cut = len(raw) > bound
    try:
        # What was cut may end within a character.
        text = raw[:bound].decode("utf-8", errors="strict")
    except UnicodeDecodeError as error:
        if not is_cut or error.start < bound - 4:
            raise InputError(
                f"text {str(path)!r} is no UTF-8 text: byte {error.start:,} is {error.reason}",
                remedy="convert it to UTF-8",
            ) from None
        text = raw[: error.start].decode("utf-8")
    return text.removeprefix("\ufeff")


def cut_windows(
    text: str, tokenizer: TextTokenizer, *, tokens: int, context: int, name: str
) -> Windows:
    """Windows one after the other, each token of the text predicted once.

    A window begins with the tokenizer's own prefix, or where it has none with the token before: the
    first token of the text is predicted by nothing then.

    Args:
        text: The text.
        tokenizer: The model's.
        tokens: The most tokens to predict.
        context: Tokens of a window.
        name: Of the text, for errors.

    Raises:
        InputError: The text, or the tokens asked for, are less than a window.
    """
    prefix = tokenizer.prefix
    scored = context - max(1, len(prefix)) + 1
    if scored < 1:
        raise InputError(
            f"context {context} has no room beside the {len(prefix)} tokens that begin a text",
            remedy=f"use --context {len(prefix) + 1} or more",
        )
    ids, ends = tokenizer.encode_with_ends(text)
    first = 0 if prefix else 1
    count = min(tokens, len(ids) - first) // scored
    if count < 1 and tokens < scored:
        raise InputError(
            f"tokens {tokens:,} are less than a window of {scored:,}",
            remedy=f"use --tokens {scored} or more, or --context {max(LEAST_CONTEXT, tokens)}",
        )
    if count < 1:
        found = max(0, len(ids) - first)
        remedy = "use a longer text"
        if found + max(1, len(prefix)) - 1 >= LEAST_CONTEXT:
            remedy += f", or --context {found + max(1, len(prefix)) - 1}"
        raise InputError(
            f"{name} has {found:,} tokens to predict, a window of {context:,} needs {scored:,}",
            remedy=remedy,
        )
    starts = [first + number * scored for number in range(count)]
    end = starts[-1] + scored
    begin_character = ends[first - 1] if first else 0
    text_bytes = len(text[begin_character : ends[end - 1]].encode())
    if not text_bytes:
        raise InputError(
            f"the {count * scored:,} tokens of {name} that are predicted end no character",
            remedy="use more --tokens",
        )
    return Windows(
        inputs=tuple(_inputs(ids, prefix, start, scored) for start in starts),
        targets=tuple(tuple(ids[start : start + scored]) for start in starts),
        text_bytes=text_bytes,
    )


def refuse_unknown_tokens(windows: Iterable[Sequence[int]], vocab_size: int, *, name: str) -> None:
    """Refuses tokens that the model has no embedding of.

    Raises:
        InputError: There is one.
    """
    largest = max(max(tokens) for tokens in windows)
    if largest >= vocab_size:
        raise InputError(
            f"{name} has token {largest:,}, outside the vocabulary of {vocab_size:,}",
            remedy="use the tokenizer's files that the model was made with",
        )


def _inputs(
    ids: Sequence[int], prefix: tuple[int, ...], start: int, scored: int
) -> tuple[int, ...]:
    before = prefix or (ids[start - 1],)
    return (*before, *ids[start : start + scored - 1])
