"""A rehearsal on the CPU: what it measures, what it leaves behind, and how it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oomproof.compat.engine import TransformersEngine
from oomproof.engine.native.pipeline import Pipeline
from oomproof.engine.rehearsal import Rung
from oomproof.engine.rehearse import Rehearsal
from oomproof.errors import NotRunnableError, PlanDoesNotFitError
from oomproof.hardware.describe import describe
from oomproof.memory.terms import DeviceTerms
from oomproof.models.resolve import resolve
from oomproof.planning.notes import Notes, read_notes
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.session import plan, rehearse
from oomproof.units import MIB
from tests.cli.invoke import invoke
from tests.compat.checkpoints import copy_of_tiny, edit_json

engines = pytest.mark.parametrize("engine", ["native", "transformers"])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("engine", "format_name"),
    [
        *(("native", name) for name in ("bf16", "int8", "fp8", "int4", "nf4", "nf4-dq")),
        *(("transformers", name) for name in ("bf16", "nf4", "nf4-dq")),
    ],
)
def test_a_plan_is_run_at_full_size_and_compared(engine: str, format_name: str) -> None:
    told: list[Rung] = []
    found = rehearse("tiny", engine=engine, format=format_name, context=512, on_rung=told.append)
    assert found.kept_its_promise
    assert found.as_dict()["engine"] == engine
    assert ("transformers" in found.versions) == (engine == "transformers")
    assert found.load_s is not None
    assert told == list(found.rungs)
    assert [(rung.requests, rung.prompt_tokens) for rung in told] == [(1, 64), (1, 480)]
    [device] = found.plan.devices_in_use
    measured = found.measured[device.index]
    assert measured.weights == pytest.approx(device.terms.weights, rel=0.01)
    assert measured.kv_cache == pytest.approx(device.terms.kv_cache, rel=0.01)


@engines
def test_a_model_of_the_catalog_is_rehearsed_without_its_files(engine: str) -> None:
    found = rehearse("smollm2-135m", engine=engine, format="bf16", context=96)
    assert found.kept_its_promise
    assert found.plan.source.kind == "catalog"


@engines
def test_concurrent_requests_are_filled_together(engine: str) -> None:
    found = rehearse("tiny", engine=engine, format="bf16", context=256, concurrency=3)
    assert [rung.requests for rung in found.rungs] == [1, 1, 3]


@engines
def test_a_plan_that_does_not_fit_is_not_begun(engine: str) -> None:
    with pytest.raises(PlanDoesNotFitError):
        rehearse("tiny", engine=engine, cap="1MiB")


def test_what_the_engine_does_not_run_is_not_begun() -> None:
    with pytest.raises(NotRunnableError, match="the native engine does not hold llm-int8"):
        rehearse("tiny", engine="native", format="llm-int8")


def test_a_checkpoint_that_is_quantized_already_is_not_rehearsed(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_json(folder / "config.json", quantization_config=settings)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    with pytest.raises(NotRunnableError, match="--format int8"):
        rehearse(folder)


@engines
def test_the_processor_leaves_no_note(engine: str) -> None:
    rehearse("tiny", engine=engine, format="bf16", context=64)
    assert read_notes() == Notes()


@pytest.mark.parametrize(
    ("engine", "runner", "method"),
    [("native", Pipeline, "prefill"), ("transformers", TransformersEngine, "_forward")],
)
def test_running_out_of_memory_is_a_result_and_names_the_rung(
    engine: str, runner: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = getattr(runner, method)

    def fail(self: object, *arguments: Any, **options: Any) -> object:
        tokens = arguments[0 if engine == "native" else 1]
        if len(tokens) > 100:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of"
            )
        return forward(self, *arguments, **options)

    monkeypatch.setattr(runner, method, fail)
    found = rehearse("tiny", engine=engine, format="bf16", context=512)
    assert found.failed == "out of memory while running, after 1 rungs"
    assert (found.asked_bytes, found.failed_device) == (1536 * MIB, 0)
    assert not found.kept_its_promise
    assert found.measured[0].weights > 0


@pytest.mark.parametrize(
    ("engine", "maker"),
    [
        ("native", "oomproof.engine.native.load.load_random_engine"),
        ("transformers", "oomproof.compat.rehearse.load_random_model"),
    ],
)
def test_running_out_of_memory_while_loading_is_a_result_too(
    engine: str, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    monkeypatch.setattr(maker, fail)
    found = rehearse("tiny", engine=engine, format="bf16", context=512)
    assert found.failed == "out of memory while loading"
    assert (found.asked_bytes, found.failed_device) == (20 * MIB, 0)
    assert (found.rungs, found.load_s) == ((), None)


def on_a_gpu(engine: str = "native", **changes: object) -> Rehearsal:
    """A rehearsal as it would end on an H200."""
    machine = describe("H200")
    request = PlanRequest(format="nf4-dq", engine=engine)
    made = make_plan(resolve("llama-3.1-8b"), machine, request)
    terms = made.devices[0].terms
    values: dict[str, object] = {
        "plan": made,
        "devices": machine.devices,
        "measured": {0: replace(terms, cuda_context=700 * MIB, margin=0)},
        "rungs": (
            Rung(requests=1, prompt_tokens=64, new_tokens=32, first_token_s=9.0, decode_s=9.0),
            Rung(requests=1, prompt_tokens=8160, new_tokens=32, first_token_s=1.0, decode_s=1.0),
        ),
        "versions": "torch 2.11.0, triton 3.6.0",
        "load_s": 3.0,
        "failed": None,
    }
    return Rehearsal(**{**values, **changes})  # type: ignore[arg-type]


@engines
def test_a_note_holds_what_the_next_plan_needs(engine: str) -> None:
    found = on_a_gpu(engine)
    [note] = found.notes(Notes())
    assert (note.device, note.kind, note.failed) == ("NVIDIA H200", "4-bit", None)
    assert (note.engine, note.versions) == (engine, "torch 2.11.0, triton 3.6.0")
    assert note.cuda_context_bytes == 700 * MIB
    assert note.workspace_excess_bytes == 0
    predicted = found.plan.tokens_per_second
    assert predicted.decode is not None
    assert note.decode_factor == pytest.approx(predicted.decode / 31, rel=0.001)
    assert predicted.prefill is not None
    assert note.prefill_factor == pytest.approx(predicted.prefill / 8160, rel=0.001)


@engines
def test_a_second_rehearsal_confirms_the_corrected_speed(engine: str) -> None:
    notes = Notes(tuple(on_a_gpu(engine).notes(Notes())))
    request = PlanRequest(format="nf4-dq", engine=engine)
    made = make_plan(resolve("llama-3.1-8b"), describe("H200"), request, notes)
    assert made.tokens_per_second.decode == pytest.approx(31, rel=0.01)
    [again] = on_a_gpu(engine, plan=made).notes(notes)
    assert again.decode_factor == pytest.approx(notes.entries[0].decode_factor, rel=0.01)


@engines
def test_what_took_more_than_planned_is_told_and_noted(engine: str) -> None:
    planned = on_a_gpu(engine).plan.devices[0].terms
    # What is missing shows at the peak, whichever of loading and running makes it.
    running = planned.kv_cache + planned.workspace + planned.graphs
    room = max(0, planned.staging - running)
    more = replace(planned, workspace=planned.workspace + room + 64 * MIB, margin=0)
    found = on_a_gpu(engine, measured={0: more})
    assert not found.kept_its_promise
    assert "took" in found.exceeded[0]
    [note] = found.notes(Notes())
    assert note.workspace_excess_bytes == 64 * MIB


def test_a_failure_notes_what_was_asked_for_on_its_device() -> None:
    found = on_a_gpu(failed="out of memory while loading", asked_bytes=MIB, failed_device=0)
    [note] = found.notes(Notes())
    assert (note.failed, note.workspace_excess_bytes) == ("out of memory while loading", MIB)


@engines
def test_the_command_prints_the_comparison_and_the_rungs(engine: str, home: Path) -> None:
    arguments = ("rehearse", "tiny", "--context", "256", "--format", "nf4-dq", "--engine", engine)
    done = invoke(*arguments)
    assert done.code == 0
    for word in ("weights", "kv_cache", "peak without margin"):
        assert word in done.out
    assert "64 prompt tokens: first after" in done.err
    done = invoke(*arguments, "--json")
    plain = json.loads(done.out)
    assert (plain["kept_its_promise"], plain["engine"]) == (True, engine)
    assert plain["devices"][0]["measured"]["weights"] > 0
    assert not (home / "calibration.jsonl").exists()


def test_the_command_says_when_a_promise_was_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_options: object) -> Rehearsal:
        return on_a_gpu(measured={0: DeviceTerms(weights=2**40)})

    monkeypatch.setattr("oomproof.session.rehearse", broken)
    made = on_a_gpu().plan
    monkeypatch.setattr("oomproof.session.plan", lambda *_a, **_o: made)
    done = invoke("rehearse", "llama-3.1-8b")
    assert done.code == 1
    assert "plan again: the difference is noted" in done.err.splitlines()[-1]


def test_too_small_a_cap_is_exit_code_3() -> None:
    assert invoke("rehearse", "tiny", "--cap", "1MiB").code == 3


@engines
def test_a_plan_can_be_rehearsed_as_it_is(engine: str) -> None:
    made = plan("tiny", engine=engine, format="bf16", context=96)
    assert rehearse(made).plan is made
