"""Small files in oomproof's home: written whole or not at all, read without trust."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def write_whole(path: Path, data: bytes, *, temporary: str) -> None:
    """Replaces a file in one move; readers see the old one or the new one.

    Args:
        path: In a folder that is made where it is missing, for this user alone.
        data: All of it.
        temporary: A name beside it that no other writer uses.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(temporary)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_FOLLOW | _BINARY
    try:
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
            file.write(data)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """A regular file's bytes, one more than allowed at most; never waits for a pipe.

    Raises:
        OSError: It cannot be read, or is a link.
        ValueError: It is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | _NO_FOLLOW | _NO_WAIT | _BINARY)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("no regular file")
        return file.read(most_bytes + 1)
