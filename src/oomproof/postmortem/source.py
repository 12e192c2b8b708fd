"""A log as lines, whatever its size and bytes: read once, in pieces, each line bounded."""

from __future__ import annotations

import codecs
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from oomproof.errors import InputError
from oomproof.faults.line import MAX_LINE

_PIECE_BYTES = 1 << 16
_HEAD_BYTES = 1 << 13
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""What Windows writes in front of a redirected output."""
_MAX_CONTROL_SHARE = 0.1
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\a\x1b"))
_REMEDY = "give the text of a traceback or a log"


@contextmanager
def open_log(file: str) -> Iterator[BinaryIO]:
    """A file, opened for `read_lines`.

    Raises:
        InputError: There is no such file, or it cannot be read.
    """
    path = Path(file)
    shown = file if len(file) <= 200 else file[:200] + "…"
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise InputError(f"{shown!r}: there is no such file", remedy=_REMEDY) from None
    except IsADirectoryError:
        raise InputError(f"{shown!r} is a folder", remedy=_REMEDY) from None
    except ValueError:  # a NUL in the name
        raise InputError(f"{shown!r} is no name of a file", remedy=_REMEDY) from None
    except OSError as error:
        folder = error.errno == errno.EACCES and path.is_dir()  # what Windows says of a folder
        why = "is a folder" if folder else f"cannot be read ({error.strerror})"
        raise InputError(f"{shown!r} {why}", remedy=_REMEDY) from None
    with stream:
        yield stream


def read_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a log, without their ends; of a longer one than MAX_LINE, its beginning.

    A carriage return ends a line too: progress bars write them. Bytes that are no text of the
    encoding become U+FFFD.

    Args:
        stream: Where its bytes come from; read once, from here on.
        name: What it is called in errors.

    Raises:
        InputError: It is empty, binary, or cannot be read.
    """
    piece = _read(stream, _HEAD_BYTES, name)
    if not piece:
        raise InputError(f"{name} is empty", remedy=_REMEDY)
    encoding = next((name for bom, name in _BOMS if piece.startswith(bom)), "utf-8")
    if encoding != "utf-16":
        _refuse_binary(piece, name)
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    pending = ""
    while piece:
        text = pending + decoder.decode(piece)
        # The other half of a line's end may be in the next piece.
        text, held = (text[:-1], "\r") if text.endswith("\r") else (text, "")
        *lines, pending = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in lines:
            yield line[:MAX_LINE]
        # What is dropped of a long line is its middle; its end begins no error.
        pending = pending[: MAX_LINE + 1] + held
        piece = _read(stream, _PIECE_BYTES, name)
    if pending := pending.rstrip("\r"):
        yield pending[:MAX_LINE]


def _read(stream: BinaryIO, size: int, name: str) -> bytes:
    try:
        return stream.read(size)
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror})", remedy=_REMEDY) from None


def _refuse_binary(head: bytes, name: str) -> None:
    controls = len(head) - len(head.translate(None, _CONTROL))
    if b"\0" in head or controls > _MAX_CONTROL_SHARE * len(head):
        raise InputError(f"{name} is binary", remedy=_REMEDY)
