"""Checkpoints to quantize, and what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from oomproof.models.resolve import bundled_folder
from oomproof.session import quantize
from tests.compat.checkpoints import copy_of_tiny

FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq")
SHARDS = 3
BLOCK_SCALES = "oomproof_block_scales"
TOKENS = torch.tensor([[1, 17, 400, 1999, 5, 5, 812, 33]])


def quantized(out: Path, model: str | Path = "tiny", **options: Any) -> Path:
    """The folder that `quantize` writes, on the CPU."""
    quantize(model, out, **{"device": "cpu", **options})
    return out


def as_theirs(out: Path, model: str | Path = "tiny", **options: Any) -> Path:
    """The same with bitsandbytes' own scales."""
    return quantized(out, model, search=False, **options)


def settings(format_name: str, dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format_name.removesuffix("-dq"),
        bnb_4bit_use_double_quant=format_name.endswith("-dq"),
        bnb_4bit_compute_dtype=dtype,
    )


def transformers_model(
    folder: Path, format_name: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """transformers' model of a folder, quantized by it where a format is given."""
    own = {} if format_name is None else {"quantization_config": settings(format_name, dtype)}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto" if format_name is None else dtype, device_map={"": "cpu"}, **own
    )


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's shards."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def in_shards(folder: Path, count: int = SHARDS) -> Path:
    """A copy of the bundled model whose weights are several files."""
    copy_of_tiny(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def check_logits(ours: Any, theirs: Any, format_name: str) -> None:
    """Two models of transformers that should be the same.

    bitsandbytes' kernel for processors misses the nearest code of an absmax, and of a weight in
    fp4, now and then, by one; its kernel for GPUs does not (test_linear.py). So on a processor
    what it quantized itself is only close.
    """
    found, expected = logits_of(ours), logits_of(theirs)
    if format_name != "nf4":
        assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    else:
        assert torch.equal(found, expected)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


SOURCE = bundled_folder()
