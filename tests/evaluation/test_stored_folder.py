"""Folders in 4 bits beside the model that they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oomproof
from oomproof.errors import CheckpointError, InputError
from oomproof.evaluation.report import EvalReport
from tests.compat.checkpoints import copy_of_tiny, random_checkpoint
from tests.conversion.jobs import quantized

WORDS = "It was a dark night, and the rain fell upon the sea. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "words.txt"
    path.write_text(WORDS * 20)
    return path


def evaluated(model: str | Path, text: Path, formats: list[str], **options: Any) -> EvalReport:
    return oomproof.evaluate(
        model, text, formats=formats, **{"context": 64, "tokens": 128, **options}
    )


@pytest.mark.parametrize("name", ["nf4", "nf4-dq+search", "fp4-dq"])
def test_a_folder_diverges_as_the_format_it_was_written_in(
    tmp_path: Path, text: Path, name: str
) -> None:
    plain, _, search = name.partition("+")
    folder = quantized(tmp_path / "out", format=plain, search=bool(search))
    own, of_folder = evaluated("tiny", text, [name, str(folder)]).formats
    assert of_folder.format == "out/"
    for field in ("kl", "perplexity", "agreement", "layers", "weight_bytes", "bits_per_weight"):
        assert getattr(of_folder, field) == getattr(own, field)


def test_its_codes_and_all_else_are_read_and_not_made_again(tmp_path: Path, text: Path) -> None:
    folder = quantized(tmp_path / "out")
    (file,) = folder.glob("*.safetensors")

    def kl_with(name: str, edit: Any) -> float:
        tensors = load_file(file)
        before = tensors[name].clone()
        edit(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})
        (folder / "oomproof.json").unlink(missing_ok=True)
        (found,) = evaluated("tiny", text, [str(folder)]).formats
        tensors[name] = before
        save_file(tensors, file, metadata={"format": "pt"})
        return found.kl.value

    kl = kl_with("model.norm.weight", lambda _: None)
    assert kl_with("model.layers.2.mlp.up_proj.weight", lambda one: one.fill_(0x77)) > kl
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert kl_with(name, lambda one: one[::2].mul_(1.5)) > kl


def test_a_tied_model_in_other_16_bits_is_read_too(tmp_path: Path, text: Path) -> None:
    model = random_checkpoint(tmp_path / "model", "llama, tied", std=0.05)
    folder = quantized(tmp_path / "out", model, dtype="fp16", search=False)
    options = {"compute_dtype": "float32"}
    own, of_folder = evaluated(model, text, ["nf4-dq", str(folder)], **options).formats
    assert of_folder.kl.value == pytest.approx(own.kl.value, rel=0.02)


def test_several_folders_stand_side_by_side(tmp_path: Path, text: Path) -> None:
    folders = [quantized(tmp_path / n / "out", format=n, search=False) for n in ("nf4", "fp4")]
    report = evaluated("tiny", text, ["nf4", *map(str, folders), "fp4"])
    nf4, first, second, fp4 = report.formats
    assert (first.format, second.format) == tuple(map(str, folders))
    assert (first.kl, second.kl) == (nf4.kl, fp4.kl)


def test_a_folder_of_another_model_or_in_16_bits_is_refused(tmp_path: Path, text: Path) -> None:
    other = quantized(tmp_path / "other", random_checkpoint(tmp_path / "model"))
    with pytest.raises(InputError, match="is no checkpoint of tiny: parameter"):
        evaluated("tiny", text, [str(other)])
    same = copy_of_tiny(tmp_path / "same")
    with pytest.raises(InputError, match="is not quantized: there are no codes to compare"):
        evaluated("tiny", text, [str(same)])


def test_damaged_codes_are_refused(tmp_path: Path, text: Path) -> None:
    folder = quantized(tmp_path / "out")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight.nested_absmax"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        evaluated("tiny", text, [str(folder)])
