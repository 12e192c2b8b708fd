"""Text at the border of an engine: tokens become text piece by piece, without broken characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"


class IncrementalDecoder:
    """Turns a growing answer into pieces of text.

    A token may end inside a UTF-8 character: such a piece is held back until the character is
    whole. The concatenated pieces equal the decoded answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = 0
        """Where decoding begins: the tokens of the last piece give spacing its context, and a
        piece never begins inside a character."""
        self._settled = 0
        """Tokens whose text was handed out."""

    def push(self, token: int) -> str:
        """The text that this token completes, which may be empty."""
        self._tokens.append(token)
        return self._advance(held_back=_REPLACEMENT)

    def flush(self) -> str:
        """What is left at the end of the answer, broken characters included."""
        return self._advance(held_back=None)

    def _advance(self, held_back: str | None) -> str:
        before = self._decode(self._tokens[self._start : self._settled])
        after = self._decode(self._tokens[self._start :])
        if held_back is not None and after.endswith(held_back):
            return ""
        self._start, self._settled = self._settled, len(self._tokens)
        return after[len(before) :]
