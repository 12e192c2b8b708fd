"""Decoders whose every layer is attention and one MLP."""

from __future__ import annotations

from oomproof.models.families.gemma3_vision import vision_tensors
from oomproof.models.families.parts import (
    Family,
    always_slides,
    attention,
    fused_mlp,
    gated_mlp,
    linear,
    norms,
    qk_norm,
    slides_above_max_window_layers,
    slides_except_every,
)
from oomproof.models.forward import Forward

_SANDWICH_NORMS = norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_POST_NORMS = norms("post_attention_layernorm", "post_feedforward_layernorm")
_NORM_OF_A_HEAD = qk_norm(("head_dim",), ("head_dim",))
_NORM_OF_ALL_HEADS = qk_norm(("queries",), ("keys",))
_CONFIGURED_ATTENTION = attention(bias="attention_bias", output_bias="attention_bias")
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3_ATTENTION = attention(
    bias="attention_bias", output_bias="attention_bias", extra=_NORM_OF_A_HEAD
)

DENSE = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        model_type="llama",
        attention=_CONFIGURED_ATTENTION,
        mlp=gated_mlp(bias="mlp_bias"),
        forward=Forward(),
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        model_type="mistral",
        attention=attention(),
        mlp=gated_mlp(),
        forward=Forward(),
        slides=always_slides,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
        name="ministral",
        architecture="MinistralForCausalLM",
        model_type="ministral",
        attention=attention(),
        mlp=gated_mlp(),
        forward=Forward(),
        slides=always_slides,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        requires=("head_dim",),
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        attention=attention(bias=True),
        mlp=gated_mlp(),
        forward=Forward(),
        slides=slides_above_max_window_layers,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        attention=attention(
            bias="attention_bias", output_bias="attention_bias", extra=_NORM_OF_A_HEAD
        ),
        mlp=gated_mlp(),
        forward=Forward(),
        slides=slides_above_max_window_layers,
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    Family(
        name="gemma",
        architecture="GemmaForCausalLM",
        model_type="gemma",
        attention=_CONFIGURED_ATTENTION,
        mlp=gated_mlp(),
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    ),
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        attention=_CONFIGURED_ATTENTION,
        mlp=gated_mlp(),
        norms=_SANDWICH_NORMS,
        slides=slides_except_every(2),
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        name="gemma3",
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        attention=_GEMMA3_ATTENTION,
        mlp=gated_mlp(),
        norms=_SANDWICH_NORMS,
        slides=slides_except_every(6),
        defaults=_GEMMA3_DEFAULTS,
    ),
    Family(
        name="gemma3-multimodal",
        architecture="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        attention=_GEMMA3_ATTENTION,
        mlp=gated_mlp(),
        norms=_SANDWICH_NORMS,
        slides=slides_except_every(6),
        defaults=_GEMMA3_DEFAULTS,
        text_config=True,
        decoder="model.language_model",
        vision=vision_tensors,
    ),
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        attention=(
            *linear("self_attn.o_proj", "hidden", "queries"),
            *linear("self_attn.qkv_proj", "qkv", "hidden"),
        ),
        mlp=fused_mlp(),
        slides=always_slides,
    ),
    Family(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        model_type="olmo2",
        attention=attention(
            bias="attention_bias", output_bias="attention_bias", extra=_NORM_OF_ALL_HEADS
        ),
        mlp=gated_mlp(),
        norms=_POST_NORMS,
    ),
    Family(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        model_type="olmo3",
        attention=attention(
            bias="attention_bias", output_bias="attention_bias", extra=_NORM_OF_ALL_HEADS
        ),
        mlp=gated_mlp(),
        norms=_POST_NORMS,
        slides=slides_except_every(4),
        defaults={"sliding_window": 4096},
    ),
    Family(
        name="granite",
        architecture="GraniteForCausalLM",
        model_type="granite",
        attention=_CONFIGURED_ATTENTION,
        mlp=gated_mlp(bias="mlp_bias"),
        forward=Forward(
            embedding_multiplier="embedding_multiplier",
            residual_multiplier="residual_multiplier",
            attention_multiplier="attention_multiplier",
            logits_divisor="logits_scaling",
        ),
        defaults={"attention_multiplier": 1.0},
    ),
    Family(
        name="starcoder2",
        architecture="Starcoder2ForCausalLM",
        model_type="starcoder2",
        attention=attention(bias="use_bias", output_bias="use_bias"),
        mlp=(
            *linear("mlp.c_fc", "mlp", "hidden", bias="use_bias"),
            *linear("mlp.c_proj", "hidden", "mlp", bias="use_bias"),
        ),
        norms=norms("input_layernorm", "post_attention_layernorm", bias=True),
        final_norm_bias=True,
        slides=always_slides,
        defaults={"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
    ),
    Family(
        name="cohere",
        architecture="CohereForCausalLM",
        model_type="cohere",
        attention=attention(
            bias="attention_bias",
            output_bias="attention_bias",
            extra=qk_norm(("heads", "head_dim"), ("kv_heads", "head_dim"), when="use_qk_norm"),
        ),
        mlp=gated_mlp(),
        norms=norms("input_layernorm"),
        defaults={"tie_word_embeddings": True},
    ),
    Family(
        name="cohere2",
        architecture="Cohere2ForCausalLM",
        model_type="cohere2",
        attention=_CONFIGURED_ATTENTION,
        mlp=gated_mlp(),
        norms=norms("input_layernorm"),
        slides=slides_except_every(4),
        defaults={"sliding_window": 4096, "tie_word_embeddings": True},
    ),
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        model_type="smollm3",
        attention=_CONFIGURED_ATTENTION,
        mlp=gated_mlp(bias="mlp_bias"),
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    Family(
        name="glm4",
        architecture="Glm4ForCausalLM",
        model_type="glm4",
        attention=attention(bias="attention_bias"),
        mlp=fused_mlp(),
        norms=norms(
            "input_layernorm",
            "post_attention_layernorm",
            "post_self_attn_layernorm",
            "post_mlp_layernorm",
        ),
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    Family(
        name="seed-oss",
        architecture="SeedOssForCausalLM",
        model_type="seed_oss",
        attention=attention(bias="attention_bias", output_bias="attention_out_bias"),
        mlp=gated_mlp(bias="mlp_bias"),
        forward=Forward(),
        defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    ),
)
