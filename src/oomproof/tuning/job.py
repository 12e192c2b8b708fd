"""The folder of a fine-tuning: whose it is, what is in it, and whether a run may go on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oomproof.conversion.files import explained, write_whole
from oomproof.conversion.work import place_of_output
from oomproof.errors import CheckpointError, InputError
from oomproof.models.folder import read_bounded
from oomproof.models.headers import parse_json_object
from oomproof.units import MIB

JOB_FILE = "oomproof-tune.json"
REPORT_FILE = "oomproof-tuned.json"
ADAPTER_FILE = "adapter_model.safetensors"
WORK_FOLDER = "training"
"""Checkpoints, cached tokens: what an adapter does not need."""
_MAX_BYTES = 16 * MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneFolder:
    """Where a fine-tuning lives: the adapter in the end, and `training/` on the way there."""

    path: Path

    @property
    def work(self) -> Path:
        """Checkpoints and cached tokens."""
        return self.path / WORK_FOLDER

    @property
    def cache(self) -> Path:
        """The data's tokens."""
        return self.work / "data"

    @property
    def is_finished(self) -> bool:
        """Whether the adapter is there."""
        return (self.path / REPORT_FILE).is_file()

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the folder's; None where there is none.

        Raises:
            CheckpointError: It is damaged.
        """
        file = self.path / name
        if not file.is_file():
            return None
        found = parse_json_object(
            read_bounded(file, bound_bytes=_MAX_BYTES), what="content", location=str(file)
        )
        return dict(found)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON object, whole or not at all.

        Raises:
            CheckpointError: It cannot be written.
        """
        with explained(self.path / name):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / name, (json.dumps(content, indent=2) + "\n").encode())


def open_folder(out: str | Path, *, resume: bool) -> TuneFolder:
    """The folder to work in, made where there is none.

    Raises:
        InputError: It has something in it and is not to be resumed, or is not one of ours.
        CheckpointError: It cannot be made.
    """
    path = place_of_output(Path(out))
    folder = TuneFolder(path=path)
    with explained(path):
        names = {one.name for one in path.iterdir()} if path.is_dir() else set()
    # Before there is a job there are the data's tokens, perhaps in part, and nothing else.
    work = {one.name for one in folder.work.iterdir()} if folder.work.is_dir() else set()
    ours = JOB_FILE in names or (names == {WORK_FOLDER} and work <= {"data", "data.part"})
    if names and not ours:
        raise InputError(
            f"--out {path} exists and holds something else", remedy="give another name"
        )
    if names and not resume:
        what = "a finished adapter" if folder.is_finished else "an unfinished run"
        raise InputError(
            f"--out {path} holds {what}", remedy="go on with --resume, or give another name"
        )
    return folder


def read_chosen(folder: TuneFolder) -> Mapping[str, Any]:
    """What the plan chose when the run began: a resumed one keeps to it.

    Raises:
        CheckpointError: It is damaged.
    """
    found = (folder.read(JOB_FILE) or {}).get("chosen", {})
    if not isinstance(found, dict) or not isinstance(found.get("micro_batch", 1), int):
        raise CheckpointError(
            str(folder.path / JOB_FILE), "is damaged: chosen", remedy="tune into another --out"
        )
    return found


def agree_with_job(folder: TuneFolder, job: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Notes what a folder is for, or compares it with what it was begun for.

    Args:
        folder: The folder.
        job: All that decides the weights.
        chosen: What the plan chose, for `read_chosen`.

    Raises:
        InputError: It was begun with other options or data; the first difference is named.
    """
    before = folder.read(JOB_FILE)
    if before is None:
        folder.write(JOB_FILE, {"schema": 1, "job": job, "chosen": chosen})
        return
    begun = before.get("job")
    if isinstance(begun, dict):  # before there were several
        begun = {"ranks": 1, **begun}
    _refuse_differences(folder, begun, job)


def agree_with_finished(folder: TuneFolder, asked: Mapping[str, Any]) -> None:
    """Compares what is asked with what a finished folder was made for, and looks for its adapter.

    Args:
        folder: The folder.
        asked: What is known of the job without a plan.

    Raises:
        InputError: It was made with other options or data; the first difference is named.
        CheckpointError: The adapter is not there any more.
    """
    begun = (folder.read(JOB_FILE) or {}).get("job")
    known = begun if isinstance(begun, dict) else {}
    _refuse_differences(folder, {name: known.get(name) for name in asked}, asked)
    require_folder(folder, ADAPTER_FILE)


def _refuse_differences(folder: TuneFolder, begun: Any, now: Mapping[str, Any]) -> None:
    for name, was, is_now in _differences("", begun, json.loads(json.dumps(now))):
        raise InputError(
            f"--out {folder.path} was begun with {name} {_shown(was)}, not {_shown(is_now)}",
            remedy="give the same options and data, or another --out",
        )


def _differences(prefix: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            one
            for key in dict.fromkeys((*before, *now))
            for one in _differences(f"{prefix}{key} ", before.get(key), now.get(key))
        ]
    return [] if before == now else [(prefix.strip(), before, now)]


def _shown(value: Any) -> str:
    return str(value)[:60]


def require_folder(folder: TuneFolder, adapter_file: str) -> None:
    """Checks that a finished folder still has its adapter.

    Raises:
        CheckpointError: It has not.
    """
    if not (folder.path / adapter_file).is_file():
        raise CheckpointError(
            str(folder.path / adapter_file), "is missing", remedy="tune again into another --out"
        )
