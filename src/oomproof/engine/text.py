"""Text at the border of an engine: tokens become text piece by piece, without broken characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 8
"""Tokens decoded again with each new one, so that spacing and joined bytes come out right."""


class IncrementalDecoder:
    """Turns a growing answer into pieces of text.

    A token may end inside a UTF-8 character: such a piece is held back until the character is
    whole. The concatenated pieces equal the decoded answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
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
        start = max(0, self._settled - _CONTEXT_TOKENS)
        before = self._decode(self._tokens[start : self._settled])
        after = self._decode(self._tokens[start:])
        if held_back is not None and after.endswith(held_back):
            return ""
        self._settled = len(self._tokens)
        return after[len(before) :]
