"""Disks that are too small, fill up or fail: told first, or one error, and nothing is lost."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from oomproof.errors import CheckpointError
from oomproof.session import quantize
from oomproof.units import MIB
from tests.compat.checkpoints import random_checkpoint
from tests.conversion.jobs import files_of, in_shards, quantized
from tests.conversion.test_resume import Made, check_resumed, check_state


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    source = in_shards(folder / "source")
    return Made(source, files_of(quantized(folder / "out", source, shard=MIB)))


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    made: Made, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    total = sum(map(len, made.expected.values()))
    with patch("oomproof.conversion.writing.shutil.disk_usage") as usage:
        usage.return_value.free = total - 1
        with pytest.raises(CheckpointError, match=r"out: needs .* more, the disk has .* free: fre"):
            quantize(made.source, out, device="cpu", shard=MIB)
        assert not list(tmp_path.rglob("*.safetensors*"))
        usage.return_value.free = total
        check_resumed(out, made)


def fails_at(name: str, moment: int, code: int) -> Callable[..., Any]:
    """A call of the system that fails the n-th time."""
    own = getattr(os, name)
    left = moment

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(code, os.strerror(code))
        return own(*arguments, **options)

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("moment", [1, 2, 7, 30])
@pytest.mark.parametrize("name", ["write", "fsync", "posix_fallocate"])
def test_a_disk_that_fails_is_one_error_and_the_work_is_resumed(
    name: str, moment: int, code: int, made: Made, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with patch.object(os, name, fails_at(name, moment, code)):
        refusal = refused(made, out)
    if refusal is not None:
        assert f"cannot be written ({os.strerror(code)})" in str(refusal)
        assert str(tmp_path) in refusal.file
        full = code in {errno.ENOSPC, errno.EDQUOT}
        assert ("run the same command again" in str(refusal)) == full
        # The rename itself may be done when syncing its folder fails.
        check_state(out, made)
    check_resumed(out, made)


@pytest.mark.parametrize("name", ["write", "fsync", "posix_fallocate"])
def test_a_disk_that_is_full_at_any_call_is_one_error_and_the_work_is_resumed(
    name: str, tmp_path: Path
) -> None:
    source = random_checkpoint(tmp_path / "source", num_hidden_layers=1, vocab_size=64)
    (source / "tokenizer.json").unlink()  # it is larger than the weights
    small = Made(source, files_of(quantized(tmp_path / "expected", source, shard=MIB)))
    refusals = 0
    for moment in itertools.count(1):
        out = tmp_path / f"out-{moment}"
        with patch.object(os, name, fails_at(name, moment, errno.ENOSPC)):
            refusal = refused(small, out)
        if refusal is None:
            break
        refusals += 1
        assert "cannot be written (No space left on device): free some space and" in str(refusal)
        check_state(out, small)
        check_resumed(out, small)
    assert refusals >= len(small.expected)


_FULL_DISK = """
import sys
from unittest.mock import patch
from oomproof.errors import CheckpointError
from oomproof.session import quantize
def attempt():
    try:
        quantize(sys.argv[1], sys.argv[2], device="cpu", shard=1 << 20)
        print("done")
    except CheckpointError as error:
        print(error)
attempt()
with patch("oomproof.conversion.writing.shutil.disk_usage") as usage:
    usage.return_value.free = 1 << 40  # of a disk that others fill meanwhile
    attempt()
import os, pathlib
print(sorted(path.suffix for path in pathlib.Path(sys.argv[2]).parent.rglob("*.part*")))
os.system(f"mount -o remount,size=16m none {pathlib.Path(sys.argv[2]).parent}")
attempt()
"""


def test_on_a_small_disk_it_is_refused_and_goes_on_when_there_is_room(
    made: Made, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=3m none "$0" && exec "$@"']
    mounted.append(str(disk))
    if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system mounts nothing for a user")
    ended = subprocess.run(
        [*mounted, sys.executable, "-c", _FULL_DISK, str(made.source), str(disk / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    foretold, met, left, done = ended.stdout.splitlines()
    assert "out: needs 3.5" in foretold
    assert "more, the disk has 3.00 MiB free: free some space" in foretold
    assert "safetensors: cannot be written (No space left on device): free some space" in met
    assert (left, done) == ("[]", "done")


def refused(made: Made, out: Path) -> CheckpointError | None:
    try:
        quantize(made.source, out, device="cpu", shard=MIB)
    except CheckpointError as error:
        return error
    return None
