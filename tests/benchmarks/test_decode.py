"""Whole models in turns: what is timed, and that both sides are timed alike."""

from __future__ import annotations

import json
from typing import Any

import pytest
from benchmarks.decode import ONE_GPU, ROWS, Row, describe, figures, in_turns, measure, speed


def test_rows_are_planned_where_they_will_run() -> None:
    assert "405b-four" not in ONE_GPU
    for row in ROWS.values():
        own = row.plan("native", gpus=f"{row.gpus}xH200")
        assert own.fits
        assert own.engine == "native"
        assert own.format == row.format
        assert len(own.devices_in_use) == row.gpus
        assert own.context >= row.prompt_tokens + row.new_tokens
        assert not row.has_peer or row.plan("transformers", gpus="H200").fits


def test_short_contexts_are_at_most_256_tokens_and_that_of_405b_512() -> None:
    short = [ROWS[name].context for name in ("8b-1", "8b-8", "8b-32", "70b-1")]
    assert max(short) <= 256
    assert ROWS["405b-four"].context <= 512


def test_decoding_is_timed_from_the_last_warm_token_on() -> None:
    row = Row(model="tiny", requests=2, new_tokens=6)
    # The fourth token comes at 4 s; then two more, half a second each, of two requests.
    assert speed([1.0, 2.0, 3.0, 4.0, 4.5, 5.0], row) == 4
    assert speed([1.0, 2.0], row) == 2


def test_a_prompt_is_timed_to_its_first_token() -> None:
    row = Row(model="tiny", prompt_tokens=2048, new_tokens=1)
    assert speed([0.5], row) == 4096
    found = figures([[0.5], [0.25], [1.0]], row)
    assert found["tokens_per_second"] == 4096
    assert found["first_token_s"] == 0.5
    assert found["rounds_tokens_per_second"] == [4096, 8192, 2048]


def test_sides_take_turns_after_a_short_answer() -> None:
    calls: list[tuple[str, int, int, int]] = []

    def side(name: str) -> Any:
        def answer(requests: int, prompt_tokens: int, new_tokens: int) -> list[float]:
            calls.append((name, requests, prompt_tokens, new_tokens))
            return [float(number + 1) for number in range(new_tokens)]

        return answer

    row = Row(model="tiny", requests=2, prompt_tokens=100, new_tokens=8, rounds=2)
    found = in_turns({"ours": side("ours"), "theirs": side("theirs")}, row)
    warm = [("ours", 2, 16, 4), ("theirs", 2, 16, 4)]
    assert calls == warm + 2 * [("ours", 2, 100, 8), ("theirs", 2, 100, 8)]
    assert found["ours"] == found["theirs"]
    assert found["ours"]["tokens_per_second"] == 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("format_name", ["bf16", "nf4-dq"])
@pytest.mark.parametrize("new_tokens", [1, 8])
def test_the_bundled_model_is_timed_beside_transformers(format_name: str, new_tokens: int) -> None:
    row = Row(
        model="tiny",
        format=format_name,
        requests=2,
        prompt_tokens=20,
        new_tokens=new_tokens,
        rounds=1,
    )
    found: dict[str, Any] = json.loads(json.dumps(measure(row)))
    assert found["kind"] == ("prefill" if new_tokens == 1 else "decode")
    assert found["ratio"] == pytest.approx(
        found["ours"]["tokens_per_second"] / found["theirs"]["tokens_per_second"]
    )
    assert found["share"] > 0
    assert "first token" in describe({**found, "row": "tiny", "wall_s": 1.0})


def test_a_row_that_failed_says_so() -> None:
    assert describe({"row": "70b-1", "exit_code": 3}) == "70b-1: failed, exit code 3"
