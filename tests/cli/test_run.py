"""`oomproof run`: the answer to stdout, talk to stderr, mistakes before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomproof import agreement, session
from oomproof.cli.options import wants_worker
from oomproof.engine.model import Model, Stream
from oomproof.errors import WorkerError
from oomproof.planning.plan import Plan
from tests.cli.invoke import invoke
from tests.compat.checkpoints import copy_of_tiny, edit_json

QUICK = ("--max-new-tokens", "5", "--seed", "1", "--format", "bf16")


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes loading a failure of the test."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(session, "load", fail)


def test_the_answer_is_all_that_goes_to_stdout() -> None:
    done = invoke("run", "tiny", "It was a dark night", *QUICK)
    assert done.code == 0
    assert done.out.endswith("\n")
    assert len(done.out) > 1
    assert "planned" in done.err
    assert "new, first after" in done.err
    assert "Traceback" not in done.err
    assert invoke("run", "tiny", "It was a dark night", *QUICK).out == done.out


@pytest.mark.parametrize("dash", [(), ("-",)])
def test_a_prompt_comes_from_stdin_where_none_is_given(dash: tuple[str, ...]) -> None:
    given = invoke("run", "tiny", "Who goes thére? 👍", *QUICK)
    piped = invoke("run", "tiny", *dash, *QUICK, stdin="Who goes thére? 👍")
    assert piped.code == 0
    assert piped.out == given.out


def test_json_holds_the_answer_its_figures_and_nothing_else() -> None:
    done = invoke("run", "tiny", "hello", "--json", *QUICK)
    assert done.code == 0
    answer = json.loads(done.out)
    text = invoke("run", "tiny", "hello", *QUICK).out
    assert answer["text"] + "\n" == text
    assert answer["model"] == "tiny"
    assert answer["format"] == "bf16"
    assert answer["new_tokens"] <= 5
    assert answer["finish_reason"] in ("length", "stop")
    assert answer["first_token_s"] > 0
    [device] = answer["memory"]
    assert device["measured"]["weights"] <= device["predicted"]["weights"]


def test_json_holds_log_probabilities_where_they_are_asked_for() -> None:
    done = invoke("run", "tiny", "hello", "--json", "--logprobs", "2", *QUICK)
    answer = json.loads(done.out)
    assert len(answer["logprobs"]) == answer["new_tokens"]
    assert "".join(one["text"] for one in answer["logprobs"]) == answer["text"]
    for one in answer["logprobs"]:
        first, second = one["top"]
        assert 0 >= first["logprob"] >= second["logprob"]
        assert first["logprob"] >= one["logprob"]
    assert "logprobs" not in json.loads(invoke("run", "tiny", "hello", "--json", *QUICK).out)


def test_an_answer_ends_before_a_stop_string() -> None:
    whole = invoke("run", "tiny", "It was a dark night", *QUICK).out.removesuffix("\n")
    stop = whole[3:5]
    done = invoke("run", "tiny", "It was a dark night", "--stop", stop, "--stop", "~~", *QUICK)
    assert done.out == whole[: whole.index(stop)] + "\n"
    assert "ended by" not in done.err or "ended by stop" in done.err


def test_raw_continues_the_text_without_a_template() -> None:
    raw = json.loads(invoke("run", "tiny", "hello", "--raw", "--json", *QUICK).out)
    chat = json.loads(invoke("run", "tiny", "hello", "--json", *QUICK).out)
    assert raw["prompt_tokens"] < chat["prompt_tokens"]


def test_memory_is_compared_on_stderr() -> None:
    done = invoke("run", "tiny", "hello", "--memory", *QUICK)
    for word in ("memory of 0 cpu", "predicted", "measured", "peak without margin"):
        assert word in done.err
        assert word not in done.out


@pytest.mark.parametrize("process", ["--worker", "--no-worker"])
def test_ctrl_c_ends_the_answer_and_keeps_what_came(
    monkeypatch: pytest.MonkeyPatch, process: str
) -> None:
    original, load = Stream.__next__, session.load

    def load_a_model_that_never_stops(plan: Plan, **options: Any) -> Model:
        model = load(plan, **options)
        model.tokenizer.stop_tokens = frozenset()
        return model

    def interrupted(stream: Stream) -> str:
        if len(stream.tokens) >= 3:
            raise KeyboardInterrupt
        return original(stream)

    monkeypatch.setattr(Stream, "__next__", interrupted)
    monkeypatch.setattr(session, "load", load_a_model_that_never_stops)
    done = invoke("run", "tiny", "hello", "--format", "bf16", "--seed", "3", process)
    assert done.code == 0
    assert "ended by cancelled" in done.err
    assert len(done.out) > 1


def test_the_model_is_closed_even_if_answering_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Model] = []

    def close(model: Model) -> None:
        closed.append(model)

    monkeypatch.setattr(Model, "close", close)
    done = invoke("run", "tiny", "word " * 900, "--context", "256", "--format", "bf16")
    assert done.code == 1
    assert len(closed) == 1
    assert "planned context of 256" in done.err.splitlines()[-1]
    assert done.err.splitlines()[-1].startswith("error: ")


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", "tiny", ""), "prompt is empty"),
        (("run", "tiny", " \n\t"), "prompt is empty"),
        (("run", "tiny"), "prompt is empty"),
        (("run", "tiny", "hi", "--temperature", "-1"), "temperature -1"),
        (("run", "tiny", "hi", "--temperature", "nan"), "temperature nan"),
        (("run", "tiny", "hi", "--temperature", "101"), "temperature 101"),
        (("run", "tiny", "hi", "--top-p", "1.1"), "top-p 1.1"),
        (("run", "tiny", "hi", "--top-k", "-1"), "top-k -1"),
        (("run", "tiny", "hi", "--min-p", "1.5"), "min-p 1.5"),
        (("run", "tiny", "hi", "--repetition-penalty", "0"), "repetition-penalty 0"),
        (("run", "tiny", "hi", "--presence-penalty", "3"), "presence-penalty 3"),
        (("run", "tiny", "hi", "--frequency-penalty", "nan"), "frequency-penalty nan"),
        (("run", "tiny", "hi", "--stop", ""), "stop string of 0 characters"),
        (("run", "tiny", "hi", *["--stop", "x"] * 17), "17 stop strings"),
        (("run", "tiny", "hi", "--json", "--logprobs", "21"), "logprobs 21"),
        (("run", "tiny", "hi", "--logprobs", "2"), "add --json"),
        (("run", "tiny", "hi", "--seed", str(2**63)), "seed"),
        (("run", "tiny", "hi", "--max-new-tokens", "0"), "max-new-tokens 0"),
        (("run", "tiny", "hi", "--max-new-tokens", "-3"), "max-new-tokens -3"),
        (("run", "tiny", "hi", "--max-memory", "9=1GiB"), "device 9"),
        (("run", "tiny", "hi", "--format", "nf5"), "nf5"),
        (("run", "tiny", "hi", "--context", "99999"), "1,024"),
        (("run", "/no/such/folder", "hi"), "no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_argument_is_one_line_and_nothing_is_loaded(
    arguments: tuple[str, ...], named: str
) -> None:
    assert named in invoke(*arguments).error


def test_a_prompt_that_is_no_unicode_is_one_error_and_no_traceback() -> None:
    """A command line's byte that is no UTF-8 reaches Python as a lone surrogate."""
    done = invoke("run", "tiny", "caf\udce9", *QUICK)
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1].startswith("error: ")


@pytest.mark.usefixtures("loads_nothing")
def test_stdin_that_is_no_text_or_a_terminal_is_refused() -> None:
    assert "not UTF-8" in invoke("run", "tiny", stdin=b"caf\xe9").error
    assert "no prompt" in invoke("run", "tiny", terminal=True).error


def test_what_does_not_fit_is_exit_code_3_with_the_missing_bytes() -> None:
    done = invoke("run", "tiny", "hello", "--cap", "1MiB")
    assert (done.code, done.out) == (3, "")
    assert done.err.splitlines()[-1].startswith("error: tiny does not fit: ")


def test_what_the_engine_does_not_run_is_exit_code_1_with_the_reason() -> None:
    done = invoke("run", "tiny", "hello", "--format", "fp8", "--engine", "transformers")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1].startswith("error: tiny in fp8 cannot be run as asked: ")


def test_a_missing_package_is_told_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        agreement, "find_spec", lambda name: None if name == "bitsandbytes" else object()
    )
    done = invoke("run", "tiny", "hello")
    assert done.error == (
        "error: bitsandbytes is not installed: run: pip install 'oomproof[run]'\n"
    )


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("generation_config.json", {"temperature": "hot"}),
        ("tokenizer_config.json", {"extra_special_tokens": 7}),
        ("config.json", {"hidden_act": "nope"}),
    ],
)
def test_a_hostile_file_ends_in_one_error_and_no_traceback(
    file: str, fields: dict[str, object], tmp_path: Path
) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    edit_json(folder / file, **fields)
    done = invoke("run", str(folder), "hello", *QUICK)
    assert (done.code, done.out) == (1, "")
    assert [line for line in done.err.splitlines() if line.startswith("error: ")] == [
        done.err.splitlines()[-1]
    ]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    done = invoke("run", str(folder), "hello", *QUICK)
    assert (done.code, done.out) == (1, "")
    assert "tokenizer" in done.err.splitlines()[-1]


def test_a_process_of_its_own_changes_nothing_that_is_printed() -> None:
    quick = (*QUICK, "--cap", "4GiB")  # of what is free there is another amount each time
    here = invoke("run", "tiny", "It was a dark night", "--no-worker", *quick)
    there = invoke("run", "tiny", "It was a dark night", "--worker", *quick)
    assert (there.code, there.out) == (0, here.out)
    assert there.err.splitlines()[:2] == here.err.splitlines()[:2]


@pytest.mark.parametrize(
    ("kind", "asked", "wanted"),
    [("cuda", None, True), ("cpu", None, False), ("cuda", False, False), ("cpu", True, True)],
)
def test_a_model_on_a_gpu_gets_a_process_of_its_own_unless_told(
    kind: str, asked: bool | None, wanted: bool
) -> None:
    made = session.plan("tiny", gpus="1x24GiB")
    [device] = made.devices
    placed = replace(made, devices=(replace(device, kind=kind),))  # type: ignore[arg-type]
    assert wants_worker(asked, placed) == wanted


def test_what_its_process_cannot_load_is_the_error_of_always(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-4096:] = b"\xff" * 4096
    weights.write_bytes(damaged)
    here, there = (
        invoke("run", str(folder), "hello", process, *QUICK)
        for process in ("--no-worker", "--worker")
    )
    assert there.code == here.code == 1
    assert there.err.splitlines()[-1] == here.err.splitlines()[-1]
    assert "model.safetensors" in there.err.splitlines()[-1]


def test_a_process_that_dies_is_one_error_after_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(*_arguments: object) -> None:
        raise WorkerError("it was ended by SIGKILL", signal="SIGKILL", stderr="last words\n")

    monkeypatch.setattr(Stream, "__next__", die)
    done = invoke("run", "tiny", "hello", "--worker", *QUICK)
    assert done.code == 1
    assert done.err.endswith("last words\nerror: it was ended by SIGKILL\n")
