"""Tokens on the disk: what was encoded comes back, and long samples are told, cut or dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults
from oomproof.models.resolve import bundled_folder
from oomproof.tuning import cache as cache_module
from oomproof.tuning.cache import TokenCache, build_cache, open_cache
from oomproof.tuning.records import DataError
from tests.tuning.books import write_lines


@pytest.fixture(scope="module")
def tokenizer() -> TransformersTokenizer:
    folder = Path(bundled_folder())
    return TransformersTokenizer(folder, defaults=read_generation_defaults(folder))


def build(path: Path, tokenizer: Any, **options: Any) -> TokenCache:
    wanted: dict[str, Any] = {"key": "k", "sha256": "s", "context": 32, "long_samples": "refuse"}
    return build_cache(path, tokenizer, path.parent / "cache", **{**wanted, **options})


def test_samples_come_back_as_they_were(
    tmp_path: Path, tokenizer: TransformersTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_FLUSH_TOKENS", 5)
    texts = [f"It was night {n}." for n in range(9)]
    path = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    built = build(path, tokenizer)
    found = open_cache(tmp_path / "cache", "k")
    assert found is not None
    for cache in (built, found):
        for number, text in enumerate(texts):
            tokens, learned = cache.sample(number)
            assert tokens.tolist() == [*tokenizer.encode(text), tokenizer.eos_token_id]
            assert not learned[0]
            assert learned[len(tokenizer.prefix or (0,)) :].all()
        assert cache.lines.tolist() == list(range(1, 10))
        assert cache.facts.samples == 9
        assert cache.facts.tokens == int(cache.lengths.sum())
        assert cache.facts.longest == int(cache.lengths.max())


def test_a_cache_of_another_key_or_of_another_length_is_not_taken(
    tmp_path: Path, tokenizer: TransformersTokenizer
) -> None:
    build(write_lines(tmp_path / "a.jsonl", {"text": "a b"}), tokenizer)
    folder = tmp_path / "cache"
    assert open_cache(folder, "other") is None
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"1234")
    assert open_cache(folder, "k") is None
    (folder / "cache.json").write_text("{", encoding="utf-8")
    assert open_cache(folder, "k") is None
    assert open_cache(tmp_path / "nowhere", "k") is None


def test_long_samples_are_refused_with_the_first_and_the_longest(
    tmp_path: Path, tokenizer: TransformersTokenizer
) -> None:
    lines = [{"text": "a"}, {"text": "dark night " * 40}, {"text": "dark night " * 60}]
    path = write_lines(tmp_path / "a.jsonl", *lines)
    with pytest.raises(DataError) as caught:
        build(path, tokenizer)
    assert caught.value.line == 2
    longest = len(tokenizer.encode("dark night " * 60)) + 1
    assert f"of 3 samples 2 are longer, the longest with {longest} (line 3)" in str(caught.value)
    assert f"use --context {longest}, or --long-samples truncate or drop" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_long_samples_are_cut_or_left_out_and_counted(
    tmp_path: Path, tokenizer: TransformersTokenizer
) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "dark night " * 40})
    cut = build(path, tokenizer, long_samples="truncate")
    assert (cut.facts.truncated, cut.facts.dropped, cut.lengths.tolist()[1]) == (1, 0, 32)
    left = build(path, tokenizer, long_samples="drop")
    assert (left.facts.truncated, left.facts.dropped, len(left)) == (0, 1, 1)


def test_a_sample_that_would_lose_its_answer_is_left_out_and_not_cut(
    tmp_path: Path, tokenizer: TransformersTokenizer
) -> None:
    lines = [{"text": "a"}, {"prompt": "dark night " * 40, "completion": "c"}]
    cache = build(write_lines(tmp_path / "a.jsonl", *lines), tokenizer, long_samples="truncate")
    assert (cache.facts.truncated, cache.facts.dropped) == (0, 1)


def test_data_of_which_nothing_is_left_is_refused(
    tmp_path: Path, tokenizer: TransformersTokenizer
) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "dark night " * 40})
    with pytest.raises(DataError, match="all 1 samples are longer than 32 tokens"):
        build(path, tokenizer, long_samples="drop")


def test_what_a_bad_line_left_is_no_cache(tmp_path: Path, tokenizer: TransformersTokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "a"}, "{")
    with pytest.raises(DataError, match="line 2"):
        build(path, tokenizer)
    assert open_cache(tmp_path / "cache", "k") is None


def test_the_meta_file_says_what_was_read(tmp_path: Path, tokenizer: TransformersTokenizer) -> None:
    build(write_lines(tmp_path / "a.jsonl", {"text": "a b"}), tokenizer)
    meta = json.loads((tmp_path / "cache" / "cache.json").read_text(encoding="utf-8"))
    assert (meta["key"], meta["facts"]["name"], meta["facts"]["sha256"]) == ("k", "a.jsonl", "s")
    assert np.fromfile(tmp_path / "cache" / "samples.bin", np.int64).tolist()[1] == 1
