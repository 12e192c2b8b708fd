"""Random checkpoints at true shapes: folders that plan and load like what they are named after."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tools.make_checkpoint import STANDARD_DEVIATION, main, make_checkpoint

from oomproof.compat.model import load_model
from oomproof.errors import InputError
from oomproof.models.resolve import resolve
from oomproof.session import load, plan

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 3,
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


@pytest.mark.parametrize("like", ["llama-3.1-8b", "llama-3.2-1b", "qwen2.5-7b", "qwen3-8b"])
def test_a_folder_loads_and_answers_like_what_it_is_named_after(like: str, tmp_path: Path) -> None:
    spec = make_checkpoint(like, tmp_path, layers=2, overrides=SMALL)
    assert resolve(str(tmp_path)).fingerprint == spec.fingerprint
    with load(tmp_path, format="bf16") as model:
        assert model.plan.num_parameters == spec.num_parameters
        stream = model.stream("hello", raw=True, max_new_tokens=4, seed=0)
        list(stream)
        assert stream.finish_reason in ("length", "stop")


def test_weights_are_small_normal_numbers_and_norms_are_one(tmp_path: Path) -> None:
    spec = make_checkpoint("llama-3.1-8b", tmp_path, layers=2, overrides=SMALL)
    tensors = tensors_of(tmp_path)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        tensor.name: tensor.shape for tensor in spec.tensors
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["model.norm.weight"], torch.ones(64, dtype=torch.bfloat16))
    embedding = tensors["model.embed_tokens.weight"].float()
    assert embedding.std().item() == pytest.approx(STANDARD_DEVIATION, rel=0.02)
    assert abs(embedding.mean().item()) < 1e-3


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_checkpoint("llama-3.1-8b", tmp_path / name, layers=1, seed=seed, overrides=SMALL)
    files = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_shards_keep_their_bound_and_the_index_names_them_all(tmp_path: Path) -> None:
    bound = 100_000
    spec = make_checkpoint("llama-3.1-8b", tmp_path, layers=3, shard_bytes=bound, overrides=SMALL)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        held = load_file(shard)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= bound
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * spec.num_parameters
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    made = plan(tmp_path, format="nf4", engine="transformers")
    load_model(made, resolve(str(tmp_path)), tmp_path)


def test_all_layers_are_written_where_none_are_named(tmp_path: Path) -> None:
    spec = make_checkpoint("llama-3.2-1b", tmp_path, overrides=SMALL)
    assert spec.num_hidden_layers == 16


@pytest.mark.parametrize("layers", [0, -1, 10**9])
def test_a_number_of_layers_that_no_model_has_is_refused_and_nothing_written(
    layers: int, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="num_hidden_layers"):
        make_checkpoint("llama-3.1-8b", tmp_path / "out", layers=layers)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_not_in_the_catalog_is_refused_with_those_close_to_it(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=r"lama-3\.1-8b.*did you mean llama-3\.1-8b"):
        make_checkpoint("lama-3.1-8b", tmp_path)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only plain decoders"):
        make_checkpoint("mixtral-8x7b", tmp_path)


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", *arguments])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return None


def test_the_command_line_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    said = _run(monkeypatch, out, "--like", "nothing-of-the-kind")
    assert str(said).startswith("error: 'nothing-of-the-kind' is not in the catalog")
    assert not str(said).endswith(": ")
    said = _run(monkeypatch, out, "--like", "llama-3.1-8b", "--shard-size", "large")
    assert str(said).startswith("error: shard-size 'large' is not a size")
