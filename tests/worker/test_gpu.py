"""On a GPU: true sticky faults, memory that comes back, a parent without CUDA."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oomproof import session
from oomproof.errors import WorkerError
from oomproof.hardware.probe import probe
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.units import MIB
from oomproof.worker.engine import WorkerEngine
from oomproof.worker.launch import Launch, limits_of
from tests.worker.workers import answer, request, wait_until_gone

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def free_bytes() -> int:
    return probe().devices[0].free_bytes


def is_back(before: int) -> bool:
    """Whether what was free is free again; a driver takes a killed process's memory back late."""
    deadline = time.monotonic() + 10
    while abs(free_bytes() - before) >= 64 * MIB:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("format_name", ["bf16", "nf4-dq"])
def test_answers_are_those_of_the_engine_in_this_process(format_name: str) -> None:
    made = session.plan("tiny", format=format_name, context=512, concurrency=2)
    assert made.devices_in_use[0].kind == "cuda"
    answers = []
    for worker in (False, True):
        with session.load(made, worker=worker) as model:
            answers.append(
                [
                    model.generate("It was a dark night", max_new_tokens=100, **options)
                    for options in ({"temperature": 0}, {"seed": 5, "top_p": 0.9})
                ]
            )
    assert answers[0] == answers[1]


def test_a_true_device_side_assert_is_met_once_and_its_process_replaced(tmp_path: Path) -> None:
    made = session.plan("tiny", format="nf4-dq", context=512)
    (tmp_path / "model").symlink_to(bundled_folder())
    launch = Launch(
        plan=made,
        folder=tmp_path / "model",
        vocab_size=resolve("tiny").vocab_size,
        start="tests.worker.engines:sticky",
    )
    os.environ["OOMPROOF_TEST_FAULT"] = str(tmp_path / "fault")
    engine = WorkerEngine(launch, limits_of(made))
    try:
        engine.begin()
        whole = answer(engine, request(new=50))
        (tmp_path / "fault").touch()
        with pytest.raises(WorkerError) as told:
            answer(engine, request(new=50))
        assert told.value.code == 710
        began = time.monotonic()
        assert answer(engine, request(new=50)) == whole
        print(json.dumps({"replaced_s": time.monotonic() - began}))
        assert time.monotonic() - began < 10 + made.load_s
    finally:
        del os.environ["OOMPROOF_TEST_FAULT"]
        engine.close()


def test_memory_comes_back_when_a_worker_is_killed() -> None:
    before = free_bytes()
    with session.load("tiny", format="bf16", context=1024, worker=True) as model:
        engine = model._engine
        assert isinstance(engine, WorkerEngine)
        assert free_bytes() < before - 100 * MIB
        os.kill(engine.pid, signal.SIGKILL)
        assert wait_until_gone(engine.pid)
        assert is_back(before)
        assert model.generate("It was", max_new_tokens=5)
    assert is_back(before)


def test_a_parent_never_starts_cuda_and_run_uses_a_worker_by_itself() -> None:
    script = (
        "import sys, torch; from oomproof.cli.main import main; import oomproof.worker.engine as e;"
        "made = []; begin = e.WorkerEngine.begin;\n"
        "def noted(self, told=None):\n    made.append(self.pid); return begin(self, told)\n"
        "e.WorkerEngine.begin = noted\n"
        "try:\n    main()\n"
        "finally:\n    assert made and not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "run", "tiny", "It was", "--max-new-tokens", "5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
