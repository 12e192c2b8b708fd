"""`oomproof merge`: a line for the result, and a line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.invoke import invoke
from tests.conversion.test_merge import make_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"))


def test_a_model_is_merged_and_told_in_a_line(adapter: Path, tmp_path: Path) -> None:
    arguments = ("merge", "tiny", "--adapter", str(adapter), "--out", str(tmp_path / "out"))
    done = invoke(*arguments)
    assert done.code == 0, done.err
    assert done.out.startswith(f"{tmp_path / 'out'}: 10 weights merged, 7.")
    assert done.out.count("\n") == 1
    again = invoke(*arguments, "--json")
    assert json.loads(again.out)["merged"] == 10
    assert "[shards finished before: 1]" in again.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "nowhere", "--out", "{out}"], "nowhere: no such folder"),
        (["--adapter", "{adapter}", "--out", "{out}", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--adapter", "{adapter}", "--out", "{out}", "--device", "tpu"], "device 'tpu' is unkno"),
        (["--adapter", "{adapter}", "--out", "{out}", "--device", "cuda:9"], "is not here: this"),
        (["--adapter", "{adapter}", "--out", "{out}", "--shard", "12"], "shard 12 is less than"),
        (["--adapter", "{adapter}", "--out", "/"], "--out / names no folder to make"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, adapter: Path, tmp_path: Path
) -> None:
    places = {"adapter": adapter, "out": tmp_path / "out"}
    error = invoke("merge", "tiny", *(one.format(**places) for one in arguments)).error
    assert message in error
    assert list(tmp_path.iterdir()) == []
