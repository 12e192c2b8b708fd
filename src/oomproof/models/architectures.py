"""From a config.json to every tensor of the model, without building the model.

The registry's entries are the families in models/families; this file knows what all of them have
in common: an embedding, layers, a final norm, and a head unless it is tied.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from math import prod

from oomproof.errors import ConfigError
from oomproof.models.config import (
    MAX_TEXT,
    ConfigReader,
    DecoderConfig,
    read_decoder,
    read_dtype,
    shown,
)
from oomproof.models.families.parts import Family, Parts, dimensions, norm
from oomproof.models.forward import read_forward
from oomproof.models.quantization import as_stored, read_quantization
from oomproof.models.spec import (
    AttentionSpec,
    CheckpointSpec,
    ModelSource,
    ModelSpec,
    Role,
    TensorSpec,
)

MAX_PARAMETERS = 10**13
"""More than any model has; a config.json that describes more is broken or hostile."""

_Shape = tuple[str, tuple[int, ...], Role]
"""A part of a layer, in numbers: its name below the layer, its shape, its role."""


@cache
def families() -> Mapping[str, Family]:
    """Every family by the name of its architecture in transformers."""
    from oomproof.models.families.dense import DENSE
    from oomproof.models.families.latent import LATENT
    from oomproof.models.families.mixture import MIXTURE

    return {family.architecture: family for family in (*DENSE, *MIXTURE, *LATENT)}


def find_family(config: Mapping[str, object], *, file: str) -> Family:
    """The family that a config.json belongs to, by architecture or else by model_type.

    Raises:
        ConfigError: None is named, it is unknown, or architecture and model_type disagree.
    """
    reader = ConfigReader(values=config, file=file)
    architectures = reader.texts("architectures")
    model_type = reader.text("model_type")
    if not architectures:
        return _family_by_model_type(reader, model_type)
    family = families().get(architectures[0])
    if family is None:
        reader.fail(
            "architectures",
            f"{shown(architectures[0])} is unknown",
            remedy=_suggestion(architectures[0], families()),
        )
    if model_type is not None and model_type != family.model_type:
        reader.fail(
            "model_type",
            f"{shown(model_type)} contradicts {family.architecture}, "
            f"whose model_type is {family.model_type!r}",
        )
    return family


def _family_by_model_type(reader: ConfigReader, model_type: str | None) -> Family:
    if model_type is None:
        reader.fail("architectures", "is missing, and so is model_type")
    by_type = {family.model_type: family for family in families().values()}
    if model_type not in by_type:
        reader.fail(
            "model_type",
            f"{shown(model_type)} is unknown",
            remedy=_suggestion(model_type, by_type),
        )
    return by_type[model_type]


def _suggestion(name: str, known: Mapping[str, Family]) -> str:
    closest = difflib.get_close_matches(name[:MAX_TEXT], known, n=1)
    start = f"the closest is {closest[0]}; " if closest else ""
    return f"{start}supported are {', '.join(sorted(known))}"


def build_spec(
    config: Mapping[str, object],
    *,
    id: str,  # noqa: A002 - it becomes ModelSpec.id
    source: ModelSource,
    file: str,
    checkpoint: CheckpointSpec | None = None,
) -> ModelSpec:
    """Describes the model that transformers would build from a config.json.

    Args:
        config: The parsed file, as `read_config` returns it.
        id: The name the model was asked for by.
        source: Where the model comes from.
        file: Path or URL of the config.json, for errors.
        checkpoint: Headers of its safetensors files, where they were read.

    Raises:
        ConfigError: A field is missing, wrong, out of bounds, or the architecture is unknown.
    """
    family = find_family(config, file=file)
    whole = ConfigReader(values=config, file=file, defaults=family.defaults)
    reader = whole.nested("text_config", defaults=family.defaults) if family.text_config else whole
    decoder = read_decoder(reader)
    for name in family.requires:
        reader.required(name)
    if not family.mlp and not decoder.num_experts:
        reader.fail("num_experts", f"0 is not possible for {family.architecture}")
    tied = whole.boolean("tie_word_embeddings")
    vision = family.vision(whole, decoder) if family.vision else ()
    parameters = _decoder_parameters(family, decoder, tied=tied) + sum(t.numel for t in vision)
    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            file, f"describes {parameters:,} parameters, the bound is {MAX_PARAMETERS:,}"
        )
    quantization = read_quantization(whole)
    computed = read_forward(reader, family.forward, head_dim=decoder.head_dim)
    return ModelSpec(
        id=id,
        source=source,
        architecture=family.architecture,
        family=family.name,
        hidden_size=decoder.hidden_size,
        intermediate_size=_widest_mlp(family, decoder),
        num_hidden_layers=decoder.num_hidden_layers,
        num_attention_heads=decoder.num_attention_heads,
        vocab_size=decoder.vocab_size,
        max_position_embeddings=decoder.max_position_embeddings,
        tie_word_embeddings=tied,
        dtype=read_dtype(whole if whole.value("dtype") is not None else reader),
        attention=_attention(family, decoder),
        tensors=as_stored(
            (*vision, *_decoder_tensors(family, decoder, tied=tied)), quantization, checkpoint
        ),
        config=config,
        checkpoint=checkpoint,
        checkpoint_quantization=quantization,
        num_experts=decoder.num_experts if family.experts else 0,
        num_experts_per_token=decoder.num_experts_per_tok if family.experts else 0,
        eager_attention=family.eager_attention or decoder.attn_logit_softcapping is not None,
        forward=None if isinstance(computed, str) else computed,
        not_native=computed if isinstance(computed, str) else None,
    )


def _is_sparse(family: Family, config: DecoderConfig, layer: int) -> bool:
    """Whether a layer is a mixture of experts."""
    if not family.experts or not config.num_experts:
        return False
    if not family.mlp:
        return True
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def _widest_mlp(family: Family, config: DecoderConfig) -> int:
    sparse = [_is_sparse(family, config, n) for n in range(config.num_hidden_layers)]
    expert = config.moe_intermediate_size or config.intermediate_size
    shared = config.shared_expert_intermediate_size or config.n_shared_experts * expert
    return max(
        0 if all(sparse) else config.intermediate_size,
        config.num_experts_per_tok * expert + shared if any(sparse) else 0,
    )


def _attention(family: Family, config: DecoderConfig) -> tuple[AttentionSpec, ...]:
    def slides(layer: int) -> bool:
        if config.layer_types:
            return config.layer_types[layer] == "sliding_attention"
        return family.slides(config, layer)

    if config.kv_lora_rank is not None:
        latent = AttentionSpec(
            num_key_value_heads=1,
            key_head_dim=config.kv_lora_rank,
            value_head_dim=config.qk_rope_head_dim,
            expanded_key_head_dim=config.qk_nope_head_dim + config.qk_rope_head_dim,
            expanded_value_head_dim=config.v_head_dim,
        )
        return (latent,) * config.num_hidden_layers
    return tuple(
        AttentionSpec(
            num_key_value_heads=config.num_key_value_heads,
            key_head_dim=config.head_dim,
            value_head_dim=config.head_dim,
            sliding_window=config.sliding_window if slides(layer) else None,
        )
        for layer in range(config.num_hidden_layers)
    )


def _decoder_parameters(family: Family, config: DecoderConfig, *, tied: bool) -> int:
    """Number of the decoder's parameters (without its last norm), before they are listed."""
    vocabulary = config.vocab_size * config.hidden_size
    return vocabulary * (1 if tied else 2) + sum(
        sum(prod(shape) for _, shape, _ in block) for block in _layers(family, config)
    )


def _layers(family: Family, config: DecoderConfig) -> list[list[_Shape]]:
    """The parts of each layer."""
    dense = _shapes((*family.attention, *family.mlp, *family.norms), config)
    sparse = _shapes((*family.attention, *family.experts, *family.norms), config)
    return [
        sparse if _is_sparse(family, config, layer) else dense
        for layer in range(config.num_hidden_layers)
    ]


def _decoder_tensors(family: Family, config: DecoderConfig, *, tied: bool) -> Iterator[TensorSpec]:
    """The decoder's tensors in the order of the state dict."""
    vocabulary = (config.vocab_size, config.hidden_size)
    prefix = family.decoder
    yield TensorSpec(name=f"{prefix}.embed_tokens.weight", shape=vocabulary, role=Role.EMBEDDING)
    for layer, block in enumerate(_layers(family, config)):
        for name, shape, role in block:
            yield TensorSpec(
                name=f"{prefix}.layers.{layer}.{name}", shape=shape, role=role, layer=layer
            )
    for name, shape, role in _shapes(norm("norm", "hidden", bias=family.final_norm_bias), config):
        yield TensorSpec(name=f"{prefix}.{name}", shape=shape, role=role)
    if not tied:
        yield TensorSpec(name="lm_head.weight", shape=vocabulary, role=Role.HEAD)


def _shapes(parts: Parts, config: DecoderConfig) -> list[_Shape]:
    """The parts that this config has, with numbers for the names of their dimensions."""
    sizes = dimensions(config)
    return [
        (part.name, tuple(sizes[name] for name in part.shape), part.role)
        for part in parts
        if part.when is True or (isinstance(part.when, str) and getattr(config, part.when))
    ]
