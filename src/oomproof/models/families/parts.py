"""The words in which a family of models is described.

A layer is a list of parts in the order of transformers' state dict. A part's shape is written in
names of dimensions ("queries", "hidden"), which `dimensions` turns into numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from oomproof.models.config import ConfigReader, DecoderConfig
from oomproof.models.forward import Forward
from oomproof.models.spec import Role, TensorSpec

Switch = bool | str
"""True, False, or the name of the boolean config field that decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One parameter of a layer."""

    name: str
    """Below the layer: "self_attn.q_proj.weight"."""
    shape: tuple[str, ...]
    """Names of dimensions."""
    role: Role
    when: Switch = True
    """Whether the layer has it."""


Parts = tuple[Part, ...]


def linear(
    name: str, outputs: str, inputs: str, *, bias: Switch = False, when: Switch = True
) -> Parts:
    """A linear layer, with its bias where it has one."""
    weight = Part(name=f"{name}.weight", shape=(outputs, inputs), role=Role.LINEAR, when=when)
    if bias is False:
        return (weight,)
    return (weight, Part(name=f"{name}.bias", shape=(outputs,), role=Role.BIAS, when=bias))


def norm(name: str, *shape: str, bias: bool = False, when: Switch = True) -> Parts:
    """An RMSNorm, or with `bias` a LayerNorm."""
    names = ("weight", "bias") if bias else ("weight",)
    return tuple(
        Part(name=f"{name}.{last}", shape=shape, role=Role.NORM, when=when) for last in names
    )


def norms(*names: str, bias: bool = False) -> Parts:
    """The layer's norms over the hidden size."""
    return tuple(part for name in names for part in norm(name, "hidden", bias=bias))


PRE_NORMS = norms("input_layernorm", "post_attention_layernorm")
"""The norms of most families: before attention, and (in spite of its name) before the MLP."""


def attention(*, bias: Switch = False, output_bias: Switch = False, extra: Parts = ()) -> Parts:
    """Separate query, key and value projections; `extra` follows the output projection."""
    return (
        *linear("self_attn.q_proj", "queries", "hidden", bias=bias),
        *linear("self_attn.k_proj", "keys", "hidden", bias=bias),
        *linear("self_attn.v_proj", "keys", "hidden", bias=bias),
        *linear("self_attn.o_proj", "hidden", "queries", bias=output_bias),
        *extra,
    )


def qk_norm(queries: tuple[str, ...], keys: tuple[str, ...], *, when: Switch = True) -> Parts:
    """Norms of queries and keys: over one head, all heads together, or each head its own."""
    return (
        *norm("self_attn.q_norm", *queries, when=when),
        *norm("self_attn.k_norm", *keys, when=when),
    )


def gated_mlp(*, width: str = "mlp", bias: Switch = False, prefix: str = "mlp") -> Parts:
    """Gate, up and down projection."""
    return (
        *linear(f"{prefix}.gate_proj", width, "hidden", bias=bias),
        *linear(f"{prefix}.up_proj", width, "hidden", bias=bias),
        *linear(f"{prefix}.down_proj", "hidden", width, bias=bias),
    )


def fused_mlp() -> Parts:
    """Gate and up projection in one, and down projection."""
    return (
        *linear("mlp.gate_up_proj", "gate_up", "hidden"),
        *linear("mlp.down_proj", "hidden", "mlp"),
    )


def router(name: str = "mlp.gate") -> Parts:
    """The weight that chooses a token's experts."""
    return (Part(name=f"{name}.weight", shape=("experts", "hidden"), role=Role.ROUTER),)


def experts() -> Parts:
    """All experts of a layer, stacked: [experts, out, in]."""
    return (
        Part(
            name="mlp.experts.gate_up_proj",
            shape=("experts", "expert_gate_up", "hidden"),
            role=Role.EXPERTS,
        ),
        Part(
            name="mlp.experts.down_proj",
            shape=("experts", "hidden", "expert_mlp"),
            role=Role.EXPERTS,
        ),
    )


SlidingRule = Callable[[DecoderConfig, int], bool]
"""Whether a layer of that index slides, where the file has no layer_types."""


def never_slides(_config: DecoderConfig, _layer: int) -> bool:
    """Every layer sees everything."""
    return False


def always_slides(_config: DecoderConfig, _layer: int) -> bool:
    """Every layer slides where the file has a window."""
    return True


def slides_if_used(config: DecoderConfig, _layer: int) -> bool:
    """Every layer slides if use_sliding_window."""
    return config.use_sliding_window


def slides_above_max_window_layers(config: DecoderConfig, layer: int) -> bool:
    """The upper layers slide if use_sliding_window."""
    return config.use_sliding_window and layer >= config.max_window_layers


def slides_alternately_below_max_window_layers(config: DecoderConfig, layer: int) -> bool:
    """Every other of the lower layers slides if use_sliding_window."""
    return config.use_sliding_window and layer < config.max_window_layers and layer % 2 == 0


def slides_except_every(default_pattern: int) -> SlidingRule:
    """All layers slide but every n-th, n being sliding_window_pattern."""

    def rule(config: DecoderConfig, layer: int) -> bool:
        return (layer + 1) % (config.sliding_window_pattern or default_pattern) != 0

    return rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Models that share an architecture of transformers and differ in numbers only."""

    name: str
    """Our short name."""
    architecture: str
    """transformers' class."""
    model_type: str
    """transformers' model_type; a file that names another one is refused."""
    attention: Parts
    mlp: Parts = ()
    """The dense block; empty where every layer is a mixture of experts."""
    experts: Parts = ()
    """The mixture-of-experts block; empty in dense families."""
    norms: Parts = PRE_NORMS
    final_norm_bias: bool = False
    slides: SlidingRule = never_slides
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Values that transformers' config class gives to fields that published files leave out."""
    forward: Forward | None = None
    """How the native engine computes it, beyond its parts; None where it cannot."""
    requires: tuple[str, ...] = ()
    """Fields that this family cannot do without, beyond those of every decoder."""
    eager_attention: bool = False
    """Whether no fused kernel computes its attention; soft-capped scores are seen by themselves."""
    text_config: bool = False
    """Whether the decoder's fields lie in a "text_config" of their own."""
    decoder: str = "model"
    """Where the decoder lies in the state dict."""
    vision: Callable[[ConfigReader, DecoderConfig], tuple[TensorSpec, ...]] | None = None
    """Enumerates the vision tower and projector, which stand before the decoder."""


def dimensions(config: DecoderConfig) -> Mapping[str, int]:
    """The numbers behind the names of dimensions."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    expert_mlp = config.moe_intermediate_size or config.intermediate_size
    latent, rope = config.kv_lora_rank or 0, config.qk_rope_head_dim
    return {
        "q_lora": config.q_lora_rank or 0,
        "kv_lora": latent,
        "latent_and_rope": latent + rope,
        "latent_queries": config.num_attention_heads * (config.qk_nope_head_dim + rope),
        "expanded_kv": config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim),
        "latent_values": config.num_attention_heads * config.v_head_dim,
        "shared_experts": config.n_shared_experts * expert_mlp,
        "one": 1,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "queries": queries,
        "keys": keys,
        "qkv": queries + 2 * keys,
        "mlp": config.intermediate_size,
        "gate_up": 2 * config.intermediate_size,
        "experts": config.num_experts,
        "expert_mlp": expert_mlp,
        "expert_gate_up": 2 * expert_mlp,
        "shared_mlp": config.shared_expert_intermediate_size or 0,
        "vocab": config.vocab_size,
    }
