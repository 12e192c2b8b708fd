"""Text at the border of an engine: tokens become text piece by piece, without broken characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oomproof.errors import RequestError

MAX_STOPS = 16
"""Stop strings of one request."""
MAX_STOP_CHARACTERS = 1000
_REPLACEMENT = "\ufffd"


def read_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a user gives them: none, one or several.

    Raises:
        RequestError: There are too many, or one is empty, too long or no text.
    """
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"{len(stops)} stop strings are more than {MAX_STOPS}")
    for text in stops:
        if not isinstance(text, str):
            raise RequestError(f"a stop string must be text, not {type(text).__name__}")
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                f"a stop string of {len(text):,} characters must have from 1 to "
                f"{MAX_STOP_CHARACTERS:,}"
            )
    return stops


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


class StopScanner:
    """Cuts a growing text before the first occurrence of a stop string.

    Text that may be the beginning of one is held back. The concatenated pieces equal the text up
    to where the first stop string begins, however it is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        """Whether a stop string came; nothing is handed out any more."""

    def push(self, piece: str) -> str:
        """What may be handed out after this piece of text, which may be nothing."""
        if not self._stops or self.found:
            return "" if self.found else piece
        self._held += piece
        found, possible = self._first(), self._first_possible()
        if found is not None and found <= possible:
            return self._cut(found)
        safe, self._held = self._held[:possible], self._held[possible:]
        return safe

    def flush(self) -> str:
        """What is left at the end of the text."""
        found = self._first()
        return self._cut(len(self._held) if found is None else found, found=found is not None)

    def _cut(self, end: int, *, found: bool = True) -> str:
        safe, self._held = self._held[:end], ""
        self.found = self.found or found
        return safe

    def _first(self) -> int | None:
        """Where the first stop string in the held text begins."""
        places = [self._held.find(stop) for stop in self._stops]
        return min((place for place in places if place >= 0), default=None)

    def _first_possible(self) -> int:
        """Where the held text may go on to become a stop string, its end if nowhere."""
        longest = max(map(len, self._stops))
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)
