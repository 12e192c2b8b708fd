"""A fine-tuning by our own core: as planned, resumable to the bit, and of use to both engines."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import oomproof
from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults
from oomproof.errors import TrainingMemoryError
from oomproof.hardware.describe import describe
from oomproof.memory.peft import Tuned
from oomproof.memory.training_shape import Kept
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.planning.request import PlanRequest
from oomproof.tuning.engines import build_native, core_options
from oomproof.tuning.options import AdapterSettings, TuningSettings
from oomproof.tuning.planner import TrainingPlanner
from oomproof.tuning.progress import StepDone
from oomproof.tuning.rehearsal import made_up_data
from oomproof.tuning.report import TuningReport
from oomproof.tuning.step_memory import NativeMemory
from tests.guarding.engines import FailingAllocation
from tests.tuning.books import small_book

OPTIONS: dict[str, Any] = {
    "engine": "native",
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
POINTS = 3


class Killed(BaseException):
    """Ends a run as a kill does."""


def tune(data: Path, out: Path, model: str = "tiny", **options: Any) -> TuningReport:
    return oomproof.tune(model, data, out, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_book(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuningReport]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, tune(data, out)


def test_it_learns_within_its_plan(unbroken: tuple[Path, TuningReport]) -> None:
    _, report = unbroken
    assert report.engine == "native"
    assert report.perplexity_before is not None
    assert report.perplexity_after is not None
    assert report.perplexity_after < 0.97 * report.perplexity_before
    assert report.exceeded_bytes == 0


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_ends_at_the_same_bits_with_dropout(
    step: int, data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    def heard(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    with pytest.raises(Killed):
        tune(data, tmp_path / "out", on_event=heard)
    resumed = tune(data, tmp_path / "out", resume=True)
    assert resumed.resumed_from == step - 1
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (unbroken[0] / ADAPTER).read_bytes()


@pytest.mark.parametrize("checkpointing", ["layers", "offload"])
def test_what_is_kept_changes_no_bit(
    checkpointing: str, data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    tune(data, tmp_path / "out", checkpointing=checkpointing)
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (unbroken[0] / ADAPTER).read_bytes()


@pytest.mark.parametrize("kept", [Kept(), Kept(attention=3), Kept(attention=5, mid=5, qkv=2), None])
def test_the_core_allocates_exactly_what_was_counted(kept: Kept | None) -> None:
    settings = TuningSettings(adapter=AdapterSettings(rank=4), batch_size=2, micro_batch=2)
    spec = resolve("tiny")
    planner = TrainingPlanner(
        spec, describe("cpu"), PlanRequest(format="nf4-dq"), settings, engine="native"
    )
    plan = planner.plan(made_up_data(64), context=64, longest=64)
    if kept is not None:
        plan = replace(plan, kept=asdict(kept))
    model = build_native(plan, spec, None, settings)
    memory = NativeMemory(spec, "nf4-dq", dropout=False, on_gpu=False)
    tuned = Tuned(
        rank=4,
        target_modules=("all-linear",),
        optimizer="adamw",
        checkpointing="auto",
        compute_bytes=4,
        packed=False,
        documents=1,
        kept=core_options(plan).kept,
    )
    assert model.shape == memory.shape(tuned, 2, 64)
    ids = torch.randint(0, spec.vocab_size, (2, 64))
    model(ids, ids).loss.backward()


def test_a_folder_that_quantize_wrote_is_trained_as_its_source_is(
    data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    oomproof.quantize("tiny", tmp_path / "q", format="nf4-dq", search=False)
    report = tune(data, tmp_path / "out", str(tmp_path / "q"))
    assert report.engine == "native"
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (unbroken[0] / ADAPTER).read_bytes()
    assert report.validation_after == unbroken[1].validation_after


def test_memory_that_runs_out_anywhere_is_one_error_and_the_run_can_go_on(
    data: Path, unbroken: tuple[Path, TuningReport], tmp_path: Path
) -> None:
    with FailingAllocation(0) as counted:
        tune(data, tmp_path / "counted")
    for point in range(1, POINTS + 1):
        out = tmp_path / str(point)
        with (
            pytest.raises(TrainingMemoryError, match="memory ran out on cpu") as caught,
            FailingAllocation(counted.calls * point // (POINTS + 1)),
        ):
            tune(data, out)
        assert caught.value.exit_code == 3
        assert caught.value.remedy is not None
        assert "--resume" in caught.value.remedy
        tune(data, out, resume=True)
        assert (out / ADAPTER).read_bytes() == (unbroken[0] / ADAPTER).read_bytes()


def test_both_engines_answer_with_the_adapter(
    data: Path, unbroken: tuple[Path, TuningReport]
) -> None:
    """The text that it was trained on is likelier with it, and answers are others."""
    prompt = data.read_text(encoding="utf-8")[:120]
    options: dict[str, Any] = {"format": "nf4-dq", "context": 256}
    folder = bundled_folder()
    tokenizer = TransformersTokenizer(folder, defaults=read_generation_defaults(folder))
    tokens = tokenizer.encode(prompt)

    def score(**adapter: Any) -> float:
        with oomproof.load("tiny", engine="native", **options, **adapter) as model:
            return sum(one.logprob for one in model.score(tokens))

    def answer(engine: str, **adapter: Any) -> str:
        with oomproof.load("tiny", engine=engine, **options, **adapter) as model:
            return model.generate(prompt, max_new_tokens=24, temperature=0)

    assert score(adapter=unbroken[0]) > 0.97 * score()
    answers = [answer(engine, adapter=unbroken[0]) for engine in ("native", "transformers")]
    assert answers[0] == answers[1] != answer("native")


def test_a_rehearsal_needs_no_data() -> None:
    found = oomproof.rehearse_tuning("tiny", context=64, batch_size=4, micro_batch=2, rank=4)
    assert found.kept_its_promise
    assert len(found.losses) == 3
    assert found.tokens_per_second is not None
    assert found.measured_bytes >= 0  # what earlier tests freed is used again
    assert found.plan.engine == "native"
