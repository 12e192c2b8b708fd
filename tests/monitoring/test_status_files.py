"""Status files: of the living alone, whole or not at all, and read without trust."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from oomproof.monitoring.status import MAX_STATUS_BYTES, parse_status
from oomproof.monitoring.status_files import (
    StatusFile,
    is_alive,
    read_running,
    status_folder,
    sweep,
)
from tests.monitoring.made_up import status


def gone() -> int:
    """A process number that nobody has any more."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return int(done.stdout)


def plain(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(status().to_json())
    return found | changes


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = status()
    StatusFile(tmp_path / "new" / "folder").write(written)
    assert read_running(tmp_path / "new" / "folder").statuses == (written,)


def test_two_engines_of_one_process_have_a_file_each(tmp_path: Path) -> None:
    first, second = StatusFile(tmp_path), StatusFile(tmp_path)
    first.write(status())
    second.write(replace(status(), model="other"))
    assert {one.model for one in read_running(tmp_path).statuses} == {"llama-3.1-8b", "other"}
    first.remove()
    assert [one.model for one in read_running(tmp_path).statuses] == ["other"]


def test_files_of_processes_that_are_gone_are_swept_with_their_drafts(tmp_path: Path) -> None:
    pid = gone()
    (tmp_path / f"{pid}-0.json").write_bytes(status(pid=pid).to_json())
    (tmp_path / f".{pid}-0.tmp").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("not ours")
    assert read_running(tmp_path).statuses == ()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_of_an_earlier_process_of_the_same_number_is_swept(tmp_path: Path) -> None:
    earlier = replace(status(), started_at=1_000_000.0)
    (tmp_path / f"{os.getpid()}-0.json").write_bytes(earlier.to_json())
    assert read_running(tmp_path).statuses == ()
    assert list(tmp_path.iterdir()) == []
    assert is_alive(os.getpid())
    assert not is_alive(os.getpid(), 1_000_000.0)


def test_other_machines_files_are_left_alone_for_a_week(tmp_path: Path) -> None:
    mine, old, new = (tmp_path / name for name in ("mine", "old", "new"))
    for folder in (mine, old, new):
        folder.mkdir()
        (folder / f"{gone()}-0.json").write_bytes(b"{}")
    long_ago = time.time() - 8 * 86400
    os.utime(old, (long_ago, long_ago))
    sweep(mine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new"]
    assert list(mine.iterdir()) == []
    assert len(list(new.iterdir())) == 1


HOSTILE = {
    "nothing": b"",
    "garbage": b"\x00\xff\xfe garbage",
    "truncated": status().to_json()[:300],
    "no object": b"[1, 2, 3]",
    "deep": b"[" * 100_000,
    "not finite": json.dumps(plain(written_at=float("nan"))).encode(),
    "negative": json.dumps(plain(rss_bytes=-1)).encode(),
    "beyond a petabyte": json.dumps(plain(rss_bytes=2**60)).encode(),
    "beyond any integer": json.dumps(plain(steps=10**400)).encode(),
    "another schema": json.dumps(plain(schema=2)).encode(),
    "a number as text": json.dumps(plain(requests="12")).encode(),
    "too long a name": json.dumps(plain(model="x" * 301)).encode(),
    "too many devices": json.dumps(plain(devices=plain()["devices"] * 65)).encode(),
    "a negative term": json.dumps(
        plain(devices=[plain()["devices"][0] | {"measured": {"weights": -5}}])
    ).encode(),
    "another pid": json.dumps(plain(pid=1)).encode(),
    "too large": json.dumps(plain(padding="x" * MAX_STATUS_BYTES)).encode(),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_status_is_named_and_hides_no_other(data: bytes, tmp_path: Path) -> None:
    StatusFile(tmp_path).write(status())
    bad = tmp_path / f"{os.getpid()}-999999.json"
    bad.write_bytes(data)
    running = read_running(tmp_path)
    assert len(running.statuses) == 1
    [problem] = running.unreadable
    assert problem.startswith(bad.name)
    assert len(problem) < 600
    assert bad.exists()


def test_texts_that_steer_a_terminal_are_disarmed() -> None:
    hostile = json.dumps(plain(model="\x1b]0;owned\x07\x1b[2J\u202eevil\nline")).encode()
    assert parse_status(hostile).model == "�]0;owned��[2J�evil�line"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_links_pipes_and_folders_are_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(status().to_json())
    folder = tmp_path / "running"
    folder.mkdir()
    (folder / f"{os.getpid()}-1.json").symlink_to(secret)
    os.mkfifo(folder / f"{os.getpid()}-2.json")
    (folder / f"{os.getpid()}-3.json").mkdir()
    running = read_running(folder)
    assert running.statuses == ()
    assert len(running.unreadable) == 3


def test_names_that_are_not_ours_are_not_looked_at(tmp_path: Path) -> None:
    names = ("0-1.json", "-1.json", "1.json", "1-1.json.bak", "99999999999-1.json", "1-x.json")
    for name in names:
        (tmp_path / name).write_text("{}")
    running = read_running(tmp_path)
    assert (running.statuses, running.unreadable) == ((), ())
    assert len(list(tmp_path.iterdir())) == len(names)


def test_a_folder_that_is_not_there_has_none(tmp_path: Path) -> None:
    running = read_running(tmp_path / "nowhere")
    assert (running.statuses, running.unreadable) == ((), ())


def test_the_folder_is_in_oomproofs_home_and_of_this_machine() -> None:
    folder = status_folder({"OOMPROOF_HOME": "/a"})
    assert folder.parent == Path("/a/running")
    assert folder == status_folder({"OOMPROOF_HOME": "/a"})


def _write_many(folder: str, together: Barrier) -> None:
    file = StatusFile(Path(folder))
    told = replace(status(), pid=os.getpid(), started_at=file.started_at)
    steps = 0
    together.wait(60)
    until = time.time() + 1
    while time.time() < until:
        steps += 1
        file.write(replace(told, steps=steps))


def test_readers_see_whole_files_while_several_processes_write(tmp_path: Path) -> None:
    context = get_context("spawn")
    together = context.Barrier(3)
    writers = [
        context.Process(target=_write_many, args=(str(tmp_path), together)) for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    most = 0
    while any(writer.is_alive() for writer in writers):
        running = read_running(tmp_path)
        assert running.unreadable == ()
        most = max(most, len(running.statuses))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert most >= 2
    assert read_running(tmp_path).statuses == ()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX's")
def test_a_fork_neither_writes_nor_removes_its_parents_file(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    file.write(status())
    script_pid = os.fork()
    if script_pid == 0:
        file.write(replace(status(), model="the fork"))
        file.remove()
        os._exit(0)
    os.waitpid(script_pid, 0)
    assert [one.model for one in read_running(tmp_path).statuses] == ["llama-3.1-8b"]
