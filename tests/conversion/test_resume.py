"""Killed at any moment, on a full disk, or twice at once: the output is whole or resumable."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from oomproof.conversion.files import PartFile, write_whole
from oomproof.conversion.manifest import verify
from oomproof.conversion.work import JOURNAL_FILE, WorkFolder, work_folder_of
from oomproof.errors import InputError
from oomproof.session import quantize
from oomproof.units import MIB
from tests.conversion.jobs import files_of, in_shards, quantized

_KILLED = """
import os, pathlib, signal, sys
from pathlib import Path
left = int(sys.argv[3])
def counted(module, name):
    own = getattr(module, name)
    def call(*arguments, **options):
        global left
        if armed:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return own(*arguments, **options)
    setattr(module, name, call)
armed = False
for name in ("write", "fsync", "mkdir", "unlink", "rename", "rmdir"):
    counted(os, name)
for name in ("replace", "rename", "unlink", "mkdir"):
    counted(Path, name)
from oomproof.conversion import quantize as job
from oomproof.session import quantize
own = job.run
def run(*arguments):
    global armed
    armed = True
    return own(*arguments)
job.run = run
quantize(sys.argv[1], sys.argv[2], device="cpu", shard=1 << 20)
print(left)
"""
_SLOW_DISK = """
import sys, time
from oomproof.conversion import files
from oomproof.session import quantize
own = files.PartFile.write
def write(self, content, offset):
    print("write", flush=True)
    time.sleep(0.005)
    own(self, content, offset)
files.PartFile.write = write
quantize(sys.argv[1], sys.argv[2], device="cpu", shard=1 << 20)
"""


WRITES = 180
"""Of the slow disk; a few less than there are."""


class Made(NamedTuple):
    source: Path
    expected: dict[str, bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    source = in_shards(folder / "source")
    return Made(source, files_of(quantized(folder / "out", source, shard=MIB)))


def check_state(out: Path, made: Made) -> None:
    """The output is absent or whole."""
    if out.exists():
        assert {**files_of(out), JOURNAL_FILE: b""} == {**made.expected, JOURNAL_FILE: b""}


def check_resumed(out: Path, made: Made) -> int:
    """A run after it brings the whole output; how many shards were finished before."""
    report = quantize(made.source, out, device="cpu", shard=MIB)
    assert files_of(out) == made.expected
    assert verify(out) is not None
    assert not work_folder_of(out).exists()
    return report.resumed_files


def killed_at(script: str, made: Made, out: Path, *arguments: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", script, str(made.source), str(out), *arguments],
        capture_output=True,
        check=False,
    ).returncode


def check_killed_at_calls(made: Made, folder: Path, moments: list[int]) -> None:
    killed = 0
    for moment in moments:
        out = folder / f"out-{moment}"
        code = killed_at(_KILLED, made, out, str(moment))
        killed += code == -signal.SIGKILL
        assert code in {0, -signal.SIGKILL}
        check_state(out, made)
        check_resumed(out, made)
    assert killed


def test_killed_between_any_two_calls_of_the_system_it_goes_on(made: Made, tmp_path: Path) -> None:
    check_killed_at_calls(made, tmp_path, random.Random(7).sample(range(1, 180), 5))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_50_such_moments_it_goes_on(made: Made, tmp_path: Path) -> None:
    check_killed_at_calls(made, tmp_path, random.Random(8).sample(range(1, 240), 50))


def check_killed_while_writing(made: Made, folder: Path, times: int, seed: int) -> None:
    chosen = random.Random(seed)
    resumed = 0
    for number in range(times):
        out = folder / f"out-{number}"
        with subprocess.Popen(
            [sys.executable, "-c", _SLOW_DISK, str(made.source), str(out)],
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            for _ in range(chosen.randint(1, WRITES)):
                process.stdout.readline()
            time.sleep(chosen.uniform(0, 0.02))
            process.kill()
        check_state(out, made)
        resumed += check_resumed(out, made)
    assert resumed


def test_killed_at_5_random_moments_while_it_writes_it_goes_on(made: Made, tmp_path: Path) -> None:
    check_killed_while_writing(made, tmp_path, 5, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_50_random_moments_while_it_writes_it_goes_on(made: Made, tmp_path: Path) -> None:
    check_killed_while_writing(made, tmp_path, 50, seed=4)


def interrupt_after(shards: int) -> Any:
    """A run that ends after so many finished shards."""
    own = WorkFolder.record
    left = shards

    def record(self: WorkFolder, digest: Any) -> None:
        nonlocal left
        own(self, digest)
        left -= 1
        if not left:
            raise KeyboardInterrupt

    return patch.object(WorkFolder, "record", record)


def interrupted(made: Made, out: Path, shards: int, **options: Any) -> Path:
    with interrupt_after(shards), pytest.raises(KeyboardInterrupt):
        quantize(made.source, out, **{"device": "cpu", "shard": MIB, **options})
    return work_folder_of(out)


def test_finished_shards_are_not_made_again(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(made, out, 3)
    assert check_resumed(out, made) == 3


def test_a_finished_shard_that_was_damaged_is_made_again(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = interrupted(made, out, 3)
    first = min(work.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    assert check_resumed(out, made) == 2


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_a_torn_journal_loses_no_more_than_it_tore(cut: int, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    journal = interrupted(made, out, 3) / JOURNAL_FILE
    content = journal.read_bytes()
    journal.write_bytes(content[: max(0, len(content) - cut)])
    assert check_resumed(out, made) == {1: 3, 40: 2, 10_000: 0}[cut]


def test_what_another_job_left_is_dropped(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(made, out, 2, format="nf4")
    assert check_resumed(out, made) == 0


def test_a_source_that_changed_is_another_job(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(made, out, 2)
    file = next(made.source.glob("*.safetensors"))
    was = file.stat()
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    try:
        report = quantize(made.source, out, device="cpu", shard=MIB)
    finally:
        os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert report.resumed_files == 0


def test_a_folder_in_the_works_place_is_left_alone(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work_folder_of(out).mkdir()
    (work_folder_of(out) / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not a folder of ours: it has no .*: remove it"):
        quantize(made.source, out, device="cpu")
    assert (work_folder_of(out) / "thesis.txt").read_text() == "mine"


def test_a_second_run_at_once_is_refused(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def meanwhile(*_arguments: object) -> None:
        with pytest.raises(InputError, match="is being written by another process"):
            quantize(made.source, out, device="cpu", shard=MIB)
        raise KeyboardInterrupt

    with (
        patch("oomproof.conversion.writing._write_shards", meanwhile),
        pytest.raises(KeyboardInterrupt),
    ):
        quantize(made.source, out, device="cpu", shard=MIB)
    check_resumed(out, made)


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "file", 10)
    part.write(b"1234567890", 0)
    part.abandon()
    assert list(tmp_path.iterdir()) == []
    digest = write_whole(tmp_path / "file", b"1234567890")
    assert (digest.size_bytes, digest.sha256[:8]) == (10, "c775e7b7")


@pytest.mark.parametrize("kind", ["file", "full", "link", "root", "long", "null", "unwritable"])
def test_a_place_that_cannot_be_written_is_refused(kind: str, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("")
    elif kind == "full":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path / "elsewhere")
    elif kind == "unwritable":
        (tmp_path / "plain").write_text("")
    place = {
        "root": Path("/"),
        "long": tmp_path / ("x" * 300),
        "null": tmp_path / "a\0b",
        "unwritable": tmp_path / "plain" / "out",
    }.get(kind, out)
    with pytest.raises(InputError):
        quantize(made.source, place, device="cpu")
