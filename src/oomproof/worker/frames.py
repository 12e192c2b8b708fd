"""Frames on a pipe: a byte of version, four of length (big endian), and as many of payload.

A reader takes bytes as they come, in pieces of any size. What does not begin with this version, or
is longer than the bound, is refused before anything of it is kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VERSION = 1
"""Of frames and messages; both ends of a pipe have the same."""
MAX_FRAME_BYTES = 64 * 2**20
"""Of one payload: a prompt of a million tokens, or a step of 4,096 requests with
log-probabilities, takes a fraction of it."""
_HEADER = struct.Struct(">BI")


class ProtocolError(Exception):
    """The other end of a pipe sent what is no frame or no message."""


def frame(payload: bytes) -> bytes:
    """A payload with its header.

    Raises:
        ProtocolError: It is empty, or longer than MAX_FRAME_BYTES.
    """
    _check_length(len(payload))
    return _HEADER.pack(VERSION, len(payload)) + payload


class FrameReader:
    """Puts frames together from pieces of a stream."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The payloads that this piece completes.

        Raises:
            ProtocolError: The stream holds something else than frames; of no use afterwards.
        """
        held = self._held
        held += piece
        start = 0
        try:
            while len(held) - start >= _HEADER.size:
                version, length = _HEADER.unpack_from(held, start)
                if version != VERSION:
                    raise ProtocolError(f"version {version} of a frame is not {VERSION}")
                _check_length(length)
                end = start + _HEADER.size + length
                if len(held) < end:
                    return
                payload = bytes(held[start + _HEADER.size : end])
                start = end
                yield payload
        finally:
            del held[:start]


def _check_length(length: int) -> None:
    if not 1 <= length <= MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a frame of {length:,} bytes is not one of 1 to {MAX_FRAME_BYTES:,} bytes"
        )
