"""The manifest of a quantized checkpoint: what it was made from, and the digest of each file."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from oomproof.conversion.files import FileDigest, digest_of
from oomproof.errors import CheckpointError
from oomproof.models.folder import read_bounded
from oomproof.models.headers import parse_json_object, shorten
from oomproof.units import MIB

MANIFEST_FILE = "oomproof-manifest.json"
_SCHEMA = 1
_MAX_BYTES = 16 * MIB
_MAX_THREADS = 8
_FIELDS = {"file", "size_bytes", "sha256"}
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAME = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What lies in a folder that this program wrote."""

    job: str
    """Digest of everything that the output depends on."""
    made_from: Mapping[str, object]
    """Model, revision, format, dtype, version: for people."""
    files: tuple[FileDigest, ...]

    def as_bytes(self) -> bytes:
        """As it lies on disk; its length does not depend on the digests."""
        content = {
            "schema": _SCHEMA,
            **self.made_from,
            "job": self.job,
            "files": [
                {"file": one.file, "size_bytes": one.size_bytes, "sha256": one.sha256}
                for one in self.files
            ],
        }
        return (json.dumps(content, indent=2) + "\n").encode()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    content = parse_json_object(
        read_bounded(path, bound_bytes=_MAX_BYTES), what="content", location=str(path)
    )
    job, files = content.pop("job", None), content.pop("files", None)
    if content.pop("schema", None) != _SCHEMA:
        raise CheckpointError(str(path), f"is not of schema {_SCHEMA}", remedy="quantize it again")
    if not isinstance(job, str) or not isinstance(files, list):
        raise CheckpointError(str(path), "lacks job or files", remedy="quantize it again")
    return Manifest(job=job, made_from=content, files=tuple(_read_entries(files, path)))


def _read_entries(entries: Sequence[object], path: Path) -> Iterator[FileDigest]:
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != _FIELDS:
            raise CheckpointError(str(path), f"has an entry {shorten(entry)} that is no file")
        name, size, sha256 = entry["file"], entry["size_bytes"], entry["sha256"]
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in {".", ".."}:
            raise CheckpointError(
                str(path), f"names {shorten(name)}, which is not a plain file name"
            )
        if type(size) is not int or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise CheckpointError(str(path), f"has no size and digest for {name}")
        yield FileDigest(file=name, size_bytes=size, sha256=sha256)


def verify(folder: Path) -> Manifest | None:
    """Reads every file that a manifest names, several at a time.

    Returns:
        The manifest; None where the folder has none, and nothing was compared.

    Raises:
        CheckpointError: A file is missing, or has other bytes than it was written with.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        with verifying(folder):
            pass
    return manifest


@contextmanager
def verifying(folder: Path) -> Iterator[None]:
    """Compares files with their digests while the block runs; all are compared when it ends.

    Does nothing for a folder without a manifest.

    Raises:
        CheckpointError: As `verify`.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        yield
        return
    for one in manifest.files:
        _check_size(folder, one)
    stop = threading.Event()
    with ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="oomproof-verify") as pool:
        largest_first = sorted(manifest.files, key=lambda one: -one.size_bytes)
        pending = [pool.submit(_compare, folder, one, stop) for one in largest_first]
        try:
            yield
            _raise_first(pending)
        finally:
            stop.set()


def _raise_first(pending: Iterable[Future[None]]) -> None:
    for future in pending:
        future.result()


def _check_size(folder: Path, expected: FileDigest) -> None:
    path = folder / expected.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(
            str(path), f"is missing, {MANIFEST_FILE} names it", remedy="quantize it again"
        ) from error
    if size != expected.size_bytes:
        raise CheckpointError(
            str(path),
            f"has {size:,} bytes, it was written with {expected.size_bytes:,}",
            remedy=f"quantize it again, or remove {MANIFEST_FILE} if you changed it",
        )


def _compare(folder: Path, expected: FileDigest, stop: threading.Event) -> None:
    if stop.is_set():
        return
    path = folder / expected.file
    try:
        found = digest_of(path)
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})") from error
    if found.sha256 != expected.sha256:
        raise CheckpointError(
            str(path),
            f"has sha256 {found.sha256[:12]}…, it was written with {expected.sha256[:12]}…",
            remedy=f"it is damaged: quantize it again, or remove {MANIFEST_FILE} if you changed it",
        )
