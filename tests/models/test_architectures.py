from __future__ import annotations

import pytest

from oomproof.errors import ConfigError
from oomproof.formats import DType
from oomproof.models.architectures import families
from oomproof.models.spec import Role
from tests.models.configs import SMALL_CONFIGS, small, spec_of, transformers_model

LLAMA = SMALL_CONFIGS["llama"]


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_tensors_and_windows_are_those_of_transformers_in_its_order(name: str) -> None:
    config = SMALL_CONFIGS[name]
    spec = spec_of(config)
    shapes, windows = transformers_model(config)
    assert [(tensor.name, tensor.shape) for tensor in spec.tensors] == list(shapes.items())
    assert [layer.sliding_window or 0 for layer in spec.attention] == windows


def test_every_family_is_compared_with_transformers() -> None:
    compared = {spec_of(config).family for config in SMALL_CONFIGS.values()}
    assert compared == {family.name for family in families().values()}


def test_families_have_names_and_model_types_of_their_own() -> None:
    registered = families().values()
    assert len({family.name for family in registered}) == len(registered)
    assert len({family.model_type for family in registered}) == len(registered)


def test_roles_tell_what_is_quantized() -> None:
    roles = {tensor.name: tensor.role for tensor in spec_of(SMALL_CONFIGS["qwen2-moe"]).tensors}
    assert roles["model.embed_tokens.weight"] is Role.EMBEDDING
    assert roles["model.layers.0.self_attn.q_proj.weight"] is Role.LINEAR
    assert roles["model.layers.0.self_attn.q_proj.bias"] is Role.BIAS
    assert roles["model.layers.0.input_layernorm.weight"] is Role.NORM
    assert roles["model.layers.0.mlp.gate.weight"] is Role.ROUTER
    assert roles["model.layers.0.mlp.experts.down_proj"] is Role.EXPERTS
    assert roles["model.layers.1.mlp.down_proj.weight"] is Role.LINEAR
    assert roles["lm_head.weight"] is Role.HEAD


def test_only_tensors_of_decoder_layers_have_a_layer() -> None:
    spec = spec_of(SMALL_CONFIGS["gemma3-multimodal"])
    for tensor in spec.tensors:
        in_decoder = tensor.name.startswith("model.language_model.layers.")
        assert (tensor.layer is not None) == in_decoder


def test_a_tied_head_is_listed_once() -> None:
    names = [tensor.name for tensor in spec_of(SMALL_CONFIGS["llama, tied, biases"]).tensors]
    assert "lm_head.weight" not in names


def test_attention_of_each_layer_is_described() -> None:
    spec = spec_of(SMALL_CONFIGS["llama, tied, biases"])
    assert len(spec.attention) == spec.num_hidden_layers
    assert spec.attention[0].num_key_value_heads == 4
    assert spec.attention[0].key_head_dim == spec.attention[0].value_head_dim == 32


def test_the_widest_mlp_counts_the_experts_of_one_token() -> None:
    assert spec_of(LLAMA).intermediate_size == 96
    assert spec_of(SMALL_CONFIGS["mixtral"]).intermediate_size == 2 * 96
    assert spec_of(SMALL_CONFIGS["qwen2-moe"]).intermediate_size == max(96, 2 * 24 + 40)
    assert spec_of(SMALL_CONFIGS["qwen3-moe"]).num_experts_per_token == 2
    assert spec_of(SMALL_CONFIGS["mixtral"]).num_experts == 6


def test_dense_families_ignore_fields_of_experts() -> None:
    spec = spec_of({**LLAMA, "num_experts": 8, "num_experts_per_tok": 2})
    assert spec.num_experts == spec.num_experts_per_token == 0
    assert spec.tensors == spec_of(LLAMA).tensors


def test_soft_capping_is_read() -> None:
    assert spec_of(SMALL_CONFIGS["gemma2"]).eager_attention
    uncapped = {**SMALL_CONFIGS["gemma2"], "attn_logit_softcapping": None}
    assert not spec_of(uncapped).eager_attention


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, DType.BFLOAT16),
        ({"dtype": "float16"}, DType.FLOAT16),
        ({"dtype": "torch.bfloat16"}, DType.BFLOAT16),
        ({"torch_dtype": None, "dtype": "bfloat16"}, DType.BFLOAT16),
        ({}, DType.FLOAT32),
    ],
)
def test_dtype_is_read_under_both_names(fields: dict[str, object], dtype: DType) -> None:
    assert spec_of({**LLAMA, **fields}).dtype is dtype


def test_dtype_of_a_nested_text_config_is_read() -> None:
    config = SMALL_CONFIGS["gemma3-multimodal"]
    text = config["text_config"]
    assert isinstance(text, dict)
    nested = {**config, "text_config": {**text, "torch_dtype": "bfloat16"}}
    assert spec_of(nested).dtype is DType.BFLOAT16


def test_the_method_of_a_quantized_checkpoint_is_read() -> None:
    quantized = {**LLAMA, "quantization_config": {"quant_method": "mxfp4"}}
    found = spec_of(quantized).checkpoint_quantization
    assert found is not None
    assert (found.method, found.format) == ("mxfp4", None)
    assert spec_of(LLAMA).checkpoint_quantization is None


def test_model_type_is_enough() -> None:
    named = {name: value for name, value in LLAMA.items() if name != "architectures"}
    assert spec_of(named).tensors == spec_of(LLAMA).tensors


def test_an_unknown_architecture_is_answered_with_the_closest_and_all_others() -> None:
    config = small("LamaForCausalLM", "llama", auto_map={"AutoConfig": "configuration.Lama"})
    with pytest.raises(ConfigError) as caught:
        spec_of(config, file="somewhere/config.json")
    message = str(caught.value)
    assert message.startswith("somewhere/config.json, field 'architectures': 'LamaForCausalLM'")
    assert "the closest is LlamaForCausalLM" in message
    assert all(architecture in message for architecture in families())


def test_a_family_that_lives_on_experts_needs_some() -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        spec_of({**SMALL_CONFIGS["mixtral"], "num_local_experts": 0})
