"""Small models to train, as we hold them and as transformers with peft does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from oomproof.memory.training_shape import PROJECTIONS
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec
from oomproof.tuning.model import (
    LoraSettings,
    TrainingModel,
    TrainingOptions,
    build_training_model,
)

CPU = torch.device("cpu")
LORA = LoraSettings(rank=4, alpha=16.0)


def ours(
    folder: Path,
    lora: LoraSettings = LORA,
    *,
    tokens: int = 128,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> TrainingModel:
    """Our model, whose adapters do something."""
    model = build_training_model(
        resolve(str(folder)),
        folder,
        lora,
        device=CPU,
        compute_dtype=dtype,
        options=TrainingOptions(tokens=tokens, **options),
        seed=seed,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    return model


def theirs(model: TrainingModel, folder: Path, adapter: Path) -> Any:
    """The same weights, as they are after quantizing, and the same adapters, in float32."""
    model.save_adapter(adapter)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    frozen = model._core._model
    for layer, weights in zip(base.model.layers, frozen.layers, strict=True):
        for kind, weight in weights.projections.items():
            whole = torch.empty(weight.rows, weight.columns)
            weight.write(0, weight.rows, whole)
            for name, part in zip(PROJECTIONS[kind], _split(whole, layer, kind), strict=True):
                layer.get_submodule(name).weight.data.copy_(part)
    peft = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    return peft.train()


def _split(whole: torch.Tensor, layer: Any, kind: str) -> tuple[torch.Tensor, ...]:
    rows = [len(layer.get_submodule(name).weight) for name in PROJECTIONS[kind]]
    return torch.split(whole, rows)


def gradients_of_peft(model: Any) -> dict[str, torch.Tensor]:
    """By our names."""
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def gradients(model: TrainingModel) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative, of all gradients."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - one).norm() / one.norm().clamp(min=1e-12))
        for name, one in expected.items()
    )


def tokens_of(spec: ModelSpec, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, spec.vocab_size, (rows, length), generator=generator)
