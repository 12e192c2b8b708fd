"""Small configs, one or more for each family, and what transformers builds from a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oomproof.models.architectures import build_spec
from oomproof.models.spec import ModelSource, ModelSpec

_SIZES: Mapping[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def small(architecture: str, model_type: str, **fields: object) -> dict[str, object]:
    return {"architectures": [architecture], "model_type": model_type, **_SIZES, **fields}


_SMALL_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}

_LATENT = {
    "num_key_value_heads": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_group": 2,
    "topk_group": 1,
}

SMALL_CONFIGS: dict[str, dict[str, object]] = {
    "llama": small("LlamaForCausalLM", "llama"),
    "llama, tied, biases": small(
        "LlamaForCausalLM",
        "llama",
        head_dim=32,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "llama without key-value heads": {
        name: value
        for name, value in small("LlamaForCausalLM", "llama").items()
        if name != "num_key_value_heads"
    },
    "mistral": small("MistralForCausalLM", "mistral", sliding_window=None),
    "mistral with its default window": small("MistralForCausalLM", "mistral", head_dim=16),
    "ministral": small(
        "MinistralForCausalLM",
        "ministral",
        head_dim=16,
        sliding_window=32,
        layer_types=["full_attention", "sliding_attention"] * 2,
    ),
    "qwen2": small("Qwen2ForCausalLM", "qwen2", sliding_window=64, max_window_layers=2),
    "qwen2, sliding": small(
        "Qwen2ForCausalLM",
        "qwen2",
        use_sliding_window=True,
        sliding_window=64,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "qwen3": small("Qwen3ForCausalLM", "qwen3"),
    "gemma": small("GemmaForCausalLM", "gemma"),
    "gemma2": small("Gemma2ForCausalLM", "gemma2", sliding_window=32),
    "gemma3": small(
        "Gemma3ForCausalLM", "gemma3_text", sliding_window=32, sliding_window_pattern=2
    ),
    "gemma3-multimodal": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 7,
        },
        "vision_config": _SMALL_VISION,
    },
    "phi3": small("Phi3ForCausalLM", "phi3", sliding_window=100),
    "phi3, tied": small("Phi3ForCausalLM", "phi3", tie_word_embeddings=True),
    "olmo2": small("Olmo2ForCausalLM", "olmo2"),
    "olmo3": small("Olmo3ForCausalLM", "olmo3", attention_bias=True),
    "granite": small("GraniteForCausalLM", "granite", mlp_bias=True),
    "starcoder2": small("Starcoder2ForCausalLM", "starcoder2", sliding_window=50),
    "starcoder2 without biases": small("Starcoder2ForCausalLM", "starcoder2", use_bias=False),
    "cohere": small("CohereForCausalLM", "cohere"),
    "cohere, query and key norm": small("CohereForCausalLM", "cohere", use_qk_norm=True),
    "cohere2": small("Cohere2ForCausalLM", "cohere2"),
    "smollm3": small("SmolLM3ForCausalLM", "smollm3"),
    "glm4": small("Glm4ForCausalLM", "glm4"),
    "seed-oss": small("SeedOssForCausalLM", "seed_oss"),
    "mixtral": small("MixtralForCausalLM", "mixtral", num_local_experts=6, num_experts_per_tok=2),
    "qwen2-moe": small(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[1],
        **_EXPERTS,
    ),
    "qwen2-moe, sliding": small(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        use_sliding_window=True,
        sliding_window=32,
        max_window_layers=3,
        qkv_bias=False,
        **_EXPERTS,
    ),
    "qwen3-moe": small(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        head_dim=32,
        moe_intermediate_size=24,
        decoder_sparse_step=2,
        **_EXPERTS,
    ),
    "qwen3-moe without experts": small(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        moe_intermediate_size=24,
        num_experts=0,
        num_experts_per_tok=2,
        use_sliding_window=True,
    ),
    "olmoe": small("OlmoeForCausalLM", "olmoe", **_EXPERTS),
    "deepseek-v2": small(
        "DeepseekV2ForCausalLM", "deepseek_v2", q_lora_rank=None, first_k_dense_replace=1, **_LATENT
    ),
    "deepseek-v2 with a latent of queries": small(
        "DeepseekV2ForCausalLM", "deepseek_v2", q_lora_rank=24, attention_bias=True, **_LATENT
    ),
    "deepseek-v3": small("DeepseekV3ForCausalLM", "deepseek_v3", q_lora_rank=24, **_LATENT),
    "gpt-oss": small("GptOssForCausalLM", "gpt_oss", num_local_experts=6, num_experts_per_tok=2),
}


def spec_of(config: Mapping[str, object], *, file: str = "config.json") -> ModelSpec:
    return build_spec(config, id="test", source=ModelSource(kind="folder", path="."), file=file)


def transformers_model(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], list[int]]:
    """State dict (tied weights once) and window of each layer (0 for none) in transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    fields = {name: value for name, value in config.items() if name != "model_type"}
    theirs = AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    everything = dict(model.named_parameters(remove_duplicate=False))
    duplicates = everything.keys() - dict(model.named_parameters()).keys()
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in duplicates
    }
    cache = DynamicCache(config=theirs)
    return shapes, [getattr(layer, "sliding_window", None) or 0 for layer in cache.layers]
