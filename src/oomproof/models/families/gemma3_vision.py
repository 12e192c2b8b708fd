"""Gemma 3's SigLIP vision tower and the projector behind it."""

from __future__ import annotations

from collections.abc import Iterator

from oomproof.models.config import ConfigReader, DecoderConfig
from oomproof.models.spec import Role, TensorSpec

_SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "vision_use_head": True,
}
"""What transformers' SiglipVisionConfig fills in."""


def vision_tensors(reader: ConfigReader, text: DecoderConfig) -> tuple[TensorSpec, ...]:
    """Every tensor that stands before the decoder, in the order of the state dict.

    Args:
        reader: The whole config.json.
        text: The decoder that the projector leads to.

    Raises:
        ConfigError: vision_config is missing, out of bounds, or has a pooling head.
    """
    vision = reader.nested("vision_config", defaults=_SIGLIP_DEFAULTS)
    if vision.boolean("vision_use_head"):
        vision.fail("vision_use_head", "true is not supported: Gemma 3 has no pooling head")
    hidden = vision.required("hidden_size")
    width = vision.required("intermediate_size")
    patch = vision.required("patch_size")
    image = vision.required("image_size")
    if patch > image:
        vision.fail("patch_size", f"{patch} is more than image_size {image}")
    positions = (image // patch) ** 2
    tower = "model.vision_tower"

    def tensors() -> Iterator[TensorSpec]:
        patches = (hidden, vision.required("num_channels"), patch, patch)
        yield TensorSpec(
            name=f"{tower}.embeddings.patch_embedding.weight", shape=patches, role=Role.OTHER
        )
        yield _bias(f"{tower}.embeddings.patch_embedding", hidden)
        yield TensorSpec(
            name=f"{tower}.embeddings.position_embedding.weight",
            shape=(positions, hidden),
            role=Role.OTHER,
        )
        for layer in range(vision.required("num_hidden_layers")):
            prefix = f"{tower}.encoder.layers.{layer}"
            yield from _layer_norm(f"{prefix}.layer_norm1", hidden)
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                yield from _linear(f"{prefix}.self_attn.{name}", hidden, hidden)
            yield from _layer_norm(f"{prefix}.layer_norm2", hidden)
            yield from _linear(f"{prefix}.mlp.fc1", width, hidden)
            yield from _linear(f"{prefix}.mlp.fc2", hidden, width)
        yield from _layer_norm(f"{tower}.post_layernorm", hidden)
        projector = "model.multi_modal_projector"
        yield TensorSpec(
            name=f"{projector}.mm_input_projection_weight",
            shape=(hidden, text.hidden_size),
            role=Role.OTHER,
        )
        yield TensorSpec(
            name=f"{projector}.mm_soft_emb_norm.weight", shape=(hidden,), role=Role.NORM
        )

    return tuple(tensors())


def _bias(name: str, width: int) -> TensorSpec:
    return TensorSpec(name=f"{name}.bias", shape=(width,), role=Role.BIAS)


def _linear(name: str, outputs: int, inputs: int) -> tuple[TensorSpec, TensorSpec]:
    weight = TensorSpec(name=f"{name}.weight", shape=(outputs, inputs), role=Role.LINEAR)
    return weight, _bias(name, outputs)


def _layer_norm(name: str, width: int) -> tuple[TensorSpec, TensorSpec]:
    weight = TensorSpec(name=f"{name}.weight", shape=(width,), role=Role.NORM)
    return weight, _bias(name, width)
