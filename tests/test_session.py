"""Plan, load, answer: what a program that imports oomproof meets."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import oomproof
from oomproof import agreement
from oomproof.errors import (
    CheckpointError,
    HardwareError,
    InputError,
    MissingDependencyError,
    NotRunnableError,
    PlanDoesNotFitError,
    PlanMismatchError,
)
from oomproof.planning.plan import Plan
from oomproof.units import GIB
from tests.compat.checkpoints import copy_of_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_of_tiny(tmp_path / "model")


def test_sizes_and_contexts_are_read_as_text_or_as_numbers() -> None:
    written = oomproof.plan(
        "llama-3.1-8b", gpus="1x24GiB", context="4k", cap="20GiB", max_memory={0: "18GiB"}
    )
    counted = oomproof.plan(
        "llama-3.1-8b", gpus="1x24GiB", context=4096, cap=20 * GIB, max_memory={0: 18 * GIB}
    )
    assert written == counted
    assert written.devices[0].usable_bytes == 18 * GIB


def test_a_folder_may_be_a_path(folder: Path) -> None:
    by_path, by_text = oomproof.plan(folder), oomproof.plan(str(folder))
    assert by_path.fingerprint == by_text.fingerprint == oomproof.plan("tiny").fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"context": 0},
        {"context": -1},
        {"concurrency": 0},
        {"reserve": -1},
        {"reserve": "-1GiB"},
        {"cap": 0},
        {"cap": -5},
        {"max_memory": {0: -1}},
        {"max_memory": {3: "1GiB"}},
        {"format": ""},
        {"kv_format": "int1"},
        {"engine": "warp"},
        {"gpus": "0x24GiB"},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        oomproof.plan("tiny", **options)  # type: ignore[arg-type]


def test_a_plan_survives_its_json_and_loads_as_before() -> None:
    made = oomproof.plan("tiny", format="bf16", context=128)
    again = Plan.from_json(made.to_json())
    assert again == made
    with oomproof.load(again) as model:
        assert model.plan == made
        assert model.generate("hello", max_new_tokens=3, seed=0)


def test_load_plans_where_it_is_given_a_name_and_tells_its_progress(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with oomproof.load(
        folder, format="nf4", context=128, progress=lambda *step: told.append(step)
    ) as model:
        assert model.plan.format == "nf4"
        assert model.plan.context == 128
    assert {stage for stage, _, _ in told} == {"load"}
    _, done, total = told[-1]
    assert done == total > 0


def test_a_plan_is_loaded_as_it_is_or_not_at_all() -> None:
    made = oomproof.plan("tiny")
    with pytest.raises(InputError, match=r"context, format cannot change it"):
        oomproof.load(made, context=64, format="nf4")


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(PlanDoesNotFitError, match=r"does not fit: .* missing") as refused:
        oomproof.load("tiny", cap="1MiB")
    assert refused.value.shortfall_bytes > 0
    tight = oomproof.plan("tiny", format="bf16", concurrency=64)
    peak = tight.devices[0].peak_bytes
    with pytest.raises(PlanDoesNotFitError, match="use --context"):
        oomproof.load("tiny", format="bf16", concurrency=64, cap=peak - 2**22)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"format": "fp8", "engine": "transformers"},
            "fp8 is not run by the transformers engine on cpu: use --engine native, or leave",
        ),
        (
            {"format": "llm-int8", "engine": "native"},
            "the native engine does not hold llm-int8: use --engine transformers, or leave",
        ),
        (
            {"format": "nf4", "kv_format": "fp8", "engine": "transformers"},
            "use --engine native, or leave --engine out",
        ),
    ],
)
def test_what_the_asked_engine_does_not_run_is_refused_with_the_one_that_does(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(NotRunnableError, match=said):
        oomproof.load("tiny", **options)
    with pytest.raises(NotRunnableError, match=said):
        oomproof.load(oomproof.plan("tiny", **options))


@pytest.mark.parametrize("engine", ["auto", "native", "transformers"])
def test_what_no_engine_runs_is_refused_without_naming_another(engine: str) -> None:
    made = oomproof.plan("tiny", format="llm-int8", kv_format="fp8", engine=engine)
    with pytest.raises(NotRunnableError, match="no engine here runs tiny in llm-int8") as refused:
        oomproof.load(made)
    assert refused.value.remedy is None


@pytest.mark.parametrize("format_name", ["fp32", "int8", "fp8", "int4"])
def test_formats_that_only_our_own_engine_has_answer_too(format_name: str) -> None:
    with oomproof.load("tiny", format=format_name, context=64) as model:
        assert model.plan.engine == "native"
        assert model.generate("hello", max_new_tokens=3, seed=0)


def test_a_plan_for_a_machine_that_is_not_here_is_not_loaded() -> None:
    with pytest.raises(HardwareError, match=r"which is not here: plan again"):
        oomproof.load(oomproof.plan("tiny", gpus="1x24GiB"))


def test_a_folder_that_became_another_model_is_not_loaded(folder: Path) -> None:
    made = oomproof.plan(folder)
    with pytest.raises(PlanMismatchError, match="another model than the one that was planned"):
        oomproof.load(replace(made, fingerprint="0" * 16))


def test_a_folder_that_is_gone_since_it_was_planned_is_an_input_error(folder: Path) -> None:
    made = oomproof.plan(folder)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(InputError, match="no such folder"):
        oomproof.load(made)


def test_a_folder_of_a_config_alone_is_planned_and_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert oomproof.plan(folder).fits
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        oomproof.load(folder)


@pytest.mark.parametrize("load", [oomproof.load, oomproof.from_pretrained])
def test_without_the_run_extra_loading_names_the_install_line(
    load: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(load)
    monkeypatch.setattr(agreement, "find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(MissingDependencyError, match=r"jinja2 .*pip install 'oomproof\[run\]'"):
        load("tiny")


def test_planning_does_not_ask_for_the_run_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "find_spec", lambda _name: None)
    assert oomproof.plan("tiny").fits


def test_from_pretrained_places_and_quantizes_by_the_plan() -> None:
    made = oomproof.plan("tiny", format="nf4-dq", engine="transformers")
    model = oomproof.from_pretrained(made)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert str(layer.compute_dtype) == f"torch.{made.compute_dtype}"


def test_from_pretrained_plans_for_transformers_by_itself() -> None:
    assert oomproof.plan("tiny", format="bf16").engine == "native"
    model = oomproof.from_pretrained("tiny", format="bf16")
    assert type(model).__name__ == "LlamaForCausalLM"


def test_from_pretrained_refuses_a_plan_for_our_own_engine() -> None:
    said = r'planned for the native engine, .*: plan it with engine="transformers"'
    with pytest.raises(InputError, match=said):
        oomproof.from_pretrained(oomproof.plan("tiny", format="nf4-dq", engine="native"))
    with pytest.raises(InputError, match=said):
        oomproof.from_pretrained("tiny", format="nf4-dq", engine="native")


def test_two_models_answer_side_by_side() -> None:
    with (
        oomproof.load("tiny", format="bf16", context=64) as first,
        oomproof.load("tiny", format="nf4", context=64, engine="transformers") as second,
    ):
        assert (first.plan.engine, second.plan.engine) == ("native", "transformers")
        alone = first.generate("hello", seed=1, max_new_tokens=6)
        streams = [model.stream("hello", seed=1, max_new_tokens=6) for model in (first, second)]
        assert ["".join(stream) for stream in reversed(streams)][1] == alone


def test_a_fresh_process_measures_the_model_on_a_processor_and_no_imports() -> None:
    script = (
        "import oomproof\n"
        "with oomproof.load('tiny', format='bf16', engine='native', context=256) as model:\n"
        "    model.generate('It was', max_new_tokens=4, temperature=0)\n"
        "    print(model.measured_terms()[0].workspace <= model.plan.devices[0].terms.workspace)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True"], done.stderr
