"""Checkpoints in 8 bits, made by hand: the layouts that others publish, and what they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from oomproof.models.resolve import bundled_folder
from tests.compat.checkpoints import Tensors, copy_of_tiny, edit_json

FP8 = torch.float8_e4m3fn
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to publish a model."""

    config: Mapping[str, Any]
    """quantization_config."""
    held_as: str
    """The native engine's format."""
    parts: Callable[[str, torch.Tensor], Tensors]
    """(module, float32 weight) → its tensors."""
    decoded: Callable[[str, Tensors], torch.Tensor]
    """(module, its tensors) → the float32 weight that they stand for."""


def rows_of_e4m3(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return (weight / scale).to(FP8), scale


def one_scale(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / 448
    return (weight / scale).to(FP8), scale.view(1)


def squares_of(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale for each weight."""
    wide = scale.float().repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return wide[: shape[0], : shape[1]]


def block_scales(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    blocks = padded.view(math.ceil(rows / 128), 128, math.ceil(columns / 128), 128)
    scale = (blocks.abs().amax(dim=(1, 3)) / 440).to(dtype)
    return (weight / squares_of(scale, weight.shape)).to(FP8), scale


def llm_int8(module: str, weight: torch.Tensor) -> Tensors:
    absmax = weight.abs().amax(dim=1)
    return {
        f"{module}.weight": (weight * (127 / absmax).unsqueeze(1)).round().to(torch.int8),
        f"{module}.SCB": absmax,
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def fbgemm(module: str, weight: torch.Tensor) -> Tensors:
    codes, scale = rows_of_e4m3(weight)
    bound = torch.tensor([1200.0])
    return {
        f"{module}.weight": codes,
        f"{module}.weight_scale": scale,
        f"{module}.input_scale_ub": bound,
    }


def channel(module: str, weight: torch.Tensor) -> Tensors:
    scale = (weight.abs().amax(dim=1, keepdim=True) / 440).to(torch.bfloat16)
    codes = (weight / scale.float()).to(FP8)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}


def one_static(module: str, weight: torch.Tensor) -> Tensors:
    codes, scale = one_scale(weight)
    return {
        f"{module}.weight": codes,
        f"{module}.weight_scale": scale,
        f"{module}.input_scale": torch.tensor([0.03]),
    }


def auto_fp8(module: str, weight: torch.Tensor) -> Tensors:
    parts = one_static(module, weight)
    return {name: part if part.dim() > 1 else part[0] for name, part in parts.items()}


def int_channel(module: str, weight: torch.Tensor) -> Tensors:
    scale = (weight.abs().amax(dim=1, keepdim=True) / 126).to(torch.bfloat16)
    codes = (weight / scale.float()).round().to(torch.int8)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}


def blocks(name: str, dtype: torch.dtype) -> Callable[[str, torch.Tensor], Tensors]:
    def parts(module: str, weight: torch.Tensor) -> Tensors:
        codes, scale = block_scales(weight, dtype)
        return {f"{module}.weight": codes, f"{module}.{name}": scale}

    return parts


def of_int8(module: str, parts: Tensors) -> torch.Tensor:
    return (parts[f"{module}.weight"].double() * parts[f"{module}.SCB"].unsqueeze(1) / 127).float()


def scaled(module: str, parts: Tensors) -> torch.Tensor:
    return parts[f"{module}.weight"].float() * parts[f"{module}.weight_scale"].float()


def in_squares(name: str) -> Callable[[str, Tensors], torch.Tensor]:
    def decoded(module: str, parts: Tensors) -> torch.Tensor:
        codes = parts[f"{module}.weight"].float()
        return codes * squares_of(parts[f"{module}.{name}"], codes.shape)

    return decoded


def compressed(strategy: str, kind: str = "float", *, static: bool = False) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    inputs = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": not static}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "float" else "int-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


LAYOUTS: Mapping[str, Layout] = {
    "LLM.int8()": Layout(
        config={"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        held_as="int8",
        parts=llm_int8,
        decoded=of_int8,
    ),
    "fbgemm": Layout(
        config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        held_as="fp8",
        parts=fbgemm,
        decoded=scaled,
    ),
    "channel": Layout(config=compressed("channel"), held_as="fp8", parts=channel, decoded=scaled),
    "tensor, static": Layout(
        config=compressed("tensor", static=True), held_as="fp8", parts=one_static, decoded=scaled
    ),
    "AutoFP8": Layout(
        config={
            "quant_method": "fp8",
            "activation_scheme": "static",
            "ignored_layers": ["lm_head"],
        },
        held_as="fp8",
        parts=auto_fp8,
        decoded=scaled,
    ),
    "int channel": Layout(
        config=compressed("channel", "int"), held_as="int8", parts=int_channel, decoded=scaled
    ),
    "fine-grained": Layout(
        config={
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
        held_as="fp8-block",
        parts=blocks("weight_scale_inv", torch.bfloat16),
        decoded=in_squares("weight_scale_inv"),
    ),
    "block": Layout(
        config=compressed("block"),
        held_as="fp8-block",
        parts=blocks("weight_scale", torch.float32),
        decoded=in_squares("weight_scale"),
    ),
}


def published(folder: Path, layout: str, source: Path | None = None) -> Path:
    """A model in that layout, and beside it `folder`-decoded: the same in float32."""
    own, found = LAYOUTS[layout], copy_of_tiny(folder) if source is None else source
    tensors = load_file(found / "model.safetensors")
    stored: Tensors = {}
    decoded = {name: tensor.float() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        module = name.removesuffix(".weight")
        parts = own.parts(module, tensor.float())
        stored |= parts
        decoded[name] = own.decoded(module, parts)
    config = json.loads((found / "config.json").read_text())
    for where, held in ((folder, stored), (decoded_of(folder), decoded)):
        where.mkdir(exist_ok=True)
        contents = {name: tensor.contiguous() for name, tensor in held.items()}
        save_file(contents, where / "model.safetensors", metadata={"format": "pt"})
        (where / "config.json").write_text(json.dumps(config))
        for name in TOKENIZER:
            (where / name).write_bytes((bundled_folder() / name).read_bytes())
    edit_json(folder / "config.json", quantization_config=dict(own.config))
    return folder


def decoded_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-decoded")
