"""The exception tree: what an error carries and what a user reads."""

from __future__ import annotations

import pickle
import re

import pytest

from oomproof import errors
from oomproof.errors import (
    CheckpointError,
    ConfigError,
    HardwareError,
    InputError,
    LoadError,
    MissingDependencyError,
    ModelNotFoundError,
    NotRunnableError,
    OomproofError,
    PlanDoesNotFitError,
    PlanMismatchError,
    RequestError,
    WorkerDownError,
    WorkerError,
)

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, OomproofError)
]


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"([│├└─ ]*)([A-Z]\w+Error)\b", line):
            path = [*path[: len(found[1]) // 4], found[2]]
            parents[found[2]] = path[-2] if len(path) > 1 else "Exception"
    assert parents == {error.__name__: error.__base__.__name__ for error in ALL if error.__base__}


def test_only_a_plan_that_does_not_fit_exits_with_3() -> None:
    assert {error.__name__: error.exit_code for error in ALL if error.exit_code != 1} == {
        "PlanDoesNotFitError": 3,
        "LadderExhaustedError": 3,
        "TrainingMemoryError": 3,
    }


def test_the_remedy_follows_the_message() -> None:
    error = InputError("context 0 must be at least 1", remedy="ask for 1 token")
    assert str(error) == "context 0 must be at least 1: ask for 1 token"
    assert (error.message, error.remedy) == ("context 0 must be at least 1", "ask for 1 token")
    assert str(InputError("that is wrong")) == "that is wrong"


def test_a_config_error_names_file_and_field() -> None:
    error = ConfigError("a/config.json", "is -3, at least 1", field="num_hidden_layers", remedy="x")
    assert str(error) == "a/config.json, field 'num_hidden_layers': is -3, at least 1: x"
    assert (error.file, error.field) == ("a/config.json", "num_hidden_layers")
    assert str(ConfigError("a/config.json", "is no JSON")) == "a/config.json: is no JSON"


def test_a_checkpoint_error_names_its_file() -> None:
    error = CheckpointError("model.safetensors", "is cut off", remedy="download it again")
    assert str(error) == "model.safetensors: is cut off: download it again"
    assert error.file == "model.safetensors"


def test_a_missing_package_comes_with_the_line_that_installs_it() -> None:
    error = MissingDependencyError("torch", install="pip install 'oomproof[run]'")
    assert str(error) == "torch is not installed: run: pip install 'oomproof[run]'"
    assert (error.package, error.install) == ("torch", "pip install 'oomproof[run]'")


def test_a_plan_that_does_not_fit_carries_the_missing_bytes() -> None:
    error = PlanDoesNotFitError("1.2 GiB missing", shortfall_bytes=1234, remedy="use nf4-dq")
    assert (str(error), error.shortfall_bytes) == ("1.2 GiB missing: use nf4-dq", 1234)


def test_a_mismatch_shows_three_differences_and_counts_the_rest() -> None:
    differences = tuple(f"p{i}: planned cuda:0, found cpu" for i in range(5))
    error = PlanMismatchError(differences)
    assert error.differences == differences
    assert str(error).startswith("5 loaded parameters differ from the plan: p0: planned cuda:0")
    assert "p2:" in str(error)
    assert "p3:" not in str(error)
    assert "(and 2 more)" in str(error)
    assert "more)" not in str(PlanMismatchError(differences[:3]))


@pytest.mark.parametrize(
    "error",
    [
        OomproofError("m", remedy="r"),
        InputError("m", remedy="r"),
        ConfigError("config.json", "m", field="f", remedy="r"),
        CheckpointError("a.safetensors", "m", remedy="r"),
        ModelNotFoundError("m"),
        HardwareError("m"),
        RequestError("m"),
        MissingDependencyError("torch", install="pip install torch"),
        NotRunnableError("m"),
        PlanDoesNotFitError("m", shortfall_bytes=5, remedy="r"),
        LoadError("m"),
        PlanMismatchError(("a", "b")),
        WorkerError("m", code=700, signal="SIGKILL", stderr="tail", remedy="r"),
        WorkerDownError("m"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_the_way_back_from_a_worker_process(error: OomproofError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
