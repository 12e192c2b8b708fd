"""Decoders with multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434).

Keys and values are kept as one latent of kv_lora_rank and one rotated key of qk_rope_head_dim for
all heads; kv_b_proj expands them to every head. The lowest layers are dense, the others mixtures
with experts that every token shares.
"""

from __future__ import annotations

from oomproof.models.families.parts import Family, Part, experts, gated_mlp, linear, norm, router
from oomproof.models.spec import Role

_ATTENTION = (
    *linear("self_attn.q_proj", "latent_queries", "hidden", when="has_full_queries"),
    *linear("self_attn.q_a_proj", "q_lora", "hidden", bias="attention_bias", when="q_lora_rank"),
    *norm("self_attn.q_a_layernorm", "q_lora", when="q_lora_rank"),
    *linear("self_attn.q_b_proj", "latent_queries", "q_lora", when="q_lora_rank"),
    *linear("self_attn.kv_a_proj_with_mqa", "latent_and_rope", "hidden", bias="attention_bias"),
    *norm("self_attn.kv_a_layernorm", "kv_lora"),
    *linear("self_attn.kv_b_proj", "expanded_kv", "kv_lora"),
    *linear("self_attn.o_proj", "hidden", "latent_values", bias="attention_bias"),
)
_REQUIRED = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
_SHARED = gated_mlp(prefix="mlp.shared_experts", width="shared_experts")

LATENT = (
    Family(
        name="deepseek-v2",
        architecture="DeepseekV2ForCausalLM",
        model_type="deepseek_v2",
        attention=_ATTENTION,
        mlp=gated_mlp(),
        experts=(*experts(), *router(), *_SHARED),
        # A head's size has its own fields here; hidden_size over heads says nothing.
        defaults={"head_dim": 64, "q_lora_rank": 1536, "n_shared_experts": 2},
        requires=_REQUIRED,
    ),
    Family(
        name="deepseek-v3",
        architecture="DeepseekV3ForCausalLM",
        model_type="deepseek_v3",
        attention=_ATTENTION,
        mlp=gated_mlp(),
        experts=(
            *experts(),
            *router(),
            Part(name="mlp.gate.e_score_correction_bias", shape=("experts",), role=Role.OTHER),
            *_SHARED,
        ),
        defaults={
            "head_dim": 64,
            "q_lora_rank": 1536,
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
        },
        requires=_REQUIRED,
    ),
)
