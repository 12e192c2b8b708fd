"""A LoRA adapter as peft keeps it, read strictly.

W' = W + s · B A, with s = alpha / rank, or alpha / √rank where `use_rslora` is set (Kalajdzievski
2023); `rank_pattern` and `alpha_pattern` may give a module its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oomproof.conversion.files import digest_of
from oomproof.errors import CheckpointError, InputError
from oomproof.models.folder import read_bounded
from oomproof.models.headers import parse_json_object
from oomproof.units import MIB

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 4 * MIB
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_NOT_MERGED = {
    "use_dora": "scales weights anew (DoRA)",
    "modules_to_save": "brings whole modules of its own",
    "fan_in_fan_out": "is for transposed weights",
    "trainable_token_indices": "brings embeddings of its own",
    "lora_bias": "brings biases of its own",
    "target_parameters": "is for parameters that are no linears",
    "layer_replication": "repeats layers",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """What one weight gets added."""

    down: torch.Tensor
    """A: [rank, in]."""
    up: torch.Tensor
    """B: [out, rank]."""
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Every pair of an adapter, in host memory."""

    folder: Path
    base: str
    """What its config calls the model it was made for."""
    pairs: Mapping[str, Pair]
    """Weight's name ("model.layers.0.self_attn.q_proj.weight") → its pair."""
    digest: str

    @property
    def size_bytes(self) -> int:
        """Of all pairs."""
        return sum(p.down.nbytes + p.up.nbytes for p in self.pairs.values())


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter's folder.

    Raises:
        InputError: It is none, or of a kind that is not merged.
        CheckpointError: It is damaged.
    """
    folder = folder.expanduser()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(
                f"adapter {folder} has no {name}", remedy="give a folder that peft or `tune` wrote"
            )
    config = parse_json_object(
        read_bounded(folder / CONFIG_FILE, bound_bytes=_MAX_CONFIG_BYTES),
        what="content",
        location=str(folder / CONFIG_FILE),
    )
    _check_config(config, folder)
    tensors = _tensors(folder / WEIGHTS_FILE)
    pairs = {
        f"{module}.weight": Pair(down=down, up=up, scale=_scale(config, module, down, folder))
        for module, (down, up) in tensors.items()
    }
    digest = digest_of(folder / WEIGHTS_FILE).sha256 + digest_of(folder / CONFIG_FILE).sha256
    return Adapter(
        folder=folder,
        base=str(config.get("base_model_name_or_path") or ""),
        pairs=pairs,
        digest=digest,
    )


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    file = str(folder / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{file}: peft_type {str(config.get('peft_type'))[:40]!r} is not LORA",
            remedy="merge it with peft itself: model.merge_and_unload()",
        )
    if config.get("bias", "none") != "none":
        raise InputError(f"{file}: bias {str(config['bias'])[:40]!r} is not merged")
    for field, what in _NOT_MERGED.items():
        if config.get(field):
            raise InputError(
                f"{file}: {field} is set: the adapter {what}, which is not merged",
                remedy="merge it with peft itself: model.merge_and_unload()",
            )


def _tensors(file: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(str(file), f"cannot be read ({str(error)[:120]})") from error
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in found.items():
        match = _NAME.fullmatch(name)
        if match is None or value.dim() != 2:
            raise CheckpointError(str(file), f"holds {name[:120]!r}, which is not half of a pair")
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(str(file), f"{name!r} holds a value that is not finite")
        halves.setdefault(match[1], {})[match[2]] = value
    pairs = {}
    for module, both in halves.items():
        if set(both) != {"A", "B"} or both["A"].shape[0] != both["B"].shape[1]:
            raise CheckpointError(str(file), f"has no matching pair for {module!r}")
        pairs[module] = (both["A"], both["B"])
    if not pairs:
        raise CheckpointError(str(file), "holds no adapter")
    return pairs


def _scale(config: Mapping[str, Any], module: str, down: torch.Tensor, folder: Path) -> float:
    rank = down.shape[0]
    planned = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CheckpointError(str(folder / CONFIG_FILE), f"lora_alpha {alpha!r} is no number")
    if planned != rank:
        raise CheckpointError(
            str(folder / WEIGHTS_FILE), f"{module!r} has rank {rank}, its config says {planned!r}"
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    """peft's rule: the first pattern that the module's name ends with, as a regular expression."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return default
