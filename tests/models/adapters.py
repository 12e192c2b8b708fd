"""LoRA adapters of any model, written as peft writes them, with a B that is not zero."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from oomproof.models.adapter import CONFIG_FILE, WEIGHTS_FILE
from oomproof.models.adapter_config import AdapterConfig
from oomproof.models.spec import ModelSpec, Role

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "v_proj")
Tensors = dict[str, torch.Tensor]


def write_adapter(
    folder: Path,
    spec: ModelSpec,
    modules: Sequence[str] = ATTENTION,
    *,
    rank: int = 8,
    dtype: torch.dtype = torch.float32,
    std: float = 0.05,
    config: Mapping[str, Any] | None = None,
    change: Callable[[Tensors], None] = lambda _: None,
) -> Path:
    """Writes a folder.

    Args:
        folder: To be made.
        spec: The model that is adapted.
        modules: Ends of the names of its linears.
        rank: Of all that `rank_pattern` does not name.
        dtype: Of the tensors.
        std: Of their values.
        config: Other fields of adapter_config.json.
        change: Done to the tensors.
    """
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.id,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "bias": "none",
        **(config or {}),
    }
    tensors = tensors_of(spec, modules, fields, dtype=dtype, std=std)
    change(tensors)
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(fields))
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def tensors_of(
    spec: ModelSpec,
    modules: Sequence[str],
    fields: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    std: float,
) -> Tensors:
    """Repeatable A and B."""
    ranks = fields.get("rank_pattern") or {}
    layers = fields.get("layers_to_transform")
    generator = torch.Generator().manual_seed(0)
    found: Tensors = {}
    for tensor in spec.tensors:
        module = tensor.name.removesuffix(".weight")
        if tensor.role is not Role.LINEAR or module.rpartition(".")[2] not in modules:
            continue
        if layers is not None and tensor.layer not in layers:
            continue
        key = next((key for key in ranks if re.match(rf"(.*\.)?({key})$", module)), None)
        rank = fields["r"] if key is None else ranks[key]
        rows, columns = tensor.shape
        for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = std * torch.randn(prod(shape), generator=generator)
            name = f"base_model.model.{module}.lora_{half}.weight"
            found[name] = values.view(shape).to(dtype)
    return found


def plain_config(**fields: Any) -> AdapterConfig:
    """A config of rank 8 and scale 2, with other fields."""
    values: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16.0,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ATTENTION,
        "exclude_modules": (),
        "layers_to_transform": None,
        "base_model": None,
    }
    return AdapterConfig(**{**values, **fields})
