"""A calibration text: where it leads a plan in "fit", and where it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import oomproof
from oomproof.errors import InputError
from oomproof.evaluation import calibrate
from tests.cli.invoke import invoke

PLAN = {"gpus": "1x24GiB", "cap": "1143MiB", "engine": "native", "context": 256}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(calibrate, "WINDOWS", 1)
    monkeypatch.setattr(calibrate, "CONTEXT", 32)
    path = tmp_path / "words.txt"
    path.write_text("It was a dark night, and the rain fell upon the sea. " * 20)
    return path


def test_it_changes_what_is_raised_and_is_named_among_the_reasons(text: Path) -> None:
    free = oomproof.plan("tiny", format="fit", **PLAN)  # type: ignore[arg-type]
    told: list[tuple[str, int, int]] = []
    own = oomproof.plan(
        "tiny",
        format="fit",
        calibration=text,
        progress=lambda *args: told.append(args),
        **PLAN,  # type: ignore[arg-type]
    )
    assert any("weighed by what they cost on words.txt" in reason for reason in own.reasons)
    assert own.tensor_formats != free.tensor_formats
    assert {stage for stage, _, _ in told} == {"calibrate"}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_loading_takes_it(text: Path) -> None:
    with oomproof.load("tiny", format="fit", context=256, calibration=text) as model:
        assert model.generate("It was", max_new_tokens=2, temperature=0)


def test_the_command_line_takes_it(text: Path) -> None:
    options = ("--format", "fit", "--gpus", "1x24GiB", "--cap", "1143MiB", "--context", "256")
    done = invoke("plan", "tiny", *options, "--calibration", str(text))
    assert done.code == 0, done.err
    assert "words.txt" in done.out


@pytest.mark.parametrize("options", [{}, {"format": "nf4"}, {"format": "auto", "search": True}])
def test_without_fit_it_is_refused(text: Path, options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"calibration is what fit weighs .* use --format fit"):
        oomproof.plan("tiny", calibration=text, **options)  # type: ignore[arg-type]


def test_a_model_that_is_not_here_is_refused(text: Path) -> None:
    with pytest.raises(InputError, match="cannot be calibrated: its weights are in no folder"):
        oomproof.plan("llama-3.1-8b", gpus="8GiB", format="fit", calibration=text)


def test_another_engines_plan_takes_none(text: Path) -> None:
    done = invoke("plan", "llama-3.1-8b", "--for", "vllm", "--calibration", str(text))
    assert "--calibration does not go with --for" in done.error
