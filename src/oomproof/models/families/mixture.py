"""Decoders with mixture-of-experts layers.

transformers 5 keeps the experts of a layer stacked in 3-D parameters, whatever the checkpoint
does.
"""

from __future__ import annotations

from oomproof.models.families.parts import (
    Family,
    Part,
    always_slides,
    attention,
    experts,
    gated_mlp,
    linear,
    qk_norm,
    router,
    slides_alternately_below_max_window_layers,
    slides_except_every,
    slides_if_used,
)
from oomproof.models.spec import Role

_EXPERT_FIELDS = ("num_experts", "num_experts_per_tok")

MIXTURE = (
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        attention=attention(),
        experts=(*router(), *experts()),
        slides=always_slides,
        defaults={"num_key_value_heads": 8},
        requires=_EXPERT_FIELDS,
    ),
    Family(
        name="qwen2-moe",
        architecture="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        attention=attention(bias="qkv_bias"),
        mlp=gated_mlp(),
        experts=(
            *router(),
            *experts(),
            *gated_mlp(prefix="mlp.shared_expert", width="shared_mlp"),
            *linear("mlp.shared_expert_gate", "one", "hidden"),
        ),
        slides=slides_alternately_below_max_window_layers,
        defaults={
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        requires=(*_EXPERT_FIELDS, "moe_intermediate_size", "shared_expert_intermediate_size"),
    ),
    Family(
        name="qwen3-moe",
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        attention=attention(
            bias="attention_bias",
            output_bias="attention_bias",
            extra=qk_norm(("head_dim",), ("head_dim",)),
        ),
        mlp=gated_mlp(),
        experts=(*experts(), *router()),
        slides=slides_if_used,
        defaults={"num_key_value_heads": 4, "sliding_window": 4096},
        requires=(*_EXPERT_FIELDS, "moe_intermediate_size"),
    ),
    Family(
        name="olmoe",
        architecture="OlmoeForCausalLM",
        model_type="olmoe",
        attention=attention(
            bias="attention_bias",
            output_bias="attention_bias",
            extra=qk_norm(("hidden",), ("keys",)),
        ),
        experts=(*router(), *experts()),
        requires=_EXPERT_FIELDS,
    ),
    Family(
        name="gpt-oss",
        architecture="GptOssForCausalLM",
        model_type="gpt_oss",
        eager_attention=True,
        attention=(
            Part(name="self_attn.sinks", shape=("heads",), role=Role.OTHER),
            *attention(bias="attention_bias", output_bias="attention_bias"),
        ),
        experts=(
            *router("mlp.router"),
            Part(name="mlp.router.bias", shape=("experts",), role=Role.BIAS),
            Part(
                name="mlp.experts.gate_up_proj",
                shape=("experts", "hidden", "expert_gate_up"),
                role=Role.EXPERTS,
            ),
            Part(
                name="mlp.experts.gate_up_proj_bias",
                shape=("experts", "expert_gate_up"),
                role=Role.BIAS,
            ),
            Part(
                name="mlp.experts.down_proj",
                shape=("experts", "expert_mlp", "hidden"),
                role=Role.EXPERTS,
            ),
            Part(name="mlp.experts.down_proj_bias", shape=("experts", "hidden"), role=Role.BIAS),
        ),
        slides=slides_except_every(2),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "attention_bias": True,
        },
        requires=_EXPERT_FIELDS,
    ),
)
