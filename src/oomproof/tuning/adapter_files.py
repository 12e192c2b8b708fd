"""Adapters as peft's folders: written here, and read by models/adapter.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from oomproof.errors import CheckpointError
from oomproof.loading.adapter import read_values
from oomproof.models.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterSpec, read_adapter
from oomproof.models.spec import ModelSpec
from oomproof.tuning.settings import LoraSettings


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
    part = folder / f"{WEIGHTS_FILE}.part"
    save_file(own, part, metadata={"format": "pt"})
    part.replace(folder / WEIGHTS_FILE)
    part = folder / f"{CONFIG_FILE}.part"
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / CONFIG_FILE)


def load(
    folder: Path, into: Mapping[str, torch.Tensor], settings: LoraSettings, spec: ModelSpec
) -> None:
    """Reads an adapter into parameters: each of them, nothing else, in their shapes.

    Args:
        folder: As `save` or peft wrote it.
        into: peft's names → all parameters of the settings' adapters.
        settings: That it has to be of.
        spec: The model that is adapted.

    Raises:
        InputError: It is another adapter, damaged, or holds a value that is not finite.
    """
    adapter = read_adapter(folder, spec)
    _compare(adapter, into, settings)
    values = read_values(adapter)
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(values[name])


def _compare(
    adapter: AdapterSpec, into: Mapping[str, torch.Tensor], settings: LoraSettings
) -> None:
    """That it has the settings' rank and scale, of the modules that they name."""
    wanted = (settings.rank, settings.scale)
    for one in adapter.weights:
        if (one.rank, one.scale) != wanted:
            raise _another(
                adapter,
                f"has rank {one.rank} and scale {one.scale:g} (alpha / rank) of {one.module}, not "
                f"{settings.rank} and {settings.scale:g}",
            )
    found = {half.name: half.shape for one in adapter.weights for half in (one.a, one.b)}
    if found != {name: tuple(tensor.shape) for name, tensor in into.items()}:
        modules = sorted({one.module.rpartition(".")[2] for one in adapter.weights})
        raise _another(
            adapter,
            f"has {len(found)} tensors of modules {', '.join(modules)}, not {len(into)} of "
            f"{', '.join(sorted(settings.target_modules))}",
        )


def _another(adapter: AdapterSpec, problem: str) -> CheckpointError:
    return CheckpointError(
        adapter.path, problem, remedy="train on with the settings that it was made with"
    )
