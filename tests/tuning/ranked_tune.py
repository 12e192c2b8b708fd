"""What each of two ranks does for test_ranked_run.py.

RANK=0 WORLD_SIZE=2 ... python -m tests.tuning.ranked_tune FOLDER    runs, and reports as JSON
torchrun ... -m tests.tuning.ranked_tune ARGUMENTS    the command line; rank 1 runs out of memory
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import oomproof
import oomproof.tuning.run as runs
from oomproof.cli.main import main as command
from oomproof.tuning.distributed import from_environment
from oomproof.tuning.trainer import TuningTrainer

OPTIONS: dict[str, Any] = {
    "engine": "native",
    "context": 64,
    "batch_size": 6,
    "micro_batch": 2,
    "max_steps": 3,
    "epochs": 9,
    "rank": 4,
    "learning_rate": 4e-3,
    "validation": 0.15,
    "evaluations": 2,
    "save_every": 1,
}
"""Shares of three, in passes of two sequences and of one; an epoch ends within a step."""
COMPUTED = TuningTrainer.compute_loss


def stopping(trainer: TuningTrainer, *args: Any, **options: Any) -> Any:
    """A signal, to one process of the two, in the second step."""
    if trainer.state.global_step == 1 and not trainer._watch.stop_asked:
        signal.raise_signal(signal.SIGTERM)
    return COMPUTED(trainer, *args, **options)


def reported(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = from_environment("cpu", timeout_s=20)
    data = folder / "book.txt"

    def tune(name: str, **options: Any) -> dict[str, Any]:
        out = folder / name
        return oomproof.tune("tiny", data, out, **{**OPTIONS, **options}).as_dict()

    found = {"whole": tune("whole"), "shared": tune("shared", shard="on", dropout=0.0)}
    if ranks.rank == 1:
        _replace(TuningTrainer, "compute_loss", stopping)
    found["stopped"] = tune("stopped", dropout=0.1)
    _replace(TuningTrainer, "compute_loss", COMPUTED)
    found["resumed"] = tune("stopped", dropout=0.1, resume=True)
    found["unbroken"] = tune("unbroken", dropout=0.1)
    found["again"] = tune("stopped", dropout=0.1, resume=True)
    (folder / f"found-{ranks.rank}.json").write_text(json.dumps(found))
    os._exit(0)


def _replace(where: Any, name: str, by: Any) -> None:
    """This process ends soon: nothing has to be put back."""
    setattr(where, name, by)


def failing() -> None:
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if os.environ["RANK"] == "1":
        _replace(runs, "run_widest_first", run_out)
    command()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        reported(Path(sys.argv[1]))
    failing()
