"""The folder that an output grows in: hidden, beside it, on the same disk, and resumable.

It holds finished shards, a journal of their digests, and at most one shard under way. A kill at any
moment leaves it so that the same command goes on; the output appears in one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from oomproof.conversion.files import FileDigest, digest_of, explained, sync_folder
from oomproof.errors import InputError
from oomproof.models.checkpoint import MAX_SHARDS

JOURNAL_FILE = ".oomproof-journal"
SOURCE_FOLDER = ".source"
"""Where a source shard is downloaded to."""
_SUFFIX = ".oomproof-quantizing"
_MAX_NAME_BYTES = 255
_MAX_JOURNAL_LINES = 10 * MAX_SHARDS


class WorkFolder:
    """The unfinished output of one job.

    Args:
        out: Where the output will be.
        job: Digest of everything that it depends on.
    """

    def __init__(self, out: Path, job: str) -> None:
        self.out = out
        self.path = work_folder_of(out)
        self._job = job
        self.finished: dict[str, FileDigest] = {}
        """Shards that need not be written again."""

    @property
    def source_folder(self) -> Path:
        """Where a source shard is downloaded to."""
        return self.path / SOURCE_FOLDER

    def make(self) -> None:
        """The folder itself, empty or as an earlier run left it.

        Raises:
            InputError: There is something else in its place.
        """
        with explained(self.path):
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
                raise InputError(f"{self.path} is not a folder of ours", remedy="remove it")
            self.path.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self.path.iterdir()}
        if names and JOURNAL_FILE not in names:
            raise InputError(
                f"{self.path} is not a folder of ours: it has no {JOURNAL_FILE}", remedy="remove it"
            )

    def begin(self) -> None:
        """Takes up what an earlier run of the same job left, and drops what another one did."""
        with explained(self.path):
            if not self._take_up():
                for path in self.path.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
                self._append({"job": self._job})
                sync_folder(self.path)

    def record(self, digest: FileDigest) -> None:
        """Notes a file that is finished and has its name."""
        with explained(self.path):
            sync_folder(self.path)
            self._append(asdict(digest))
        self.finished[digest.file] = digest

    def publish(self) -> None:
        """Makes it the output. All files are written and synced."""
        shutil.rmtree(self.source_folder, ignore_errors=True)
        with explained(self.out):
            for path in self.path.glob("*.part"):
                path.unlink()
            sync_folder(self.path)
            if self.out.is_dir():
                self.out.rmdir()  # it is empty, and some systems do not rename over it
            self.path.rename(self.out)
            (self.out / JOURNAL_FILE).unlink(missing_ok=True)
            sync_folder(self.out.parent)

    def _take_up(self) -> bool:
        """Whether this job left it; then its finished shards are compared with their digests."""
        entries = _entries(self.path / JOURNAL_FILE)
        if not entries or entries[0].get("job") != self._job:
            return False
        for digest in filter(None, map(_digest, entries[1:])):
            path = self.path / digest.file
            if path.is_file() and digest_of(path) == digest:
                self.finished[digest.file] = digest
        return True

    def _append(self, entry: Mapping[str, object]) -> None:
        journal = self.path / JOURNAL_FILE
        line = json.dumps(entry).encode() + b"\n"
        # A kill may have torn the last line: this one begins anew.
        if journal.exists() and not journal.read_bytes().endswith(b"\n"):
            line = b"\n" + line
        with journal.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def work_folder_of(out: Path) -> Path:
    """Beside the output, on the same disk."""
    return out.with_name(f".{out.name}{_SUFFIX}")


def place_of_output(out: Path) -> Path:
    """Absolute path of the folder to make.

    Raises:
        InputError: It is no name that a folder and its work folder can have, or is taken.
    """
    try:
        out = out.expanduser().absolute()
        shown = str(out)[:200]
        if not out.name or out.name == "..":
            raise InputError(f"--out {shown} names no folder to make", remedy="give its name")
        if not shown.isprintable() or len(work_folder_of(out).name.encode()) > _MAX_NAME_BYTES:
            raise InputError(
                f"--out {shown!r} has a name that is too long or not printable",
                remedy="give a shorter one",
            )
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise InputError(f"--out {out} exists and is no folder", remedy="give another name")
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        raise InputError(f"--out {str(out)[:200]!r} cannot be used ({error})") from error
    return out


def refuse_used(out: Path, holds: str | None = None) -> None:
    """Refuses a folder with something in it.

    Args:
        out: The folder to make.
        holds: What another job wrote there, where that is known.

    Raises:
        InputError: It is one.
    """
    with explained(out):
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"--out {out} exists and " + (f"holds {holds}" if holds else "is not empty"),
                remedy="give another name, or remove it",
            )


def refuse_inside(out: Path, source: Path) -> None:
    """Refuses to write into the folder that is read.

    Raises:
        InputError: The output would lie there.
    """
    if source.resolve() in out.resolve().parents:
        raise InputError(
            f"--out {out} lies in the folder of the model itself", remedy="give another place"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second run out of a work folder, where the system can.

    Raises:
        InputError: One is in it.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    with explained(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{folder} is being written by another process",
                remedy="wait for it, or give another --out",
            ) from None
        yield
    finally:
        os.close(descriptor)


def _entries(journal: Path) -> list[dict[str, object]]:
    """Its whole lines; a torn one says nothing."""
    found: list[dict[str, object]] = []
    if not journal.is_file():
        return found
    for line in journal.read_bytes().splitlines()[:_MAX_JOURNAL_LINES]:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _digest(entry: Mapping[str, object]) -> FileDigest | None:
    file, size, sha256 = (entry.get(name) for name in ("file", "size_bytes", "sha256"))
    if not isinstance(file, str) or not isinstance(size, int) or not isinstance(sha256, str):
        return None
    if Path(file).name != file:
        return None
    return FileDigest(file=file, size_bytes=size, sha256=sha256)
