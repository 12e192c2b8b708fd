"""`--adapter`: in the plan, in answers, through a worker, and refused where it has no meaning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import oomproof
from oomproof.errors import InputError, NotRunnableError, PlanMismatchError
from oomproof.models.resolve import resolve
from oomproof.planning.plan import Plan
from oomproof.session import bench
from tests.cli.invoke import invoke
from tests.models.adapters import ALL, write_adapter

PROMPT = "It was a dark night"
RUN = ("--format", "bf16", "--engine", "native", "--context", "256")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("adapters")
    return write_adapter(
        parent / "wry[humour]",
        resolve("tiny"),
        ALL,
        std=0.1,
        config={"base_model_name_or_path": "org/other"},
    )


def test_the_plan_names_it_for_people_and_scripts(folder: Path) -> None:
    done = invoke("plan", "tiny", "--adapter", str(folder), "--json")
    made = Plan.from_json(done.out)
    assert made.adapter is not None
    assert (made.adapter.path, made.adapter.rank) == (str(folder), 8)
    done = invoke("plan", "tiny", "--adapter", str(folder))
    shown = " ".join(done.out.split())
    assert "adapter wry[humour]" in shown
    assert "names 'org/other' as its base model" in shown


def test_run_answers_with_it_and_warns_of_another_base(folder: Path) -> None:
    options = (*RUN, "--max-new-tokens", "12", "--temperature", "0", "--no-worker", "--json")
    bare = json.loads(invoke("run", "tiny", PROMPT, *options).out)
    done = invoke("run", "tiny", PROMPT, *options, "--adapter", str(folder))
    adapted = json.loads(done.out)
    assert bare != adapted
    assert "warning: the adapter names 'org/other'" in done.err


def test_a_plan_that_was_kept_loads_its_adapter_again(folder: Path) -> None:
    made = oomproof.plan("tiny", format="bf16", engine="native", context=256, adapter=folder)
    again = Plan.from_json(made.to_json())
    answers = []
    for one in (made, again):
        with oomproof.load(one) as model:
            answers.append(model.generate(PROMPT, max_new_tokens=12, temperature=0))
    assert answers[0] == answers[1]
    with oomproof.load("tiny", format="bf16", engine="native", context=256) as model:
        assert model.generate(PROMPT, max_new_tokens=12, temperature=0) != answers[0]


def test_a_kept_plan_refuses_another_adapter_in_its_place(tmp_path: Path) -> None:
    place = write_adapter(tmp_path / "adapter", resolve("tiny"), rank=8)
    made = oomproof.plan("tiny", format="bf16", engine="native", adapter=place)
    place.rename(tmp_path / "old")
    write_adapter(place, resolve("tiny"), rank=4)
    with pytest.raises(PlanMismatchError, match="another adapter"):
        oomproof.load(made)


def test_a_worker_answers_with_it(folder: Path) -> None:
    made = oomproof.plan("tiny", format="bf16", engine="native", context=256, adapter=folder)
    answers = []
    for worker in (False, True):
        with oomproof.load(made, worker=worker) as model:
            answers.append(model.generate(PROMPT, max_new_tokens=12, temperature=0))
    assert answers[0] == answers[1]


def test_it_is_rehearsed_beside_random_weights(folder: Path) -> None:
    done = invoke(
        *("rehearse", "tiny", "--adapter", str(folder), "--json", "--no-note"),
        *("--format", "bf16", "--engine", "native", "--context", "256"),
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)


def test_nothing_is_tuned_for_it(folder: Path) -> None:
    done = invoke("bench", "tiny", "--tune", "--format", "nf4-dq", "--adapter", str(folder))
    assert "leave --adapter out" in done.error


def test_both_engines_are_timed_with_it(folder: Path) -> None:
    report = bench(
        "tiny",
        against="transformers",
        requests=[1],
        contexts=[16],
        format="bf16",
        engine="native",
        context=256,
        adapter=folder,
    )
    assert report.as_dict()


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "mlx"])
def test_it_is_not_handed_to_other_engines(target: str, folder: Path) -> None:
    done = invoke("plan", "tiny", "--for", target, "--gpus", "1x24GiB", "--adapter", str(folder))
    assert "--adapter does not go with --for" in done.error


def test_a_missing_folder_is_one_line() -> None:
    done = invoke("run", "tiny", PROMPT, "--adapter", "/nowhere/at/all")
    assert "/nowhere/at/all: no such folder" in done.error


def test_a_plan_is_loaded_with_its_own_adapter_or_none(folder: Path) -> None:
    made = oomproof.plan("tiny", format="bf16", engine="native")
    with pytest.raises(InputError, match="adapter cannot change it"):
        oomproof.load(made, adapter=folder)


def test_what_no_engine_runs_is_told_with_it_in_mind(folder: Path) -> None:
    with pytest.raises(NotRunnableError, match="use --engine native"):
        oomproof.load("tiny", format="int8", engine="transformers", adapter=folder)
