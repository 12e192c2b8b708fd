"""Adapter folders: peft reads ours, we read peft's, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oomproof.errors import InputError
from oomproof.models.adapter import CONFIG_FILE, WEIGHTS_FILE
from oomproof.models.resolve import bundled_folder
from oomproof.tuning.model import LoraSettings
from tests.compat.checkpoints import edit_json
from tests.tuning.models import LORA, ours, theirs, tokens_of

TINY = bundled_folder()


def test_peft_reads_our_folder(tmp_path: Path) -> None:
    model = ours(TINY)
    peft = theirs(model, TINY, tmp_path)
    own = {name: value.detach() for name, value in model.named_parameters()}
    read = {
        name.replace(".default", ""): value.detach()
        for name, value in peft.named_parameters()
        if "lora_" in name
    }
    assert own.keys() == read.keys()
    assert all(torch.equal(own[name], read[name]) for name in own)


def test_we_read_pefts_folder(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=list(LORA.target_modules), task_type="CAUSAL_LM"
    )
    peft: Any = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    peft.save_pretrained(tmp_path)
    model = ours(TINY, format="bf16")
    ids = tokens_of(model.spec, 1, 30)
    expected = peft(input_ids=ids, labels=ids).loss
    assert float(model(ids, ids).loss.detach()) != pytest.approx(float(expected.detach()), rel=1e-5)
    model.load_adapter(tmp_path)
    assert float(model(ids, ids).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_our_folder_is_read_back(tmp_path: Path) -> None:
    one, other = ours(TINY, seed=1), ours(TINY, seed=2)
    folder = tmp_path / "new" / "folder"
    one.save_adapter(folder)
    other.load_adapter(folder)
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
    assert sorted(path.name for path in folder.iterdir()) == [
        CONFIG_FILE,
        WEIGHTS_FILE,
    ]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"r": 5}, r"is \[4, 256\]; with rank 5"),
        ({"lora_alpha": 3}, "scale 0.75 .* not 4 and 4: train on with"),
        ({"target_modules": ["q_proj"]}, "k_proj, which adapter_config.json does not target"),
        ({"use_dora": True}, "'use_dora': True"),
        ({"use_rslora": True}, "scale 8 .* not 4 and 4"),
        ({"bias": "all"}, "'bias': 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "with rank 8"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": "4"}, "'r': '4' is not a whole number"),
        ({"lora_alpha": None}, "'lora_alpha': is missing"),
    ],
)
def test_another_adapter_is_refused(fields: dict[str, object], match: str, tmp_path: Path) -> None:
    model = ours(TINY)
    model.save_adapter(tmp_path)
    edit_json(tmp_path / CONFIG_FILE, **fields)
    with pytest.raises(InputError, match=match):
        model.load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (LoraSettings(rank=2, alpha=8.0, target_modules=LORA.target_modules), "has rank 2 and"),
        (
            LoraSettings(rank=4, alpha=16.0, target_modules=("q_proj",)),
            "has 10 tensors of modules q_proj, not 70 of",
        ),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    settings: LoraSettings, match: str, tmp_path: Path
) -> None:
    ours(TINY, settings).save_adapter(tmp_path)
    with pytest.raises(InputError, match=match):
        ours(TINY).load_adapter(tmp_path)


def test_targets_that_a_pattern_names_are_those_that_the_file_has(tmp_path: Path) -> None:
    model = ours(TINY)
    model.save_adapter(tmp_path)
    edit_json(tmp_path / CONFIG_FILE, target_modules="all-linear")
    model.load_adapter(tmp_path)


def test_damaged_weights_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = ours(TINY)
    model.save_adapter(tmp_path)
    good = load_file(tmp_path / WEIGHTS_FILE)
    before = [one.detach().clone() for one in model.parameters()]
    first = next(iter(good))
    damages: list[tuple[dict[str, torch.Tensor], str]] = [
        (
            {name: one for name, one in good.items() if name != first},
            f"tensor '{first}' is missing",
        ),
        ({**good, "other": torch.zeros(1)}, "tensor 'other' is no lora_A or lora_B"),
        ({**good, first: good[first][:1].clone()}, "with rank 4 of"),
        ({**good, first: good[first].to(torch.int32)}, "holds int32"),
        ({**good, first: torch.full_like(good[first], float("nan"))}, "not finite"),
    ]
    for tensors, match in damages:
        save_file(tensors, tmp_path / WEIGHTS_FILE)
        with pytest.raises(InputError, match=match):
            model.load_adapter(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"x" * 40)
    with pytest.raises(InputError, match="is it a safetensors file"):
        model.load_adapter(tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(InputError, match=f"has no {CONFIG_FILE}"):
        model.load_adapter(tmp_path)
    assert all(map(torch.equal, before, model.parameters()))


def test_what_is_written_says_what_peft_needs(tmp_path: Path) -> None:
    ours(TINY, LoraSettings(rank=2, alpha=3.0, target_modules=("q_proj",))).save_adapter(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 3.0, ["q_proj"])
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
