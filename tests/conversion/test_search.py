"""Searched block scales, the default: what they change in the files, and what they must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from oomproof.conversion.layout import searches
from oomproof.conversion.manifest import read_manifest
from oomproof.conversion.quantize import prepare
from oomproof.conversion.work import work_folder_of
from oomproof.errors import InputError
from oomproof.models.resolve import resolve
from oomproof.quantization.handlers import handler
from oomproof.session import quantize
from oomproof.units import MIB
from tests.compat.checkpoints import random_checkpoint
from tests.conversion.jobs import (
    BLOCK_SCALES,
    FORMATS,
    SOURCE,
    as_theirs,
    files_of,
    quantized,
    tensors_of,
)
from tests.conversion.test_resume import interrupt_after

SUFFIX = "_proj.weight"


@pytest.mark.parametrize("search", [None, True, False])
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_part_is_what_its_handler_makes_of_the_whole_weight(
    format_name: str, search: bool | None, tmp_path: Path
) -> None:
    found = tensors_of(quantized(tmp_path / "out", format=format_name, search=search))
    held = handler(format_name, search=search is not False)
    seen = 0
    for name, weight in tensors_of(SOURCE).items():
        if not name.endswith(SUFFIX):
            assert torch.equal(found[name], weight)
            continue
        for part, values in held.encode(weight).items():
            if part != "nested_offset":
                own = found[name if part == "weight" else f"{name}.{part}"]
                assert torch.equal(own.view(-1), values.view(-1)), (name, part)
                seen += 1
    assert seen == 35 * (5 if format_name.endswith("-dq") else 3)


def test_weights_that_come_in_many_slices_are_searched_as_whole_ones(tmp_path: Path) -> None:
    source = random_checkpoint(
        tmp_path / "source",
        hidden_size=320,
        intermediate_size=8200,
        num_hidden_layers=1,
        num_attention_heads=5,
        num_key_value_heads=5,
    )
    found = tensors_of(quantized(tmp_path / "out", source, format="nf4-dq"))
    for name, weight in tensors_of(source).items():
        if name.endswith(SUFFIX):
            parts = handler("nf4-dq", search=True).encode(weight)
            assert torch.equal(found[name].view(-1), parts["weight"].view(-1)), name
            assert torch.equal(found[f"{name}.absmax"], parts["absmax"]), name


@pytest.mark.parametrize("format_name", FORMATS)
def test_searched_weights_are_nearer_to_their_source_in_the_same_bytes(
    format_name: str, tmp_path: Path
) -> None:
    searched = quantized(tmp_path / "searched", format=format_name)
    plain = as_theirs(tmp_path / "plain", format=format_name)
    sizes = [{name: len(raw) for name, raw in files_of(one).items()} for one in (searched, plain)]
    assert sizes[0]["model.safetensors"] == sizes[1]["model.safetensors"]
    errors = []
    for search in (True, False):
        held = handler(format_name, search=search)
        errors.append(
            sum(
                float((held.decode(held.encode(weight), shape, weight.dtype) - weight).norm()) ** 2
                for name, weight in tensors_of(SOURCE).items()
                if name.endswith(SUFFIX) and (shape := (weight.shape[0], weight.shape[1]))
            )
        )
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize(("search", "word"), [(None, "searched"), (False, "absmax")])
def test_the_choice_is_in_manifest_and_config(
    search: bool | None, word: str, tmp_path: Path
) -> None:
    out = quantized(tmp_path / "out", search=search)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.made_from["block_scales"] == word
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"][BLOCK_SCALES] == word


def test_another_choice_is_another_job_and_takes_up_nothing(tmp_path: Path) -> None:
    expected = files_of(as_theirs(tmp_path / "expected", shard=MIB))
    out = tmp_path / "out"
    with interrupt_after(2), pytest.raises(KeyboardInterrupt):
        quantize("tiny", out, device="cpu", shard=MIB)
    assert work_folder_of(out).is_dir()
    report = quantize("tiny", out, device="cpu", shard=MIB, search=False)
    assert (report.resumed_files, report.block_scales) == (0, "absmax")
    assert files_of(out) == expected
    with pytest.raises(InputError, match="holds tiny in nf4-dq and bfloat16, block scales absmax"):
        quantize("tiny", out, device="cpu", shard=MIB)


def test_asking_for_the_default_is_the_same_job(tmp_path: Path) -> None:
    jobs = [
        prepare(resolve("tiny"), tmp_path / "out", format_name="nf4", device="cpu", search=search)
        for search in (None, True, False)
    ]
    assert jobs[0].job == jobs[1].job != jobs[2].job


def test_a_format_without_scales_to_search_is_refused_only_where_it_is_asked_for() -> None:
    assert not searches("fp8", None)
    assert not searches("fp8", False)
    assert searches("nf4", None)
    with pytest.raises(InputError, match="fp8 has no block scales to search: leave --search out"):
        searches("fp8", True)
