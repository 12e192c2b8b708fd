"""Which file of a dataset repository is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from oomproof.errors import InputError
from oomproof.tuning.hub_data import _choose, find_data


@pytest.mark.parametrize(
    ("names", "asked", "chosen"),
    [
        (["README.md", "data.jsonl"], "", "data.jsonl"),
        (["train.jsonl", "test.jsonl"], "", "train.jsonl"),
        (["data/train-00.jsonl", "data/test.jsonl"], "", "data/train-00.jsonl"),
        (["a.jsonl", "b.jsonl"], "b.jsonl", "b.jsonl"),
    ],
)
def test_the_one_that_is_plainly_meant_is_taken(names: list[str], asked: str, chosen: str) -> None:
    assert _choose("org/name", names, asked) == chosen


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (["a.jsonl", "b.jsonl"], "", r"has 2 files that could be meant: name one"),
        (["train-0.jsonl", "train-1.jsonl"], "", r"--data org/name:train-0.jsonl"),
        (["train.parquet"], "", r"only Parquet, which is not read"),
        ([], "", r"has no .jsonl or .txt file: write it"),
        (["a.jsonl"], "b.jsonl", r"has no file 'b.jsonl': it has a.jsonl"),
    ],
)
def test_what_is_not_plain_is_asked_for(names: list[str], asked: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _choose("org/name", names, asked)


def test_a_file_here_goes_before_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("x", encoding="utf-8")
    assert find_data("org/name") == Path("org/name")
    for name in ("nowhere.jsonl", "org/nowhere.jsonl", "a" * 5000, "\0"):
        with pytest.raises(InputError, match=r"is no file here|cannot be looked at"):
            find_data(name)
