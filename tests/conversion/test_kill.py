"""Killed in each phase of a model of the hub: download, encode, write, rename."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from oomproof.conversion.manifest import verify
from oomproof.conversion.work import work_folder_of
from oomproof.models import hub_client
from oomproof.session import quantize
from oomproof.units import MIB
from tests.conversion.jobs import files_of, in_shards
from tests.models.fake_hub import FakeHub, FakeRepo, fake_hub

REPO = "org/name"
PHASES = ("download", "encode", "write", "rename")
_RUN = """
import json, os, signal, sys
from pathlib import Path
import huggingface_hub
from huggingface_hub import constants, file_download
constants.DOWNLOAD_CHUNK_SIZE = 64 << 10
phase, left, torn = sys.argv[3], int(sys.argv[4]), sys.argv[5] == "torn"
seen = dict.fromkeys(("download", "encode", "write", "rename"), 0)
def reached(name):
    global left
    seen[name] += 1
    left -= name == phase
    return name == phase and left == 0
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def counted(owner, name, of):
    own = getattr(owner, name)
    def call(*arguments, **options):
        dies = reached(of)
        if dies and not torn:
            die()
        result = own(*arguments, **options)
        if dies:
            die()
        return result
    setattr(owner, name, call)
write = os.write
def torn_write(descriptor, content):
    if reached("write"):
        if torn:
            write(descriptor, bytes(content[: len(content) // 2]))
        die()
    return write(descriptor, content)
os.write = torn_write
for name in ("replace", "rename"):
    counted(Path, name, "rename")
from oomproof.models import hub_client
bar = hub_client._counting_bar
def counting(report):
    def told(done):
        if reached("download"):
            die()
        report(done)
    return bar(told)
hub_client._counting_bar = counting
from oomproof.quantization.handlers import Table4bit
for name in ("encode_slice", "finish"):
    counted(Table4bit, name, "encode")
from oomproof.session import quantize
quantize(sys.argv[1], sys.argv[2], device="cpu", shard=1 << 20)
print(json.dumps(seen))
"""


class Made(NamedTuple):
    hub: FakeHub
    expected: dict[str, bytes]
    moments: dict[str, int]
    """Phase → how many moments it has at which a run is killed."""


def run(out: Path, phase: str = "none", moment: int = 0, kind: str = "whole") -> tuple[int, str]:
    """(exit code, stdout) of a process that is killed at a moment of a phase."""
    ended = subprocess.run(
        [sys.executable, "-c", _RUN, REPO, str(out), phase, str(moment), kind],
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A hub with the bundled model in shards, an empty cache, and a run that nothing killed."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, fake_hub() as hub:
        for name in (
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
        ):
            patch.delenv(name, raising=False)
        patch.setenv("HF_HOME", str(folder / "home"))
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setattr(hub_client, "RETRY_PAUSES_S", (0.0,))
        hub.repos[REPO] = FakeRepo(files=files_of(in_shards(folder / "source")), tells_digests=True)
        code, seen = run(folder / "out")
        assert code == 0
        moments = json.loads(seen)
        assert min(moments[phase] for phase in PHASES) >= 5
        yield Made(hub, files_of(folder / "out"), moments)


def check_killed(made: Made, folder: Path, times: int, seed: int) -> None:
    """Kills runs at random moments, in each phase as often, and lets them go on."""
    chosen = random.Random(seed)
    for number in range(times):
        phase = PHASES[number % len(PHASES)]
        moment = chosen.randint(1, made.moments[phase])
        kind = chosen.choice(("whole", "torn"))
        out = folder / f"out-{number}"
        code, _ = run(out, phase, moment, kind)
        assert code == -signal.SIGKILL, (phase, moment)
        if out.exists():  # then it is whole: the kill came after the rename
            assert verify(out) is not None, (phase, moment, kind)
            assert phase == "rename"
        quantize(REPO, out, device="cpu", shard=MIB)
        assert files_of(out) == made.expected, (phase, moment, kind)
        assert verify(out) is not None
        assert not work_folder_of(out).exists()


def test_killed_at_5_random_moments_of_all_phases_it_goes_on(made: Made, tmp_path: Path) -> None:
    check_killed(made, tmp_path, 5, seed=11)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_50_random_moments_of_all_phases_it_goes_on(made: Made, tmp_path: Path) -> None:
    check_killed(made, tmp_path, 50, seed=12)
