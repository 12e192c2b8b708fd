"""A fine-tuning from end to end on the bundled model: it learns, and no kill changes what."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import oomproof
from oomproof.errors import CheckpointError, InputError, LoadError, TrainingMemoryError
from oomproof.tuning.progress import Evaluated, Said, StepDone
from oomproof.tuning.report import TuningReport
from oomproof.tuning.saved import checkpoints, is_whole
from tests.tuning.books import LEVITICUS, small_book, write_lines

OPTIONS: dict[str, Any] = {
    "engine": "transformers",
    "context": 64,
    "batch_size": 4,
    "micro_batch": 2,
    "max_steps": 4,
    "epochs": 9,
    "rank": 4,
    "dropout": 0.1,
    "learning_rate": 4e-3,
    "validation": 0.15,
    "evaluations": 2,
    "save_every": 1,
}
ADAPTER = "adapter_model.safetensors"


class Killed(BaseException):
    """Ends a run as a kill does: nothing of ours runs after it."""


def tune(data: Path, out: Path, **options: Any) -> TuningReport:
    return oomproof.tune("tiny", data, out, **{**OPTIONS, **options})


def killed_after(step: int) -> Callable[[Any], None]:
    def heard(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    return heard


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_book(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuningReport]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, tune(data, out)


def test_it_learns_the_book_and_leaves_an_adapter_that_peft_reads(
    unbroken: tuple[Path, TuningReport],
) -> None:
    out, report = unbroken
    assert report.finished
    assert report.steps == report.planned_steps == 4
    assert report.perplexity_before is not None
    assert report.perplexity_after is not None
    assert report.perplexity_after < 0.97 * report.perplexity_before
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        ADAPTER,
        "loss.svg",
        "oomproof-tune.json",
        "oomproof-tuned.json",
        "training",
    }
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    model = PeftModel.from_pretrained(base, out)
    assert sum("lora_B" in name for name, _ in model.named_parameters()) == 35


def test_card_and_plot_say_what_was_done(unbroken: tuple[Path, TuningReport]) -> None:
    out, report = unbroken
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert f"{report.perplexity_before:.2f} before, {report.perplexity_after:.2f} after" in card
    assert "rank 4, alpha 32, dropout 0.1, on all-linear" in card
    svg = (out / "loss.svg").read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "held out" in svg


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_killed_run_ends_at_the_same_bits(
    step: int, data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    """Dropout, schedule, order and optimizer go on where the checkpoint left them."""
    whole, report = unbroken
    with pytest.raises(Killed):
        tune(data, tmp_path / "out", on_event=killed_after(step))
    resumed = tune(data, tmp_path / "out", resume=True)
    assert resumed.resumed_from == step - 1
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert resumed.validation_after == report.validation_after
    [history, other] = [
        json.loads((folder / "oomproof-tuned.json").read_text(encoding="utf-8"))["history"]
        for folder in (tmp_path / "out", whole)
    ]
    assert history == other


def test_a_finished_run_is_told_again_and_not_trained_again(
    data: Path, unbroken: tuple[Path, TuningReport]
) -> None:
    out, report = unbroken
    assert tune(data, out, resume=True) == report


def test_a_folder_is_gone_on_in_only_with_resume_and_the_same_job(
    data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    out, _ = unbroken
    with pytest.raises(InputError, match="holds a finished adapter: go on with --resume"):
        tune(data, out)
    with pytest.raises(Killed):
        tune(data, tmp_path / "out", on_event=killed_after(1))
    with pytest.raises(InputError, match="holds an unfinished run: go on with --resume"):
        tune(data, tmp_path / "out")
    with pytest.raises(InputError, match="begun with options adapter rank 4, not 8"):
        tune(data, tmp_path / "out", resume=True, rank=8)
    (tmp_path / "out" / "oomproof-tune.json").unlink()
    with pytest.raises(InputError, match="exists and holds something else"):
        tune(data, tmp_path / "out", resume=True)


def test_a_damaged_checkpoint_is_passed_over(
    data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        tune(data, tmp_path / "out", on_event=killed_after(4))
    [newest, older] = checkpoints(tmp_path / "out" / "training")
    with (newest / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    assert not is_whole(newest)
    assert is_whole(older)
    said: list[Any] = []
    resumed = tune(data, tmp_path / "out", resume=True, on_event=said.append)
    assert resumed.resumed_from == 2
    assert f"{newest} is damaged, and is {newest.name}.damaged now" in [
        one.text for one in said if isinstance(one, Said)
    ]
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (unbroken[0] / ADAPTER).read_bytes()


def test_newer_checkpoints_that_are_damaged_push_out_none_that_are_whole(
    data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        tune(data, out, on_event=killed_after(4))
    for one in checkpoints(out / "training"):
        (one / "rng_state.pth").write_bytes(b"")
    (out / "training" / "baseline.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Killed):
        tune(data, out, resume=True, on_event=killed_after(2))
    assert [one.name for one in checkpoints(out / "training")] == ["checkpoint-1"]
    assert tune(data, out, resume=True).resumed_from == 1


def test_a_finished_folder_is_told_again_only_for_what_it_was_made_of(
    data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(unbroken[0], out)
    with pytest.raises(InputError, match=r"begun with options learning_rate 0\.004, not 0\.002"):
        tune(data, out, resume=True, learning_rate=2e-3)
    with pytest.raises(InputError, match="begun with options batch_size 4, not 1"):
        tune(data, out, resume=True, batch_size=1, micro_batch=None)
    with pytest.raises(InputError, match="begun with data "):
        tune(small_book(tmp_path, 3000), out, resume=True)
    (out / ADAPTER).unlink()
    with pytest.raises(CheckpointError, match="is missing: tune again into another --out"):
        tune(data, out, resume=True)


def test_what_a_run_had_chosen_is_read_strictly(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        tune(data, out, on_event=killed_after(1))
    job = json.loads((out / "oomproof-tune.json").read_text(encoding="utf-8"))
    job["chosen"]["micro_batch"] = "two"
    (out / "oomproof-tune.json").write_text(json.dumps(job), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is damaged: chosen"):
        tune(data, out, resume=True)


def test_a_single_step_learns_something(data: Path, tmp_path: Path) -> None:
    report = tune(data, tmp_path / "out", max_steps=1)
    assert report.perplexity_before is not None
    assert report.perplexity_after is not None
    assert report.perplexity_after < report.perplexity_before


def test_an_interrupt_saves_and_says_that_it_is_not_finished(
    data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    def heard(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    report = tune(data, tmp_path / "out", on_event=heard, save_every=100)
    assert not report.finished
    assert report.steps == 2
    assert not (tmp_path / "out" / ADAPTER).exists()
    resumed = tune(data, tmp_path / "out", resume=True, save_every=100)
    assert resumed.resumed_from == 2
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (unbroken[0] / ADAPTER).read_bytes()


def test_it_stops_when_held_out_samples_get_no_better(data: Path, tmp_path: Path) -> None:
    """At an absurd learning rate one of the first evaluations is the best."""
    report = tune(
        data, tmp_path / "out", learning_rate=0.05, evaluations=8, patience=1, max_steps=16
    )
    assert report.finished
    assert report.steps < 16
    assert report.adapter_step < report.steps


def test_running_out_of_memory_names_batch_and_length_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oomproof.tuning.peft_model import PeftTrainingModel

    whole = PeftTrainingModel.forward
    passes = 0

    def fails(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += self.training
        if passes > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, *arguments, **options)

    monkeypatch.setattr(PeftTrainingModel, "forward", fails)
    with pytest.raises(TrainingMemoryError, match="with 2 sequences of 64 tokens") as caught:
        tune(data, tmp_path / "out")
    assert (caught.value.micro_batch, caught.value.length, caught.value.exit_code) == (2, 64, 3)
    assert [is_whole(one) for one in checkpoints(tmp_path / "out" / "training")] == [True]


def test_what_would_run_out_in_the_middle_does_so_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest sample comes last in the file and is computed first."""
    from oomproof.tuning.peft_model import PeftTrainingModel

    whole = PeftTrainingModel.forward

    def fails(self: Any, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if input_ids.shape[1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, input_ids, *arguments, **options)

    lines = [{"text": "It was night. "} for _ in range(30)] + [{"text": "It was night. " * 25}]
    path = write_lines(tmp_path / "a.jsonl", *lines)
    monkeypatch.setattr(PeftTrainingModel, "forward", fails)
    events: list[Any] = []
    with pytest.raises(TrainingMemoryError):
        tune(
            path,
            tmp_path / "out",
            context=128,
            packing=False,
            validation=0.0,
            on_event=events.append,
        )
    assert not any(isinstance(one, StepDone) for one in events)


def test_a_loss_that_is_no_number_is_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oomproof.tuning.peft_model import Loss, PeftTrainingModel

    whole = PeftTrainingModel.forward

    def breaks(self: Any, *arguments: Any, **options: Any) -> Any:
        return Loss(loss=whole(self, *arguments, **options).loss * float("nan"))

    monkeypatch.setattr(PeftTrainingModel, "forward", breaks)
    with pytest.raises(LoadError, match="is no number: use a lower --learning-rate"):
        tune(data, tmp_path / "out", validation=0.0, max_steps=1)


def test_bad_data_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "a"}, "{")
    with pytest.raises(InputError, match="line 2"):
        tune(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_and_nothing_looks_whole(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oomproof.tuning import saved

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "digest_of", full)
    with pytest.raises(CheckpointError, match="free some space and run the same command again"):
        tune(data, tmp_path / "out", validation=0.0)
    assert checkpoints(tmp_path / "out" / "training") == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_readmes_example_lowers_the_books_perplexity_by_a_fifth_in_two_minutes(
    tmp_path: Path,
) -> None:
    begin_s = time.process_time()  # others may use the processor too
    report = oomproof.tune(
        "tiny",
        LEVITICUS,
        tmp_path / "out",
        context=256,
        batch_size=8,
        epochs=3,
        learning_rate=3e-3,
        validation=0.1,
    )
    assert report.perplexity_before is not None
    assert report.perplexity_after is not None
    assert report.perplexity_after < 0.8 * report.perplexity_before
    assert time.process_time() - begin_s < 120


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("wait_s", [0.0, 0.7, 2.3])
def test_sigkill_at_any_moment_changes_no_bit(
    wait_s: float, data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    script = (
        "import sys, json, oomproof; o = json.loads(sys.argv[3]); "
        "oomproof.tune('tiny', sys.argv[1], sys.argv[2], resume=True, "
        "on_event=lambda e: print(e, flush=True), **o)"
    )
    arguments = [sys.executable, "-c", script, str(data), str(tmp_path / "out")]
    arguments.append(json.dumps(OPTIONS))
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("StepDone"):
                break
        time.sleep(wait_s)
        child.kill()
    subprocess.run(arguments, check=True, capture_output=True)
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (unbroken[0] / ADAPTER).read_bytes()


def test_steps_and_evaluations_are_told(data: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    tune(data, tmp_path / "out", max_steps=2, on_event=events.append)
    steps = [one for one in events if isinstance(one, StepDone)]
    assert [one.step for one in steps] == [1, 2]
    assert all(one.tokens_per_second > 0 for one in steps)
    assert [one.step for one in events if isinstance(one, Evaluated)] == [0, 1, 2]
