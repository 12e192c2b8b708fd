"""What the benchmark of fidelity says of a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import fidelity
from oomproof.models.resolve import bundled_folder

pytest.importorskip("transformers")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    text = (bundled_folder() / "README.md").read_text(encoding="utf-8").partition("## Samples")[2]
    half = len(text) // 2
    for name, part in (("test", text[:half]), ("valid", text[half:] * 3), ("train", "")):
        (tmp_path / f"{name}.txt").write_text(part)
    return tmp_path


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fidelity", *arguments])
        assert fidelity.main() == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_formats_mixtures_and_claims_are_lines_and_the_claims_hold(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "UNIFORM", ("nf4-dq", "int8", "nf4-dq+search"))
    monkeypatch.setattr(fidelity, "BUDGETS", (("nf4-dq", "int8", 0.5),))
    out = corpus / "out.jsonl"
    options = ("--tokens", "1k", "--context", "128", "--out", str(out))
    found = rows(
        capsys,
        "tiny",
        *options,
        "--text",
        str(corpus / "test.txt"),
        "--calibration",
        str(corpus / "valid.txt"),
    )
    assert [json.loads(line) for line in out.read_text().splitlines()] == found
    (name,) = fidelity.budgets_of("tiny")
    formats = [one["format"] for one in found if "format" in one]
    names = ["nf4-dq", "int8", "nf4-dq+search", name]
    assert formats == ["bf16", *names, "fp32", *names, name]
    claims = {one["claim"]: one for one in found if "claim" in one}
    assert list(claims) == [
        "nf4-dq+search diverges less than nf4-dq",
        f"{name} diverges less than every uniform format of at most its bytes",
        f"{name} spends at least 95% of the spare bytes",
        f"{name} diverges no more calibrated than without",
    ]
    assert all(one["holds"] for one in claims.values())
    for one in claims.values():
        if "difference" in one:
            low, value, high = (one[f"difference{part}"] for part in ("_low", "", "_high"))
            assert low <= value <= high  # type: ignore[operator]


def test_a_model_is_trained_where_it_is_asked_for(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(fidelity, "run", lambda line, **_: asked.append(line))
    monkeypatch.setattr(fidelity, "rows_of", lambda model, text: iter([{"model": model}]))
    keep = corpus / "keep"
    assert rows(capsys, "--train", str(corpus), "--keep", str(keep)) == [
        {"model": str(keep / "small")}
    ]
    (line,) = asked
    assert line[1].endswith("train_tiny.py")
    for part in ("train", "valid", "test"):
        assert line[line.index(f"--{part}") + 1] == str(corpus / f"{part}.txt")
    assert line[line.index("--preset") + 1] == "small"
