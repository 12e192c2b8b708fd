"""Checkpoints that are whole or are not there.

transformers writes one under a name that nothing resumes from; then its files are brought to the
disk, their digests are written beside them, and it gets its name. What a kill leaves half-written
is thrown away by the next run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from oomproof.conversion.files import FileDigest, digest_of, explained, sync_folder, write_whole

DIGESTS_FILE = "oomproof-checkpoint.json"
SAVING_FOLDER = "saving"
BEST_FOLDER = "best"
_NAME = re.compile(r"checkpoint-([0-9]{1,18})")


def publish(written: Path, place: Path) -> None:
    """Gives a folder its name, once all of it is on the disk.

    Raises:
        CheckpointError: The disk is full.
    """
    with explained(place):
        digests = []
        for path in sorted(written.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                digests.append(asdict(digest_of(path, path.relative_to(written).as_posix())))
        write_whole(written / DIGESTS_FILE, json.dumps(digests, indent=2).encode())
        sync_folder(written)
        old = place.with_name(place.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        written.rename(place)
        sync_folder(place.parent)
        shutil.rmtree(old, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether every file is there, as it was written."""
    try:
        entries = json.loads((folder / DIGESTS_FILE).read_bytes())
        digests = [FileDigest(**entry) for entry in entries]
        return bool(digests) and all(
            digest_of(folder / one.file, one.file) == one for one in digests
        )
    except (OSError, ValueError, TypeError):
        return False


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint was written after; None for another folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest first; whole ones and others."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def last_whole(folder: Path, told: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; None where there is none.

    Args:
        folder: Of the run's checkpoints.
        told: Told of those that are not; they get another name, so that no newer one gives way.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    shutil.rmtree(folder / SAVING_FOLDER, ignore_errors=True)
    for path in checkpoints(folder):
        if is_whole(path):
            return path
        aside = path.with_name(path.name + ".damaged")
        with explained(path):
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        told(f"{path} is damaged, and is {aside.name} now")
    return None


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest checkpoints."""
    for path in checkpoints(folder)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
