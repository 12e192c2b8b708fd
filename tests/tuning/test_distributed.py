"""Two ranks train as one process would, on a whole base or on one that they share (gloo)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oomproof.errors import HardwareError, InputError, NotRunnableError
from oomproof.tuning.distributed import ALONE, Ranks, current, from_environment, leave

ROOT = Path(__file__).parents[2]
Found = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Found:
    """What two processes found that were started as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.tuning.ranked", str(folder)]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=90)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 3], "\n".join(said)
    first, second = (json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2))
    return first, second


def test_gradients_are_those_of_one_process_with_the_whole_batch(pair: Found) -> None:
    for found in pair:
        assert found["against_one_process"] < 1e-6


def test_labels_that_trainer_counts_over_all_ranks_weigh_the_same(pair: Found) -> None:
    for found in pair:
        assert found["uneven_labels"] < 1e-6


def test_accumulated_gradients_are_averaged_each_time_or_at_the_end(pair: Found) -> None:
    for found in pair:
        assert not found["wrapped"]
        assert found["no_sync"] < 1e-6
        assert found["foreign"] < 1e-6
    assert pair[0]["unsynced"] != pair[1]["unsynced"]


def test_transformers_trainer_learns_on_two_ranks_what_one_process_learns(pair: Found) -> None:
    for found in pair:
        assert not found["trainer wraps"]
        assert found["trainer"] < 1e-5 < found["moved"]


@pytest.mark.parametrize("case", ["file", "made up", "offloaded"])
def test_a_base_that_ranks_share_changes_no_bit(case: str, pair: Found) -> None:
    for found in pair:
        losses, adapters = found[f"{case}: sharded"]
        assert (losses, adapters) == tuple(found[f"{case}: plain"])
        assert len(losses) == 6
    assert pair[0][f"{case}: sharded"][0] != pair[1][f"{case}: sharded"][0]


@pytest.mark.parametrize("case", ["file: plain", "made up: sharded"])
def test_ranks_have_the_same_adapters_after_some_steps(case: str, pair: Found) -> None:
    assert pair[0][case][1] == pair[1][case][1]


@pytest.mark.parametrize("case", ["plain", "sharded"])
def test_weights_take_what_was_planned(case: str, pair: Found) -> None:
    for found in pair:
        assert found[f"{case} bytes"] == found[f"{case} planned"]


def test_each_rank_reads_its_share_of_the_layers_and_tells_of_it(pair: Found) -> None:
    totals = []
    for found in pair:
        done, total = zip(*found["progress"], strict=True)
        assert list(done) == sorted(done)
        assert done[-1] == total[0]
        assert set(total) == {total[0]}
        totals.append(total[0])
    assert totals[0] > totals[1]  # of five layers


def test_ranks_that_differ_are_refused_on_all_of_them(pair: Found) -> None:
    for found in pair:
        assert found["seeds"].startswith("InputError: rank 1 has another seed than rank 0")
        assert found["tokens"].startswith("InputError: rank 1 has another training shape")
        assert found["loaded"].startswith("InputError: the ranks have different adapters")
        assert found["kept"] == found["loaded alike"] == "nothing"


def test_only_the_first_rank_writes_the_adapter(pair: Found, folder: Path) -> None:
    assert pair[1]["loaded alike"] == "nothing"
    assert (folder / "saved-0" / "adapter_model.safetensors").is_file()
    assert not (folder / "saved-1").exists()


def test_ranks_drop_other_numbers(pair: Found) -> None:
    assert pair[0]["dropout"] != pair[1]["dropout"]


@pytest.mark.parametrize("case", ["silent", "dead"])
def test_a_rank_that_is_lost_ends_the_others_in_time(case: str, pair: Found) -> None:
    found = pair[0]
    assert found[case].startswith("RankError: another rank is gone, or does not answer")
    assert "see what the rank that ended first has written" in found[case]
    assert found[f"{case}_s"] < 10


def test_without_process_group_it_is_the_only_one(pair: Found) -> None:
    assert pair[0]["by itself"] == 2
    assert current() == ALONE
    assert ALONE.all_true(torch.tensor(True))
    ALONE.agree({"seed": 0}, torch.device("cpu"))
    leave(ALONE)


def launched(monkeypatch: pytest.MonkeyPatch, **names: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)


COMPLETE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"} | {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


def test_without_a_launcher_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch)
    assert from_environment() == ALONE
    launched(monkeypatch, WORLD_SIZE="1", RANK="0")
    assert from_environment() == ALONE


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"RANK": "two"}, "RANK is 'two', not a whole number"),
        ({"RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set: start with torchrun"),
    ],
)
def test_half_an_environment_is_refused(
    change: dict[str, str | None], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {name: value for name, value in (COMPLETE | change).items() if value is not None}
    launched(monkeypatch, **names)
    with pytest.raises(InputError, match=problem):
        from_environment("cpu")


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, **COMPLETE)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(HardwareError, match="2 processes on this machine, and 1 GPUs are visible"):
        from_environment()


def test_a_torch_without_nccl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, **COMPLETE)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(NotRunnableError, match="has no NCCL"):
        from_environment()


def test_a_rank_computes_on_the_gpu_of_its_local_rank() -> None:
    ranks = Ranks(rank=5, size=8, local_rank=1)
    assert ranks.device("cuda") == torch.device("cuda", 1)
    assert ranks.device("cpu") == torch.device("cpu")
    assert not ranks.is_first
    assert ALONE.is_first
