"""Two processes tune as one does, end together, and go on where they were (gloo)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import oomproof
from oomproof.cli.main import app
from oomproof.errors import HardwareError, InputError, NotRunnableError
from oomproof.tuning.packing import schedule
from tests.tuning.books import small_book
from tests.tuning.ranked_tune import OPTIONS

ROOT = Path(__file__).parents[2]
ADAPTER = "adapter_model.safetensors"
Found = tuple[dict[str, Any], dict[str, Any]]
LAUNCHED = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Found:
    """What two processes report that were started as torchrun starts them."""
    small_book(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **LAUNCHED,
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.tuning.ranked_tune", str(folder)],
            cwd=ROOT,
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [one.communicate(timeout=120)[0] for one in started]
    files = [folder / f"found-{rank}.json" for rank in range(2)]
    assert all(one.exists() for one in files), said
    first, second = (json.loads(one.read_text()) for one in files)
    return first, second


def losses(folder: Path) -> list[tuple[int, float]]:
    history = json.loads((folder / "oomproof-tuned.json").read_text())["history"]
    return [(step, loss) for kind in ("training", "validation") for step, loss in history[kind]]


def bits(folder: Path) -> bytes:
    return (folder / ADAPTER).read_bytes()


def test_two_ranks_learn_what_one_process_does(pair: Found, folder: Path) -> None:
    alone = folder / "alone"
    report = oomproof.tune("tiny", folder / "book.txt", alone, **OPTIONS)
    assert report.steps == pair[0]["whole"]["steps"] == 3
    assert report.tokens == pair[0]["whole"]["tokens"]
    assert report.validation_before == pytest.approx(pair[0]["whole"]["validation_before"])
    for (step, loss), (other_step, other) in zip(
        losses(alone), losses(folder / "whole"), strict=True
    ):
        assert step == other_step
        assert loss == pytest.approx(other, abs=1e-5)
    one, two = load_file(alone / ADAPTER), load_file(folder / "whole" / ADAPTER)
    assert max(float(one[name].abs().max()) for name in one if "lora_B" in name) > 1e-3
    # Early steps of Adam turn a gradient's last bit into more than itself.
    error = sum(float((one[name] - two[name]).square().sum()) for name in one)
    assert error < (1e-5**2) * sum(float(one[name].square().sum()) for name in one)


def test_every_rank_reports_the_same_but_its_time(pair: Found) -> None:
    timed = {"tokens_per_second", "seconds"}
    for name in pair[0]:
        first, second = (
            {key: value for key, value in one[name].items() if key not in timed} for one in pair
        )
        assert first == second


def test_layers_that_are_shared_change_no_bit(pair: Found, folder: Path) -> None:
    assert pair[0]["shared"]["finished"]
    assert bits(folder / "shared") == bits(folder / "whole")


def test_a_signal_to_one_rank_stops_both_and_resuming_ends_at_the_same_bits(
    pair: Found, folder: Path
) -> None:
    assert [one["stopped"]["steps"] for one in pair] == [2, 2]
    assert not pair[0]["stopped"]["finished"]
    assert pair[0]["resumed"]["resumed_from"] == 2
    assert bits(folder / "stopped") == bits(folder / "unbroken")
    assert pair[0]["again"] == pair[0]["resumed"]


def test_another_number_of_ranks_does_not_go_on(pair: Found, folder: Path) -> None:
    (folder / "stopped" / "oomproof-tuned.json").unlink()
    with pytest.raises(InputError, match="begun with ranks 2, not 1"):
        oomproof.tune(
            "tiny", folder / "book.txt", folder / "stopped", resume=True, **OPTIONS, dropout=0.1
        )


def test_an_error_of_one_rank_ends_both_with_one_message(tmp_path: Path) -> None:
    arguments = "tune tiny --engine native --context 64 --batch-size 4 --max-steps 2"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "tests.tuning.ranked_tune"),
            *arguments.split(),
            *("--data", str(small_book(tmp_path)), "--out", str(tmp_path / "out")),
        ],
        cwd=ROOT,
        env={**os.environ, **LAUNCHED},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, done.stderr
    assert told[0].startswith("error: memory ran out on cpu with 2 sequences of 64 tokens")
    root = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1" in root
    assert f"traceback : {told[0]}" in root
    assert "another rank is gone" not in done.stderr


def test_a_dry_run_plans_ranks_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_book(tmp_path)
    arguments = ["tune", "tiny", "--data", str(data), "--dry-run", "--json", "--batch-size", "4"]
    here = [*arguments, "--gpus", "24GiB,20GiB", "--context", "64"]
    asked = CliRunner().invoke(app, [*here, "--ranks", "2"])
    plan = json.loads(asked.stdout)
    assert (plan["ranks"], plan["sharded"], plan["device"]) == (2, False, "20.0 GiB GPU")
    assert plan["terms"]["comm"] > 0
    assert plan["micro_batch"] * plan["micro_batches_per_step"] == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert CliRunner().invoke(app, here).stdout == asked.stdout
    monkeypatch.setenv("RANK", "1")
    assert not CliRunner().invoke(app, here).output


def test_what_ranks_cannot_do_is_refused(tmp_path: Path) -> None:
    data = small_book(tmp_path)

    def plan(**options: Any) -> Any:
        return oomproof.plan_tuning("tiny", data, **{"gpus": "2x24GiB", "ranks": 2, **options})

    with pytest.raises(InputError, match="--batch-size 5 is not shared evenly by 2 ranks"):
        plan(batch_size=5)
    with pytest.raises(NotRunnableError, match="our own engine only"):
        plan(engine="transformers")
    with pytest.raises(HardwareError, match="2 ranks, and 1 GPUs"):
        plan(gpus="24GiB")
    with pytest.raises(InputError, match="needs several ranks"):
        plan(ranks=1, shard="on")


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_ranks_take_a_step_apart_into_even_passes(micro_batch: int) -> None:
    alone = schedule(7, batch_size=6, micro_batch=6, epochs=3.0, max_steps=None, seed=3)
    shared = schedule(
        7, batch_size=6, micro_batch=micro_batch, epochs=3.0, max_steps=None, seed=3, ranks=2
    )
    passes = shared.micro_batches_per_step
    assert len(shared) == alone.steps * passes
    for step in range(alone.steps):
        parts = [shared.micro_batch_at(step * passes + number) for number in range(passes)]
        rows = [row for part in parts for row in part]
        assert sorted(rows) == sorted(alone.micro_batch_at(step))
        # One after the other gets one, all of the same size in a turn.
        assert all(len(a) == len(b) > 0 for a, b in zip(parts[::2], parts[1::2], strict=True))
