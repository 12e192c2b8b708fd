"""Loading: exactly what the files hold, as the plan says, or one error that names the fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oomproof.compat.model import _device_finder, load_model
from oomproof.compat.verify import verify_parameters
from oomproof.errors import CheckpointError, LoadError, OomproofError
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.session import load, plan
from tests.compat.checkpoints import (
    FAMILIES,
    Tensors,
    copy_of_tiny,
    edit_json,
    edit_tensors,
    random_checkpoint,
)

NORM = "model.layers.0.input_layernorm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def load_folder(
    folder: Path, weight_format: str = "bf16", between: Callable[[Path], object] | None = None
) -> Any:
    """Plans and loads a folder; `between` may change it after its headers were read."""
    made, spec = plan(folder, engine="transformers", format=weight_format), resolve(str(folder))
    if between is not None:
        between(folder)
    return load_model(made, spec, folder)


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = value

    return edit


@pytest.mark.parametrize("weight_format", ["bf16", "fp16", "nf4", "nf4-dq", "fp4", "llm-int8"])
def test_the_bundled_model_is_loaded_as_planned_in_each_format(weight_format: str) -> None:
    made, spec = plan("tiny", engine="transformers", format=weight_format), resolve("tiny")
    progress: list[tuple[int, int]] = []
    model = load_model(
        made, spec, bundled_folder(), progress=lambda done, total: progress.append((done, total))
    )
    verify_parameters(model, made, spec)
    assert spec.checkpoint is not None
    assert progress[-1] == (sum(t.size_bytes for t in spec.checkpoint.tensors),) * 2
    assert not model.training
    assert model.config.name_or_path == str(bundled_folder())
    assert model.generation_config.temperature == 0.8


def test_what_is_not_quantized_holds_the_very_bits_of_the_files() -> None:
    files = load_file(bundled_folder() / "model.safetensors")
    parameters = dict(load_folder(bundled_folder(), "nf4").named_parameters())
    assert parameters.keys() == files.keys()
    kept = [name for name, parameter in parameters.items() if parameter.dtype is torch.bfloat16]
    assert "lm_head.weight" in kept
    assert "model.embed_tokens.weight" in kept
    assert all(torch.equal(parameters[name], files[name]) for name in kept)
    parameters = dict(load_folder(bundled_folder(), "bf16").named_parameters())
    assert all(torch.equal(parameters[name], files[name]) for name in files)


@pytest.mark.parametrize("weight_format", ["nf4", "fp4", "nf4-dq", "fp4-dq"])
def test_4_bit_weights_are_those_that_bitsandbytes_makes(weight_format: str) -> None:
    import bitsandbytes.functional as bnb

    name = "model.layers.3.self_attn.q_proj.weight"
    source = load_file(bundled_folder() / "model.safetensors")[name]
    codes, state = bnb.quantize_4bit(
        source,
        quant_type=weight_format.removesuffix("-dq"),
        compress_statistics=weight_format.endswith("-dq"),
        quant_storage=torch.uint8,
    )
    found = load_folder(bundled_folder(), weight_format).get_parameter(name)
    assert torch.equal(found.data.reshape(-1), codes.reshape(-1))
    assert torch.equal(found.quant_state.absmax, state.absmax)
    assert torch.equal(found.quant_state.code, state.code)
    if weight_format.endswith("-dq"):
        assert torch.equal(found.quant_state.state2.absmax, state.state2.absmax)
        assert found.quant_state.offset == state.offset


@pytest.mark.parametrize("weight_format", ["bf16", "nf4-dq", "llm-int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_loaded_as_planned(family: str, weight_format: str, tmp_path: Path) -> None:
    load_folder(random_checkpoint(tmp_path, family), weight_format)


@pytest.mark.parametrize("weight_format", ["bf16", "nf4"])
def test_weights_of_any_float_type_end_in_the_planned_one(
    weight_format: str, tmp_path: Path
) -> None:
    def widen(tensors: Tensors) -> None:
        for number, name in enumerate(tensors):
            tensors[name] = tensors[name].to((torch.float32, torch.float16)[number % 2])

    load_folder(random_checkpoint(tmp_path, edit=widen), weight_format)


def test_frequencies_that_old_checkpoints_carry_are_left_out(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_folder(random_checkpoint(tmp_path, edit=put(name, torch.ones(8))))


@pytest.mark.parametrize("weight_format", ["bf16", "nf4-dq"])
def test_a_tied_head_that_the_files_hold_too_is_one_tensor_in_memory(
    weight_format: str, tmp_path: Path
) -> None:
    def repeat(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = load_folder(random_checkpoint(tmp_path, "llama, tied", repeat), weight_format)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_contradicts_its_tied_embedding_is_the_checkpoints_fault(
    tmp_path: Path,
) -> None:
    def differ(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(OomproofError) as refused:
        load_folder(random_checkpoint(tmp_path, "llama, tied", differ))
    assert "bug in oomproof" not in str(refused.value)


def test_a_tensor_that_the_model_has_no_place_for_is_named(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, edit=put("model.layers.7.x.weight", torch.ones(2)))
    with pytest.raises(LoadError, match=r"1 unexpected parameters: model\.layers\.7\.x\.weight"):
        load_folder(folder)


def test_many_strange_tensors_are_counted_and_three_are_named(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors |= {f"strange.{i}": torch.ones(2) for i in range(9)}

    with pytest.raises(LoadError, match=r"9 unexpected .*strange\.0, strange\.1, strange\.2 and 6"):
        load_folder(random_checkpoint(tmp_path, edit=add))


@pytest.mark.parametrize("weight_format", ["bf16", "nf4"])
@pytest.mark.parametrize(
    "damage",
    {
        "router missing": drop("model.layers.1.block_sparse_moe.gate.weight"),
        "norm missing": drop("model.norm.weight"),
        "norm mis-shaped": put(NORM, torch.ones(8)),
        "expert missing": drop(EXPERT),
        "expert mis-shaped": put(EXPERT, torch.ones(8, 8)),
        "expert too many": put(EXPERT.replace(".2.", ".4."), torch.ones(128, 64)),
    }.items(),
    ids=lambda item: item[0] if isinstance(item, tuple) else item,
)
def test_a_mixture_whose_files_lack_or_misshape_a_tensor_is_refused(
    damage: tuple[str, Callable[[Tensors], object]], weight_format: str, tmp_path: Path
) -> None:
    """Experts are published under other names than they have in memory: only loading can tell."""
    folder = random_checkpoint(tmp_path, "mixtral", damage[1])
    with pytest.raises(OomproofError) as refused:
        load_folder(folder, weight_format)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("weight_format", ["bf16", "nf4", "llm-int8"])
@pytest.mark.parametrize(("family", "name"), [("llama", NORM), ("llama", UP), ("mixtral", EXPERT)])
@pytest.mark.parametrize("layers", [3, 12])
def test_a_value_that_is_not_finite_is_found_among_few_and_many_tensors(
    layers: int, family: str, name: str, weight_format: str, tmp_path: Path
) -> None:
    def poison(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = float("nan")

    folder = random_checkpoint(tmp_path, family, poison, num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=f"'{name}' holds a value that is not finite"):
        load_folder(folder, weight_format)


@pytest.mark.parametrize("weight_format", ["bf16", "nf4", "llm-int8"])
def test_a_file_that_shrinks_between_plan_and_load_is_refused_by_name(
    weight_format: str, tmp_path: Path
) -> None:
    def truncate(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100_000])

    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside tensor 'model\."):
        load_folder(random_checkpoint(tmp_path), weight_format, truncate)


def test_a_checkpoint_of_integers_is_not_taken_for_weights(tmp_path: Path) -> None:
    def truncate(tensors: Tensors) -> None:
        tensors |= {name: tensor.to(torch.int8) for name, tensor in tensors.items()}

    folder = random_checkpoint(tmp_path)
    edit_tensors(folder, truncate)
    with pytest.raises(OomproofError):
        load_folder(folder)


def test_a_folder_without_weights_cannot_be_loaded(tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        load_folder(folder)


HOSTILE_CONFIGS: dict[str, dict[str, object]] = {
    "an unknown activation": {"hidden_act": "nope"},
    "an unknown rotary embedding": {
        "rope_parameters": {"rope_type": "nope", "rope_theta": 10_000.0}
    },
    "rotary parameters that are a text": {"rope_parameters": "abc"},
    "a rotary base that is a text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": "x"}
    },
    "an epsilon that is a text": {"rms_norm_eps": "x"},
    "padding outside the vocabulary": {"pad_token_id": 99_999},
    "an end token that is a text": {"eos_token_id": "x"},
    "no model type": {"model_type": None},
}


@pytest.mark.parametrize("fields", HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS)
def test_a_config_that_only_transformers_reads_to_the_end_is_refused_in_our_words(
    fields: dict[str, object], tmp_path: Path
) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    edit_json(folder / "config.json", **fields)
    with (
        pytest.raises(OomproofError) as refused,
        load(folder, engine="transformers", format="bf16") as model,
    ):
        model.generate("hello", max_new_tokens=1)
    assert "config.json" in str(refused.value)


HOSTILE_GENERATION: dict[str, dict[str, object]] = {
    "an unknown cache": {"cache_implementation": "nope"},
    "an answer of less than nothing": {"max_new_tokens": -5},
    "a length that is a text": {"max_new_tokens": "a"},
    "a watermark that is a number": {"watermarking_config": 5},
}


@pytest.mark.parametrize("fields", HOSTILE_GENERATION.values(), ids=HOSTILE_GENERATION)
def test_a_generation_config_that_transformers_refuses_is_refused_in_our_words(
    fields: dict[str, object], tmp_path: Path
) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    edit_json(folder / "generation_config.json", **fields)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_folder(folder)


def test_each_tensor_is_read_to_the_device_of_the_longest_module_that_holds_it() -> None:
    device_of = _device_finder(
        {"model.embed_tokens": 0, "model.layers.1": 1, "model.layers.10": 0, "lm_head": 1}
    )
    found = {
        name: device_of(name).index
        for name in (
            "model.embed_tokens.weight",
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.10.mlp.up_proj.weight",
            "lm_head.weight",
            "renamed.while.loading",
        )
    }
    assert list(found.values()) == [0, 1, 0, 1, 0]
    assert _device_finder({"": "cpu"})("anything.weight") == torch.device("cpu")
