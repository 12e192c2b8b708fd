"""A merged folder is what peft makes of base and adapter, bit for bit, and never half there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import oomproof
from oomproof.conversion.manifest import verify
from oomproof.errors import CheckpointError, InputError
from oomproof.models.adapter import CONFIG_FILE, WEIGHTS_FILE
from oomproof.models.resolve import bundled_folder


def make_adapter(folder: Path, **options: Any) -> Path:
    """An adapter of peft's on the bundled model, with values that are not nothing."""
    base = AutoModelForCausalLM.from_pretrained(bundled_folder())
    wanted: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**{**wanted, **options}))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"))


def merge(adapter: Path, out: Path, model: str | Path = "tiny", **options: Any) -> Any:
    return oomproof.merge(model, adapter, out, **{"device": "cpu", **options})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"target_modules": "all-linear"},
    ],
)
def test_weights_are_those_of_peft_in_float32_rounded_once(
    options: dict[str, Any], tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", **options)
    report = merge(adapter, tmp_path / "out", shard="2MiB")
    base = AutoModelForCausalLM.from_pretrained(bundled_folder(), dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    found = weights_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name].to(torch.bfloat16)), name
    assert report.files == len(list((tmp_path / "out").iterdir()))
    assert verify(tmp_path / "out") is not None


def test_the_merged_folder_loads_and_is_planned_as_any(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "out")
    assert oomproof.plan(tmp_path / "out", gpus="cpu").fits
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_a_run_that_was_ended_goes_on_with_the_shards_it_has(adapter: Path, tmp_path: Path) -> None:
    from oomproof.conversion import writing as module

    whole, calls = module._write_shard, 0

    def fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    with patch.object(module, "_write_shard", fails), pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "out", shard="1MiB")
    assert not (tmp_path / "out").exists()
    assert merge(adapter, tmp_path / "out", shard="1MiB").resumed_files == 2
    merge(adapter, tmp_path / "other", shard="1MiB")
    for file in (tmp_path / "other").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    again = merge(adapter, tmp_path / "out", shard="1MiB")
    assert again.resumed_files == len(list((tmp_path / "out").glob("*.safetensors")))


def test_a_folder_that_holds_another_merge_is_refused_and_told(
    adapter: Path, tmp_path: Path
) -> None:
    merge(adapter, tmp_path / "out")
    with pytest.raises(InputError, match="holds tiny with an adapter merged, in bfloat16"):
        merge(adapter, tmp_path / "out", dtype="float16")


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **fields}), encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"peft_type": "IA3"},
            "'peft_type': 'IA3' is not 'LORA': merge it into its base model with peft",
        ),
        ({"use_dora": True}, "'use_dora': True asks for weight-decomposed adapters"),
        ({"bias": "all"}, "'bias': 'all' is not 'none'"),
        (
            {"modules_to_save": ["lm_head"]},
            r"'modules_to_save': .* asks for whole modules beside the adapter",
        ),
        ({"r": 8}, r"is \[4, 256\]; with rank 8 of adapter_config.json"),
        ({"lora_alpha": "much"}, "'lora_alpha': 'much' is not a number"),
    ],
)
def test_adapters_that_are_not_merged_are_refused(
    fields: dict[str, Any], message: str, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change_config(folder, **fields)
    with pytest.raises(InputError, match=message):
        merge(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_adapters_are_refused(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS_FILE)
    name = next(iter(tensors))
    for changed, message in (
        ({**tensors, name: tensors[name] * float("nan")}, "holds a value that is not finite"),
        ({k: v for k, v in tensors.items() if k != name}, f"tensor '{name}' is missing"),
        (
            {**tensors, "x": torch.zeros(2, 2)},
            "tensor 'x' is no lora_A or lora_B of a linear layer",
        ),
        ({}, "holds no tensors"),
    ):
        save_file(changed, folder / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match=message):
            merge(folder, tmp_path / "out")
    (folder / WEIGHTS_FILE).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is truncated"):
        merge(folder, tmp_path / "out")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(InputError, match=f"has no {WEIGHTS_FILE}"):
        merge(folder, tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({k.replace("q_proj", "z_proj"): v for k, v in tensors.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(InputError, match="belongs to no linear layer of the model's decoder"):
        merge(folder, tmp_path / "out")


def test_a_quantized_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    oomproof.quantize("tiny", tmp_path / "base", device="cpu")
    with pytest.raises(InputError, match=r"is quantized .*: merge into the 16-bit checkpoint"):
        merge(adapter, tmp_path / "out", tmp_path / "base")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", lora_alpha=10**6)
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({name: 1000 * value for name, value in tensors.items()}, adapter / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="beyond float16: use --dtype bfloat16"):
        merge(adapter, tmp_path / "out", dtype="fp16")
