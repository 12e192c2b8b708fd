"""`oomproof.evaluate` on the bundled model: figures that agree with each other, clear refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import oomproof
from oomproof import evaluating
from oomproof.errors import (
    InputError,
    LoadError,
    ModelNotFoundError,
    NotRunnableError,
    PlanDoesNotFitError,
)
from oomproof.evaluation.choosing import ask
from oomproof.evaluation.html import report_html
from oomproof.evaluation.report import EvalReport
from oomproof.hardware.describe import describe
from oomproof.hardware.probe import probe
from oomproof.models.resolve import resolve
from tests.compat.checkpoints import copy_of_tiny, edit_tensors

WORDS = (
    "It was a dark night, and the rain fell upon the sea. The captain stood at the wheel and "
    "spoke to no man, for there was none who would have heard him above the wind. "
)
QUICK: dict[str, Any] = {"context": 64, "tokens": 512}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "words.txt"
    path.write_text(WORDS * 40)
    return path


@pytest.fixture(scope="module")
def report(text: Path) -> EvalReport:
    return oomproof.evaluate("tiny", text, compute_dtype="float32", **QUICK)


def test_every_format_is_compared_and_the_better_ones_lose_less(report: EvalReport) -> None:
    names = [one.format for one in report.formats]
    assert names == ["int8", "fp8", "nf4", "nf4-dq", "nf4-g16", "fp4", "fp4-dq", "int4"]
    kl = {one.format: one.kl.value for one in report.formats}
    assert 0 < kl["int8"] < kl["fp8"] < kl["nf4"] < kl["int4"] < kl["fp4"]
    assert (report.windows, report.context, report.tokens) == (8, 64, 512)


def test_bits_and_bytes_are_the_plans(report: EvalReport) -> None:
    for one in (report.reference, *report.formats):
        name = "bf16" if one is report.reference else one.format
        planned = oomproof.plan("tiny", format=name, engine="native", gpus="1x24GiB")
        weights = planned.devices[0].terms.weights
        assert one.weight_bytes <= weights <= one.weight_bytes + 256 * 60 * 6
    bits = {one.format: one.bits_per_weight for one in report.formats}
    assert bits["int4"] == 4.25
    assert bits["nf4"] == pytest.approx(4.5, abs=0.02)


def test_figures_agree_with_each_other(report: EvalReport) -> None:
    for one in report.formats:
        added = one.bits_per_byte.value - report.reference.bits_per_byte.value
        assert one.added_bits_per_byte.value == pytest.approx(added, abs=1e-6)
        for figure in (one.kl, one.perplexity, one.agreement, one.bits_per_byte):
            assert figure.low <= figure.value <= figure.high
        tokens = sum(part.tokens for part in one.positions)
        assert tokens == report.tokens
        mean = sum(part.kl.value * part.tokens for part in one.positions) / tokens
        assert mean == pytest.approx(one.kl.value, rel=1e-5)
        assert len(one.layers) == 5
    assert report.reference.kl.value == 0
    assert report.reference.agreement.value == 1


def test_differences_are_paired_and_told_of_every_two_formats(report: EvalReport) -> None:
    kl = {one.format: one.kl for one in report.formats}
    count = len(report.formats)
    assert len(report.differences) == count * (count - 1) // 2
    for one in report.differences:
        assert one.kl.value == pytest.approx(kl[one.format].value - kl[one.other].value, abs=1e-6)
    (alike,) = (d for d in report.differences if (d.format, d.other) == ("nf4-dq", "nf4"))
    # The same codes under scales that are nearly the same.
    assert alike.kl.high - alike.kl.low < 0.2 * (kl["nf4"].high - kl["nf4"].low)


@pytest.fixture
def mixtures(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalReport:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    return oomproof.evaluate("tiny", text, formats="nf4-dq+search,fit:4MiB,fit", **QUICK)


def test_mixtures_and_searched_scales_are_told_like_formats(mixtures: EvalReport) -> None:
    searched, fit, whole = mixtures.formats
    assert [one.format for one in mixtures.formats] == ["nf4-dq+search", "fit:4MiB", "fit"]
    assert 0.95 * (4 << 20) < fit.weight_bytes <= 4 << 20
    assert searched.bits_per_weight < fit.bits_per_weight < whole.bits_per_weight == 16
    assert searched.kl.value > fit.kl.value > whole.kl.value == 0
    assert (searched.tensors, whole.tensors) == ({}, {"bf16": 35})
    assert sum(fit.tensors.values()) == 35
    html = report_html(mixtures)
    assert ">fit:4MiB<" in html
    assert f"fit:4MiB: 35 linears, {next(iter(fit.tensors.values()))} in" in html
    assert mixtures.histogram.formats == ()


def test_fit_is_what_a_plan_for_the_device_holds(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    options: dict[str, Any] = {"context": 64, "max_memory": {"cpu": "6GiB"}}
    plan = oomproof.plan("tiny", format="fit", engine="native", **options)
    (found,) = oomproof.evaluate("tiny", text, formats="fit", tokens=64, **options).formats
    assert set(found.tensors) == set(plan.tensor_formats.values())


def test_it_is_repeatable(text: Path) -> None:
    one, two = (oomproof.evaluate("tiny", text, formats="nf4", **QUICK) for _ in range(2))
    assert replace(one, seconds=0) == replace(two, seconds=0)


def test_the_report_is_json_and_one_html_file(report: EvalReport) -> None:
    parsed = json.loads(json.dumps(report.as_dict()))
    assert parsed["schema"] == 1
    assert [one["format"] for one in parsed["formats"]] == [one.format for one in report.formats]
    html = report_html(report)
    assert html.count("<svg") == html.count("</svg>") == 6
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    for one in report.formats:
        assert f">{one.format}<" in html
    for chart in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(chart)


def test_names_from_outside_are_escaped_in_html(report: EvalReport) -> None:
    html = report_html(replace(report, model="<script>alert(1)</script>", text="a&b<i>"))
    assert "<script>" not in html
    assert "a&amp;b&lt;i&gt;" in html


def test_a_report_of_one_format_one_window_and_no_levels_is_drawn(text: Path) -> None:
    found = oomproof.evaluate("tiny", text, formats=["int8"], context=2, tokens=2)
    assert found.histogram.formats == ()
    assert "<svg" in report_html(found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"formats": "nf5"}, "unknown format 'nf5'"),
        ({"formats": "llm-int8"}, "'llm-int8' is not one that is compared with bf16"),
        ({"formats": " , "}, "formats lists none"),
        ({"formats": "bf16"}, "bf16 is what formats are compared with"),
        ({"formats": "nf4+seek"}, r"unknown format 'nf4\+seek'"),
        ({"formats": "fit:1MiB"}, r"fit:1048576 is less than tiny takes in nf4-dq"),
        ({"calibration": "words.txt"}, "calibration is what fit weighs errors by"),
        ({"formats": "fit", "calibration": "none.txt"}, "'none.txt' cannot be read"),
        ({"tokens": 0}, "tokens 0 must be from 1"),
        ({"tokens": "many"}, "tokens 'many' is not a token count"),
        ({"context": 2048}, "context 2,048 is beyond what tiny was made for"),
        ({"context": 1}, "context 1 must be from 2"),
        ({"context": 1024}, "a window of 1,024 needs 1,024: use a longer text"),
        ({"context": 512, "tokens": 100}, "tokens 100 are less than a window of 512"),
        ({"compute_dtype": "int8"}, "unknown compute dtype 'int8'"),
        ({"reserve": "much"}, "reserve 'much' is not a size"),
    ],
)
def test_mistakes_are_refused(
    tmp_path: Path, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(WORDS)
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    monkeypatch.setattr("oomproof.evaluation.run.Walk.run", _fail)
    if "fit" in str(options.get("formats")):
        options = {"context": 16, **options}
    with pytest.raises(InputError, match=words):
        oomproof.evaluate("tiny", short, **options)


def _fail(_self: object) -> None:
    raise AssertionError("something was computed")


def test_files_and_models_that_are_not_there_are_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        oomproof.evaluate("tiny", tmp_path / "none.txt")
    with pytest.raises(ModelNotFoundError):
        oomproof.evaluate(str(tmp_path / "none"), text)


def test_too_little_memory_is_refused_with_how_much_text_there_is_room_for(text: Path) -> None:
    with pytest.raises(PlanDoesNotFitError, match=r"evaluating needs .* fewer --formats"):
        oomproof.evaluate("tiny", text, max_memory={"cpu": "64MiB"}, **QUICK)


def test_fp8_is_refused_where_a_gpu_lacks_it_and_left_out_unless_asked_for(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = replace(describe("1x A100-80GB"), source="probed")
    monkeypatch.setattr(evaluating, "probe", lambda: replace(old, host=probe().host))
    with pytest.raises(NotRunnableError, match=r"fp8 needs compute capability 8\.9, .* has 8\.0"):
        oomproof.evaluate("tiny", text, formats="nf4,fp8", **QUICK)
    asked = ask(None, "bf16", resolve("tiny"), old.devices[0])
    assert "fp8" not in [one.name for one in asked]


def test_a_family_without_our_decoder_is_refused(text: Path) -> None:
    with pytest.raises(NotRunnableError, match="cannot be evaluated: the native engine"):
        oomproof.evaluate("gemma-2-9b", text, **QUICK)


def test_logits_that_float16_cannot_hold_are_refused(text: Path, tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "tiny")
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].mul_(1e5))
    options = QUICK | {"formats": "int8", "compute_dtype": "float16"}
    with pytest.raises(NotRunnableError, match=r"overflows in float16.*use --compute-dtype bf"):
        oomproof.evaluate(folder, text, **options)


def test_what_a_folder_in_4_bits_holds_beside_the_model_is_refused(
    text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "four"
    oomproof.quantize("tiny", folder, device="cpu")
    (folder / "oomproof-manifest.json").unlink()
    edit_tensors(folder, lambda tensors: tensors.update({"extra.weight": torch.zeros(3)}))
    with pytest.raises(LoadError, match=r"1 unexpected parameters: extra\.weight"):
        oomproof.evaluate("tiny", text, formats=[str(folder)], **QUICK)
