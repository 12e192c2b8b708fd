"""Where running engines are found: a small file each, in oomproof's home.

    running/MACHINE/PID-NUMBER.json

MACHINE stands for the host and its process numbers, so that a home that containers or the nodes of
a cluster share shows each of them its own. No sockets; nothing is trusted that is read.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from oomproof.home import home_folder
from oomproof.monitoring.files import read_bounded, write_whole
from oomproof.monitoring.status import MAX_PID, MAX_STATUS_BYTES, Status, parse_status

MAX_FILES = 256
"""Looked at; a folder with more is somebody's mistake."""
_NAME = re.compile(r"\.?([1-9][0-9]{0,9})-[0-9]{1,6}\.(?:json|tmp)", re.ASCII)
_SAME_START_S = 60.0
"""What a process's start may differ by when it is asked for again: the clock is set meanwhile."""
_OTHER_MACHINES_S = 7 * 86400.0
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """What was found."""

    statuses: tuple[Status, ...]
    """Of processes that live, oldest first."""
    unreadable: tuple[str, ...]
    """Files that are no status, with the reason."""


def status_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """This machine's folder.

    Raises:
        RuntimeError: This user has no home.
    """
    return home_folder(environ) / "running" / _machine()


@cache
def _machine() -> str:
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux, or a sandbox
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:16]


class StatusFile:
    """One engine's file.

    Args:
        folder: Where it lies; see `status_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self.pid = os.getpid()
        self.started_at = psutil.Process(self.pid).create_time()
        self._stem = f"{self.pid}-{next(_numbers) % 1_000_000}"
        self._path = folder / f"{self._stem}.json"
        sweep(folder)

    def write(self, status: Status) -> None:
        """Replaces the status.

        Raises:
            OSError: It cannot be written.
        """
        if os.getpid() == self.pid:  # a fork is another process, and has no engine of its own
            write_whole(self._path, status.to_json(), temporary=f".{self._stem}.tmp")

    def remove(self) -> None:
        """The engine is gone."""
        if os.getpid() == self.pid:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def read_running(folder: Path) -> Running:
    """Every engine that runs here; files of processes that are gone are removed.

    A folder that is not there, or may not be read, has none.
    """
    sweep(folder)
    statuses, unreadable = [], []
    for path, pid in itertools.islice(_files(folder, ".json"), MAX_FILES):
        try:
            status = parse_status(read_bounded(path, MAX_STATUS_BYTES))
        except FileNotFoundError:  # its engine was closed just now
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            unreadable.append(f"{path.name}: {reason}")
            continue
        if status.pid != pid:
            unreadable.append(f"{path.name}: says that it is of process {status.pid}")
        elif is_alive(pid, status.started_at):
            statuses.append(status)
        else:
            _remove(path)
    return Running(
        statuses=tuple(sorted(statuses, key=lambda one: (one.started_at, one.pid))),
        unreadable=tuple(unreadable),
    )


def sweep(folder: Path) -> None:
    """Removes what processes that are gone have left, here and, after a week, of other machines."""
    for path, pid in itertools.islice(_files(folder), 4 * MAX_FILES):
        if not is_alive(pid):
            _remove(path)
    with suppress(OSError):
        for other in itertools.islice(folder.parent.iterdir(), MAX_FILES):
            if other == folder or time.time() - other.lstat().st_mtime < _OTHER_MACHINES_S:
                continue
            for path, _ in itertools.islice(_files(other), 4 * MAX_FILES):
                _remove(path)
            with suppress(OSError):
                other.rmdir()


def is_alive(pid: int, started_at: float | None = None) -> bool:
    """Whether a process lives, and, where its start is given, is still the same one."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started_at is None or abs(process.create_time() - started_at) < _SAME_START_S
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except (psutil.AccessDenied, OSError):
        return True


def _files(folder: Path, suffix: str = "") -> Iterator[tuple[Path, int]]:
    """Files that are ours by name, with their process; none where the folder cannot be read."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return
    for name in names:
        found = _NAME.fullmatch(name)
        if found is not None and name.endswith(suffix) and int(found[1]) <= MAX_PID:
            yield folder / name, int(found[1])


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
