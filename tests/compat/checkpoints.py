"""Random checkpoints of a few hundred kilobytes, whole or damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from oomproof.models.resolve import bundled_folder

Tensors = dict[str, torch.Tensor]

WINDOW = 32
SHAPE: Mapping[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 3,
}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, stretched": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, sliding": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2, yarn": (
        "Qwen2Config",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": WINDOW}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": WINDOW,
        },
    ),
}


def random_checkpoint(
    folder: Path,
    family: str = "llama",
    edit: Callable[[Tensors], object] | None = None,
    std: float = 0.15,
    **fields: Any,
) -> Path:
    """Writes a checkpoint of that family with the bundled tokenizer.

    Weights are large enough that answers vary, with a `std` of 0.02 as models begin with; `edit`
    may change the tensors before they are written.
    """
    config_class, own = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**SHAPE, **own, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    if edit is not None:
        edit_tensors(folder, edit)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(bundled_folder() / name, folder / name)
    return folder


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrites model.safetensors with its tensors changed."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **fields: object) -> None:
    """Rewrites a JSON object with some fields changed."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def copy_of_tiny(folder: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(bundled_folder(), folder))
