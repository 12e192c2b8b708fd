"""`oomproof plan`: a table for people, JSON for scripts, one line for mistakes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from oomproof.planning.plan import Plan
from tests.cli.invoke import invoke


def test_json_is_a_plan_of_schema_1_and_nothing_else_is_printed() -> None:
    done = invoke("plan", "llama-3.1-8b", "--gpus", "1x24GiB", "--json")
    assert (done.code, done.err) == (0, "")
    made = Plan.from_json(done.out)
    assert made.fits
    assert json.loads(done.out) == json.loads(made.to_json())


def test_the_options_reach_the_plan() -> None:
    done = invoke(
        *("plan", "llama-3.1-8b", "--gpus", "2x24GiB", "--format", "nf4-dq", "--kv-format", "bf16"),
        *("--context", "16k", "--concurrency", "3", "--max-memory", "1=8GiB"),
        *("--reserve", "1GiB", "--cap", "20GiB", "--engine", "transformers", "--json"),
    )
    made = Plan.from_json(done.out)
    assert (made.format, made.kv_format, made.context, made.concurrency) == (
        *("nf4-dq", "bf16"),
        *(16384, 3),
    )
    assert [device.usable_bytes for device in made.devices] == [20 * 2**30, 8 * 2**30]
    assert made.cap_bytes == 20 * 2**30


def test_a_reserve_of_0_is_what_is_reserved_unless_told() -> None:
    done = invoke("plan", "llama-3.2-1b", "--gpus", "24GiB", "--reserve", "0", "--json")
    assert (done.code, json.loads(done.out)["reserve_bytes"]) == (0, 0)


def test_no_figure_is_cut_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    asked = ("llama-3.1-405b", "--gpus", "8x24GiB", "--format", "nf4-dq", "--offload", "cpu")
    table = invoke("plan", *asked, "--force").out.split("\n\n")[1]
    assert "GPU 7  115–125 H" in table
    assert "…" not in table


def test_max_model_len_is_another_name_for_context() -> None:
    done = invoke("plan", "tiny", "--max-model-len", "512", "--json")
    assert json.loads(done.out)["context"] == 512


def test_a_plan_that_fits_says_so_with_its_context() -> None:
    done = invoke("plan", "llama-3.1-8b", "--gpus", "1x RTX 4090")
    assert (done.code, done.err) == (0, "")
    assert "fits, up to" in done.out
    assert "GPU 0" in done.out


@pytest.mark.parametrize(
    ("arguments", "engine"),
    [
        (("llama-3.1-8b",), "native"),
        (("llama-3.1-8b", "--engine", "transformers"), "transformers"),
        (("llama-3.1-8b", "--format", "llm-int8"), "transformers"),
        (("gemma-2-9b",), "transformers"),
    ],
)
def test_the_engine_is_chosen_and_named(arguments: tuple[str, ...], engine: str) -> None:
    done = invoke("plan", *arguments, "--gpus", "1x RTX 4090")
    assert f"{engine} engine" in done.out
    plain = json.loads(invoke("plan", *arguments, "--gpus", "1x RTX 4090", "--json").out)
    assert (plain["engine"], plain["runnable"]) == (engine, True)
    assert plain["attention"] == (
        "paged" if engine == "native" else "eager" if "gemma" in arguments[0] else "sdpa"
    )


def test_an_engine_that_cannot_is_planned_with_the_reason() -> None:
    done = invoke("plan", "gemma-2-9b", "--gpus", "24GiB", "--engine", "native")
    assert (done.code, done.err) == (0, "")
    assert "fits, but no engine here runs it" in done.out
    assert "the native engine has no decoder of this family yet" in done.out


def test_a_plan_that_does_not_fit_is_exit_code_3_and_says_by_how_much() -> None:
    done = invoke("plan", "llama-3.1-405b", "--gpus", "1x24GiB")
    assert (done.code, done.err) == (3, "")
    assert "does not fit" in done.out
    assert "missing" in done.out
    done = invoke("plan", "tiny", "--cap", "1MiB", "--json")
    assert done.code == 3
    assert json.loads(done.out)["shortfall_bytes"] > 0


def test_a_name_with_brackets_is_printed_as_it_is(tmp_path: Path) -> None:
    done = invoke("plan", str(tmp_path / "[bold]none[/bold]"))
    assert "[bold]none[/bold]" in done.error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("plan", "./no/such/folder"), "no such folder"),
        (("plan", "no-such-model"), "no-such-model"),
        (("plan", "x" * 300), "xxx"),
        (("plan", "~nobody-of-that-name/model"), "nobody-of-that-name"),
        (("plan", "./two\nlines"), "two"),
        (("plan", __file__), "not a model folder"),
        (("plan", "tiny", "--format", "NF4"), "nf4"),
        (("plan", "tiny", "--gpus", ""), "a GPU is missing"),
        (("plan", "tiny", "--gpus", "2x"), "a GPU is missing"),
        (("plan", "tiny", "--gpus", "x24GiB"), "x24GiB"),
        (("plan", "tiny", "--gpus", "65x24GiB"), "65"),
        (("plan", "tiny", "--gpus", "1x0GiB"), "0GiB"),
        (("plan", "tiny", "--gpus", "1x24GiB,"), "a GPU is missing"),
        (("plan", "tiny", "--context", "0"), "context '0'"),
        (("plan", "tiny", "--context", "-5"), "context '-5'"),
        (("plan", "tiny", "--context", "1.5"), "context '1.5'"),
        (("plan", "tiny", "--context", ""), "context ''"),
        (("plan", "tiny", "--context", "1025"), "1,024"),
        (("plan", "tiny", "--concurrency", "-1"), "concurrency -1"),
        (("plan", "tiny", "--concurrency", "many"), "'many' is no whole number"),
        (("plan", "tiny", "--offload", "gpu"), "unknown offload 'gpu'"),
        (("plan", "tiny", "--offload", "disk"), "hundredths of a token"),
        (("plan", "tiny", "--max-memory", "cpu=0"), "max-memory"),
        (("plan", "tiny", "--concurrency", "1" + "0" * 30), "4096"),
        (("plan", "tiny", "--max-memory", "9=1GiB"), "device 9"),
        (("plan", "tiny", "--max-memory", "0="), "max-memory"),
        (("plan", "tiny", "--max-memory", "0=0"), "max-memory"),
        (("plan", "tiny", "--max-memory", "-1=1GiB"), "INDEX=SIZE"),
        (("plan", "tiny", "--max-memory", "9" * 5000 + "=1GiB"), "max-memory"),
        (("plan", "tiny", "--cap", ""), "cap ''"),
        (("plan", "tiny", "--cap", "many"), "cap 'many'"),
        (("plan", "tiny", "--reserve", "1XB"), "reserve '1XB'"),
        (("plan", "tiny", "--engine", ""), "engine ''"),
        (("plan", "tiny", "--for", "vllm", "--offload", "auto"), "--offload does not go"),
        (("plan", "tiny", "--for", "mlx", "--force"), "--force does not go"),
        (("plan", "tiny", "--for", "vllm", "--plot", "a.svg"), "--plot does not go"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments: tuple[str, ...], named: str) -> None:
    assert named in invoke(*arguments).error


def test_a_folder_that_may_not_be_entered_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root nothing is forbidden, so the system's refusal is made up."""
    locked = tmp_path / "locked"

    def refuse(path: object, *arguments: object, **options: object) -> object:
        if str(path).startswith(str(locked)):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)  # type: ignore[arg-type]

    stat = os.stat
    monkeypatch.setattr(os, "stat", refuse)
    assert "locked" in invoke("plan", str(locked / "model")).error
