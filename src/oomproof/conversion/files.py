"""Writing so that a power cut or a full disk leaves nothing that looks whole and is not."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from oomproof.errors import CheckpointError
from oomproof.units import MIB

_CHUNK_BYTES = 4 * MIB
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """A file as it was when it was finished."""

    file: str
    """Name relative to its folder."""
    size_bytes: int
    sha256: str


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the system refuses while writing into one error with a remedy.

    Raises:
        CheckpointError: The disk is full, or the path cannot be written.
    """
    try:
        yield
    except OSError as error:
        remedy = "choose an --out that can be written"
        if error.errno in _FULL:
            remedy = "free some space and run the same command again: what is finished is kept"
        raise CheckpointError(
            str(path), f"cannot be written ({error.strerror or error})", remedy=remedy
        ) from error


class PartFile:
    """A file that has its name only once it is whole and on disk.

    Its space is taken at once, where the file system can: a full disk is met before any work.

    Args:
        path: Its name in the end.
        size_bytes: All that will be written.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path, self._size_bytes = path, size_bytes
        self._part = path.with_name(path.name + ".part")
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self._part, flags, 0o666)
        try:
            _reserve(self._descriptor, size_bytes)
        except BaseException:
            self.abandon()
            raise

    def write(self, content: bytes | memoryview, offset: int) -> None:
        """Writes all of the content at an offset."""
        view = memoryview(content).cast("B")
        while view:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            count = os.write(self._descriptor, view[:_CHUNK_BYTES])
            view, offset = view[count:], offset + count

    def finish(self) -> FileDigest:
        """Brings it to the disk and gives it its name."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        digest = digest_of(self._part, self._path.name)
        self._part.replace(self._path)
        return digest

    def abandon(self) -> None:
        """Leaves nothing of it."""
        os.close(self._descriptor)
        self._part.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> FileDigest:
    """A small file, on disk when this returns."""
    part = PartFile(path, len(content))
    part.write(content, 0)
    return part.finish()


def digest_of(path: Path, name: str | None = None) -> FileDigest:
    """Reads a file through.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileDigest(file=name or path.name, size_bytes=size, sha256=digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Brings the names in a folder to the disk, where the system has a way to."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, size_bytes: int) -> None:
    if not size_bytes or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
