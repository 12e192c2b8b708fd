"""A plan as arguments of transformers, for the loader and for people who stay there."""

from __future__ import annotations

from typing import Any

from oomproof.errors import InputError
from oomproof.planning.plan import DevicePlan, Plan


def device_map(plan: Plan) -> dict[str, int | str]:
    """transformers' `device_map`: each module that owns tensors → CUDA ordinal, or "cpu".

    Module names are those of decoder-only models in transformers 5. A tied head computes where
    the embedding lives, so that one tensor never stands on two devices.
    """

    def target(device: DevicePlan) -> int | str:
        return device.kind if device.kind in ("cpu", "mps") else device.index

    used = plan.devices_in_use
    if len(used) == 1:
        return {"": target(used[0])}
    prefix = plan.decoder_prefix
    placed: dict[str, int | str] = {}
    for device in used:
        if device.holds_embedding:
            for module in ("embed_tokens", "rotary_emb"):
                placed[f"{prefix}.{module}"] = target(device)
            for module in plan.extra_modules:
                placed[module] = target(device)
    for device in used:
        if device.layers is not None:
            first, last = device.layers
            for layer in range(first, last + 1):
                placed[f"{prefix}.layers.{layer}"] = target(device)
    placed[f"{prefix}.norm"] = next(target(device) for device in used if device.holds_norm)
    placed["lm_head"] = next(target(device) for device in used if device.holds_head)
    return placed


def quantization_settings(plan: Plan) -> dict[str, Any] | None:
    """Arguments of transformers' `BitsAndBytesConfig`, dtypes as names.

    None for 16 bits, and for a checkpoint that is quantized already: its config has its own.
    """
    if plan.quantized_checkpoint is not None:
        return None
    chosen = plan.weight_format
    if chosen.name == "llm-int8":
        return {"load_in_8bit": True, "llm_int8_threshold": 6.0}
    if chosen.quant_type is None:
        return None
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": chosen.quant_type,
        "bnb_4bit_use_double_quant": chosen.double_quantized,
        "bnb_4bit_compute_dtype": plan.compute_dtype,
    }


def to_transformers(plan: Plan) -> dict[str, Any]:
    """Plain values for people who stay with transformers.

    `quantization_config` holds the arguments of `BitsAndBytesConfig`, not an instance of it, so
    that nothing here needs torch.

    Raises:
        InputError: The plan is for another engine: its formats, its attention and its bytes are
            not those of transformers.
    """
    if plan.engine != "transformers":
        raise InputError(
            f"{plan.model} is planned for the {plan.engine} engine, not for transformers",
            remedy='plan it with engine="transformers"',
        )
    if plan.adapter is not None:
        raise InputError(
            f"arguments of transformers' from_pretrained have no place for the adapter "
            f"{plan.adapter.path}",
            remedy="use oomproof.from_pretrained, which adds it with peft",
        )
    return {
        "pretrained_model_name_or_path": plan.source.path,
        "revision": plan.source.revision,
        "device_map": device_map(plan),
        "dtype": plan.compute_dtype,
        "attn_implementation": plan.attention,
        "quantization_config": quantization_settings(plan),
        "use_safetensors": True,
        "trust_remote_code": False,
    }
