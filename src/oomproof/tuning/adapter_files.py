"""Adapters as peft's folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oomproof.errors import CheckpointError
from oomproof.models.headers import parse_json_object
from oomproof.tuning.settings import LoraSettings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MOST_CONFIG_BYTES = 1 << 20
_PLAIN = {
    # Field → the only value of it that is computed here, beside null and nothing.
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layer_replication": None,
    "trainable_token_indices": None,
}


def save(
    folder: Path, tensors: Mapping[str, torch.Tensor], settings: LoraSettings, base: str
) -> None:
    """Writes what peft's PeftModel.from_pretrained reads; each file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    part = folder / f"{WEIGHTS}.part"
    save_file(own, part, metadata={"format": "pt"})
    part.replace(folder / WEIGHTS)
    part = folder / f"{CONFIG}.part"
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / CONFIG)


def read_settings(folder: Path) -> LoraSettings:
    """The settings of an adapter folder.

    Raises:
        CheckpointError: No such file, or an adapter that is not computed here.
    """
    file = folder / CONFIG
    try:
        if file.stat().st_size > _MOST_CONFIG_BYTES:
            raise CheckpointError(str(file), f"is larger than {_MOST_CONFIG_BYTES:,} bytes")
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read ({error.strerror})") from None
    config = parse_json_object(raw, what="content", location=str(file))

    def refuse(field: str, remedy: str = "use it with peft") -> CheckpointError:
        return CheckpointError(
            str(file), f"{field} is {str(config.get(field))[:60]!r}", remedy=remedy
        )

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type")
    for field, only in _PLAIN.items():
        if config.get(field) not in (None, only):
            raise refuse(field)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    dropout, targets = config.get("lora_dropout", 0.0), config.get("target_modules")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise refuse("r")
    for field, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise refuse(field)
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise refuse("target_modules", "name the modules one by one")
    return LoraSettings(
        rank=rank,
        alpha=float(_number(alpha)),
        dropout=float(_number(dropout)),
        target_modules=tuple(sorted(targets)),
    )


def load(folder: Path, into: Mapping[str, torch.Tensor], settings: LoraSettings) -> None:
    """Reads an adapter into parameters: each of them, nothing else, in their shapes.

    Raises:
        CheckpointError: It is another adapter, damaged, or holds a value that is not finite.
    """
    found = read_settings(folder)
    file = folder / WEIGHTS
    same = (found.rank, found.alpha, set(found.target_modules)) == (
        settings.rank,
        settings.alpha,
        set(settings.target_modules),
    )
    if not same:
        raise CheckpointError(
            str(folder / CONFIG),
            f"has rank {found.rank}, alpha {found.alpha:g} and modules "
            f"{', '.join(found.target_modules)}, not {settings.rank}, {settings.alpha:g} and "
            f"{', '.join(sorted(settings.target_modules))}",
            remedy="train on with the settings that it was made with",
        )
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            _refuse_names(file, names, set(into))
            values = {name: opened.get_tensor(name) for name in into}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(file), f"cannot be read ({error})") from None
    for name, tensor in into.items():
        value = values[name]
        if value.shape != tensor.shape or not value.is_floating_point():
            raise CheckpointError(
                str(file),
                f"tensor {name!r} is {value.dtype} {list(value.shape)}, "
                f"not floating-point {list(tensor.shape)}",
            )
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(str(file), f"tensor {name!r} holds a value that is not finite")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(values[name])


def _refuse_names(file: Path, found: set[str], wanted: set[str]) -> None:
    for what, names in (("lacks", wanted - found), ("has unexpected", found - wanted)):
        if names:
            first = sorted(names)[0]
            raise CheckpointError(
                str(file),
                f"{what} {len(names)} tensors: {first!r}",
                remedy="it belongs to another model, or other settings",
            )


def _number(value: Any) -> float:
    assert isinstance(value, (int, float))
    return value
