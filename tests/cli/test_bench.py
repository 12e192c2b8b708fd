"""`oomproof bench`: figures to stdout, each as it comes to stderr, mistakes at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oomproof import agreement, measuring, session
from oomproof.cli.options import MAX_REQUESTS
from oomproof.engine.tune import DeviceTuning, TuningReport
from oomproof.errors import MissingDependencyError
from oomproof.quantization.tune_products import ProductTiming, TimedLaunch
from oomproof.quantization.tuned import ProductKey
from tests.cli.invoke import invoke

SIZES = ("--requests", "1,2", "--contexts", "16,64", "--context", "128")
QUICK = (*SIZES, "--format", "bf16")
POINTS = [
    ("prefill", 1, 16),
    ("prefill", 1, 64),
    ("decode", 1, 16),
    ("decode", 2, 16),
    ("decode", 1, 64),
    ("decode", 2, 64),
]


def points(engine: dict[str, Any]) -> list[tuple[str, int, int]]:
    found = [timing["point"] for timing in engine["timings"]]
    return [(point["kind"], point["requests"], point["context"]) for point in found]


@pytest.fixture
def runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes starting an engine, or measuring the machine, a failure of the test."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr("oomproof.starting.start_engine", fail)
    monkeypatch.setattr(measuring, "rehearsable", fail)
    monkeypatch.setattr("oomproof.engine.bench.measure_limits", fail)


def test_json_holds_every_figure_with_its_limit_and_nothing_else() -> None:
    done = invoke("bench", "tiny", "--json", *QUICK)
    assert done.code == 0
    report = json.loads(done.out)
    assert (report["model"], report["devices"]) == ("tiny", ["cpu"])
    assert report["limits"]["read_bytes_per_s"] > 0
    assert report["limits"]["host_link_bytes_per_s"] is None
    [engine] = report["engines"]
    assert (engine["engine"], engine["format"], engine["kv_format"]) == ("native", "bf16", "bf16")
    assert engine["load_s"] > 0
    assert engine["load_bytes_per_s"] > 0
    assert points(engine) == POINTS
    for timing in engine["timings"]:
        assert timing["tokens_per_second"] > 0
        assert timing["share"] == pytest.approx(timing["tokens_per_second"] / timing["limit"])
    assert done.err.count("native: prefill at") == 2
    assert done.err.count("native: decode at") == 4
    assert "decode at 2 × 64 tokens" in done.err


def test_the_table_holds_a_row_a_point_and_the_loading() -> None:
    done = invoke("bench", "tiny", *QUICK)
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines()]
    found = [
        (row[0], int(row[1]), int(row[2]))
        for row in rows
        if row[:1] in (["prefill"], ["decode"]) and row[1].isdigit()
    ]
    assert found == POINTS
    assert [row[0] for row in rows if row[:1] == ["load"]] == ["load"]
    assert "measured here: memory" in done.out
    assert "Traceback" not in done.err


@pytest.mark.parametrize("weights", [(), ("--random-weights",)])
def test_a_peer_is_timed_at_the_same_points(weights: tuple[str, ...]) -> None:
    done = invoke("bench", "tiny", "--against", "transformers", "--json", *weights, *QUICK)
    assert done.code == 0
    engines = json.loads(done.out)["engines"]
    assert [engine["engine"] for engine in engines] == ["native", "transformers"]
    assert [points(engine) for engine in engines] == [POINTS, POINTS]


def test_the_table_sets_a_peer_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = invoke("bench", "tiny", "--against", "transformers", *QUICK)
    assert done.code == 0
    assert "ratio" in done.out
    assert "transformers" in done.out
    assert "…" not in done.out
    assert done.err.count("transformers: decode at") == 4


@pytest.mark.parametrize(("own", "theirs"), [("int8", "llm-int8"), ("int4", "nf4")])
def test_a_peer_without_our_format_takes_the_nearest(own: str, theirs: str) -> None:
    done = invoke(
        "bench", "tiny", "--json", "--against", "transformers", "--format", own, *SIZES[:2],
        "--contexts", "16", "--context", "64",
    )  # fmt: skip
    assert [engine["format"] for engine in json.loads(done.out)["engines"]] == [own, theirs]


def test_a_model_of_the_catalog_is_timed_with_weights_that_are_made_up() -> None:
    done = invoke(
        "bench", "smollm2-135m", "--json", "--format", "bf16", "--requests", "1",
        "--contexts", "8", "--context", "48",
    )  # fmt: skip
    assert done.code == 0
    [engine] = json.loads(done.out)["engines"]
    assert points(engine) == [("prefill", 1, 8), ("decode", 1, 8)]


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--requests", "0"), "requests '0' is no whole number from 1"),
        (("--requests", "1,-2"), "requests '-2' is no whole number"),
        (("--requests", "1.5"), "requests '1.5'"),
        (("--requests", "²"), "requests '²'"),
        (("--requests", str(MAX_REQUESTS + 1)), f"from 1 to {MAX_REQUESTS}"),
        (("--requests", "0" * 8 + "19999"), "is no whole number from 1"),
        (("--requests", "9" * 5000), "is no whole number from 1"),
        (("--requests", ""), "requests '' lists 0 values, not 1 to 32"),
        (("--requests", ","), "lists 0 values"),
        (("--requests", ",".join(["1"] * 33)), "lists 33 values"),
        (("--contexts", "0"), "contexts '0'"),
        (("--contexts", "2k,x"), "contexts 'x' is not a token count"),
        (("--contexts", " , "), "lists 0 values"),
        (("--against", "vllm"), "nothing to compare with is called 'vllm': use transformers"),
        (("--against", ""), "nothing to compare with is called ''"),
        (("--against", "native"), "'native': use transformers"),
        (("--against", "transformers", "--engine", "transformers"), "leave --against out"),
        (("--against", "transformers", "--format", "fp32"), "no format to compare fp32 with: use"),
        (("--against", "transformers", "--format", "nf4"), "add --engine native"),
        (("--context", "32"), "use --context 64"),
        (("--format", "llm-int8", "--engine", "native"), "use --engine transformers"),
        (("--context", "99999"), "1,024"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_one_line_and_nothing_is_started(
    arguments: tuple[str, ...], named: str
) -> None:
    assert named in invoke("bench", "tiny", *arguments).error


@pytest.mark.usefixtures("runs_nothing")
def test_what_does_not_fit_is_exit_code_3() -> None:
    done = invoke("bench", "tiny", "--cap", "1MiB", *QUICK)
    assert (done.code, done.out) == (3, "")


def test_without_the_run_extra_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "find_spec", lambda name: None if name == "torch" else object())
    assert "pip install 'oomproof[run]'" in invoke("bench", "tiny").error
    with pytest.raises(MissingDependencyError, match="torch is not installed"):
        session.bench("tiny")


# --- --tune


KEY = ProductKey(
    processors=132, scales="uint8", normed=True, template=2, columns=4096, tiles=384, unit=1
)
RULE = TimedLaunch(warps=12, splits=1, us=5.0)
TUNINGS = (
    ProductTiming(
        name="qkv",
        tokens=2,
        key=KEY,
        default=RULE,
        best=TimedLaunch(warps=16, splits=1, us=4.5),
        candidates=3,
    ),
    ProductTiming(name="down", tokens=1, key=KEY, default=RULE, best=RULE, candidates=17),
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes tuning find TUNINGS, and notes what it is asked for."""
    calls: list[dict[str, Any]] = []

    def tune(model: str, *, told: Any, **options: Any) -> TuningReport:
        calls.append({"model": model, **options})
        for timing in TUNINGS:
            told("NVIDIA H200", timing)
        device = DeviceTuning(device="NVIDIA H200", file="/home/[me]/tuned.json", timings=TUNINGS)
        return TuningReport(model=model, format="nf4-dq", devices=(device,))

    monkeypatch.setattr(session, "tune_kernels", tune)
    return calls


def test_tuning_prints_what_it_found_and_where_it_is(asked: list[dict[str, Any]]) -> None:
    done = invoke("bench", "tiny", "--tune", "--requests", "2", "--cap", "8GiB")
    assert done.code == 0
    [call] = asked
    assert (call["model"], call["requests"]) == ("tiny", [2])
    assert call["cap"] is not None
    rows = [line.split() for line in done.out.splitlines()]
    assert ["qkv", "2", "3", "12", "×", "1", "5.00", "16", "×", "1", "4.50", "10.0%"] in rows
    assert ["down", "1", "17", "12", "×", "1", "5.00"] in rows
    assert "kept in /home/[me]/tuned.json" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert done.err.splitlines() == [
        "NVIDIA H200: qkv of 2 requests: 4.50 µs with 16 warps and 1 split, 5.00 by rule",
        "NVIDIA H200: down of 1 request: 5.00 µs by rule, the fastest of 17",
    ]


@pytest.mark.usefixtures("asked")
def test_tuning_as_json_holds_every_measurement() -> None:
    done = invoke("bench", "tiny", "--tune", "--json")
    report = json.loads(done.out)
    assert report["format"] == "nf4-dq"
    [device] = report["devices"]
    assert (device["device"], device["file"]) == ("NVIDIA H200", "/home/[me]/tuned.json")
    assert [timing["name"] for timing in device["timings"]] == ["qkv", "down"]
    assert device["timings"][0]["best"] == {"warps": 16, "splits": 1, "us": 4.5}
    assert device["timings"][0]["gain"] == pytest.approx(0.1)
    assert device["timings"][1]["gain"] == 0


@pytest.mark.usefixtures("runs_nothing")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "planned for a processor: run it where such a GPU is"),
        (("--format", "nf4"), "planned for a processor"),
        (("--format", "nf4-dq", "--engine", "native"), "planned for a processor"),
        (("--against", "transformers"), "leave --against out, or --tune"),
        (("--requests", "0"), "requests '0' is no whole number from 1"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments: tuple[str, ...], named: str) -> None:
    assert named in invoke("bench", "tiny", "--tune", *arguments).error


def test_tuning_what_does_not_fit_is_exit_code_3() -> None:
    assert invoke("bench", "tiny", "--tune", "--cap", "1MiB").code == 3
