from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import ConfigError
from oomproof.models.config import MAX_CONFIG_BYTES, MAX_DEPTH, read_config
from oomproof.models.spec import ModelSpec
from tests.models.configs import SMALL_CONFIGS, small, spec_of

LLAMA = SMALL_CONFIGS["llama"]
VISION = SMALL_CONFIGS["gemma3-multimodal"]
FILE = "org/model/config.json"


def changed(config: Mapping[str, object] = LLAMA, /, **fields: object) -> dict[str, object]:
    return {**config, **fields}


def without(*names: str) -> dict[str, object]:
    return {name: value for name, value in LLAMA.items() if name not in names}


def vision(**fields: object) -> dict[str, object]:
    tower = VISION["vision_config"]
    assert isinstance(tower, dict)
    return {**VISION, "vision_config": {**tower, **fields}}


# What the author of the file did → the file, the field that is blamed, words of the message.
HOSTILE: dict[str, tuple[dict[str, object], str | None, str]] = {
    "no layers": (changed(num_hidden_layers=0), "num_hidden_layers", "0 is not within 1 and 1,024"),
    "negative layers": (changed(num_hidden_layers=-1), "num_hidden_layers", "-1 is not within"),
    "a billion layers": (changed(num_hidden_layers=10**9), "num_hidden_layers", "1,024"),
    "layers missing": (without("num_hidden_layers"), "num_hidden_layers", "is missing"),
    "layers null": (changed(num_hidden_layers=None), "num_hidden_layers", "is missing"),
    "layers true": (changed(num_hidden_layers=True), "num_hidden_layers", "not a whole number"),
    "hidden size as text": (changed(hidden_size="64"), "hidden_size", "'64'"),
    "hidden size as list": (changed(hidden_size=[64]), "hidden_size", "not a whole number"),
    "hidden size as object": (changed(hidden_size={"a": 1}), "hidden_size", "not a whole number"),
    "hidden size as float": (changed(hidden_size=64.0), "hidden_size", "64.0"),
    "hidden size null": (changed(hidden_size=None), "hidden_size", "is missing"),
    "hidden size huge": (changed(hidden_size=10**300), "hidden_size", "131,072"),
    "a number beyond floats": (changed(rms_norm_eps=10**400), "rms_norm_eps", "too large a number"),
    "hidden size twice": (changed(n_embd=65), "n_embd", "contradicts 'hidden_size'"),
    "vocabulary huge": (changed(vocab_size=10**12), "vocab_size", "2,000,000"),
    "MLP without width": (changed(intermediate_size=0), "intermediate_size", "0 is not within"),
    "no heads": (changed(num_attention_heads=0), "num_attention_heads", "0 is not within"),
    "heads that do not divide": (
        changed(num_attention_heads=7, num_key_value_heads=7),
        "num_attention_heads",
        "7 does not divide hidden_size 64",
    ),
    "more heads than width": (
        changed(hidden_size=4),
        "num_attention_heads",
        "8 does not divide hidden_size 4",
    ),
    "key-value heads that do not divide": (
        changed(num_key_value_heads=3),
        "num_key_value_heads",
        "3 does not divide num_attention_heads 8",
    ),
    "more key-value heads than heads": (
        changed(num_key_value_heads=16),
        "num_key_value_heads",
        "16 does not divide",
    ),
    "head dim huge": (changed(head_dim=10**6), "head_dim", "1,024"),
    "head dim negative": (changed(head_dim=-64), "head_dim", "-64"),
    "context zero": (changed(max_position_embeddings=0), "max_position_embeddings", "0 is not"),
    "context missing": (without("max_position_embeddings"), "max_position_embeddings", "missing"),
    "tied as text": (changed(tie_word_embeddings="yes"), "tie_word_embeddings", "'yes'"),
    "tied as number": (changed(tie_word_embeddings=1), "tie_word_embeddings", "true or false"),
    "bias as null text": (changed(attention_bias="null"), "attention_bias", "true or false"),
    "unknown dtype": (changed(torch_dtype="float12"), "dtype", "'float12' is not one of"),
    "dtype that holds no weights": (changed(dtype="int64"), "dtype", "'int64' is not one of"),
    "dtype as number": (changed(torch_dtype=16), "dtype", "16 is not a name"),
    "two dtypes": (changed(dtype="bfloat16", torch_dtype="float16"), "torch_dtype", "contradicts"),
    "quantization as text": (changed(quantization_config="4bit"), "quantization_config", "object"),
    "quantization without method": (
        changed(quantization_config={"bits": 4}),
        "quantization_config.quant_method",
        "is missing",
    ),
    "layer types too short": (
        changed(layer_types=["full_attention"]),
        "layer_types",
        "1 entries for 4 layers",
    ),
    "layer types of another kind": (
        changed(layer_types=["mamba"] * 4),
        "layer_types",
        "'mamba' attention is not supported",
    ),
    "layer types as text": (changed(layer_types="full_attention"), "layer_types", "not a list"),
    "layer types of numbers": (changed(layer_types=[1] * 4), "layer_types", "1 is not a name"),
    "window negative": (
        changed(SMALL_CONFIGS["mistral"], sliding_window=-1),
        "sliding_window",
        "-1 is not within",
    ),
    "pattern zero": (
        changed(SMALL_CONFIGS["gemma3"], sliding_window_pattern=0),
        "sliding_window_pattern",
        "0 is not within",
    ),
    "too many experts": (
        changed(SMALL_CONFIGS["mixtral"], num_local_experts=10**9),
        "num_experts",
        "4,096",
    ),
    "too many experts over all layers": (
        changed(SMALL_CONFIGS["mixtral"], num_local_experts=4096, num_hidden_layers=1024),
        "num_experts",
        "4096 in each of 1024 layers is more than 262,144",
    ),
    "more experts chosen than there are": (
        changed(SMALL_CONFIGS["mixtral"], num_experts_per_tok=7),
        "num_experts_per_tok",
        "7 is not within 1 and 6",
    ),
    "no experts": (changed(SMALL_CONFIGS["mixtral"], num_local_experts=0), "num_experts", "0"),
    "expert width missing": (
        changed(SMALL_CONFIGS["qwen3-moe"], moe_intermediate_size=None),
        "moe_intermediate_size",
        "is missing",
    ),
    "shared experts null": (
        changed(SMALL_CONFIGS["deepseek-v2"], n_shared_experts=None),
        "n_shared_experts",
        "is missing",
    ),
    "no shared experts": (
        changed(SMALL_CONFIGS["deepseek-v3"], n_shared_experts=0),
        "n_shared_experts",
        "0 is not within 1 and 64",
    ),
    "sparse step zero": (
        changed(SMALL_CONFIGS["qwen3-moe"], decoder_sparse_step=0),
        "decoder_sparse_step",
        "0 is not within",
    ),
    "dense layers as number": (
        changed(SMALL_CONFIGS["qwen3-moe"], mlp_only_layers=3),
        "mlp_only_layers",
        "not a list",
    ),
    "text config missing": (changed(VISION, text_config=None), "text_config", "is missing"),
    "text config as list": (changed(VISION, text_config=[]), "text_config", "not an object"),
    "vision tower of a million layers": (
        vision(num_hidden_layers=10**6),
        "vision_config.num_hidden_layers",
        "1,024",
    ),
    "vision patches larger than the image": (
        vision(patch_size=1000),
        "vision_config.patch_size",
        "1000 is more than image_size 56",
    ),
    "vision tower with a pooling head": (
        vision(vision_use_head=True),
        "vision_config.vision_use_head",
        "not supported",
    ),
    "vision tower of absurd size": (
        vision(hidden_size=131_072, intermediate_size=1_048_576, num_hidden_layers=1024),
        None,
        "the bound is 10,000,000,000,000",
    ),
    "absurdly many parameters": (
        changed(
            hidden_size=131_072,
            intermediate_size=1_048_576,
            num_hidden_layers=1024,
            num_attention_heads=1024,
            num_key_value_heads=1024,
        ),
        None,
        "the bound is 10,000,000,000,000",
    ),
    "unknown architecture": (
        changed(architectures=["Evil"], auto_map={"AutoModel": "evil.Evil"}),
        "architectures",
        "'Evil' is unknown",
    ),
    "architecture of another task": (
        changed(architectures=["LlamaForSequenceClassification"]),
        "architectures",
        "'LlamaForSequenceClassification' is unknown",
    ),
    "architectures as text": (changed(architectures="LlamaForCausalLM"), "architectures", "list"),
    "architecture of a million letters": (
        changed(architectures=["A" * 10**6]),
        "architectures",
        "not a name",
    ),
    "no architecture at all": (
        without("architectures", "model_type"),
        "architectures",
        "is missing, and so is model_type",
    ),
    "unknown model type": (
        {**without("architectures"), "model_type": "lama"},
        "model_type",
        "the closest is llama",
    ),
    "model type that contradicts": (
        changed(model_type="mistral"),
        "model_type",
        "contradicts LlamaForCausalLM",
    ),
    "empty": ({}, "architectures", "is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_is_refused_at_once_and_blamed(name: str) -> None:
    config, field, words = HOSTILE[name]
    data = json.dumps(config).encode()
    with pytest.raises(ConfigError) as caught:
        spec_of(read_config(data, file=FILE), file=FILE)
    assert caught.value.file == FILE
    assert caught.value.field == field
    assert words in str(caught.value)
    assert str(caught.value).startswith(FILE)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"<html>", "is not JSON"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'"text"', "holds a str"),
        (b'{"hidden_size": NaN}', "NaN is not a finite number"),
        (b'{"hidden_size": -Infinity}', "-Infinity is not a finite number"),
        (b'{"hidden_size": 1e999}', "1e999 is not a finite number"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "field 'hidden_size': occurs twice"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b"[" * 1_000_000, f"more than {MAX_DEPTH} levels"),
        (b'{"a":' * 500_000 + b"1" + b"}" * 500_000, f"more than {MAX_DEPTH} levels"),
        (b" " * (MAX_CONFIG_BYTES + 1), "has 4.00 MiB, the bound is 4.00 MiB"),
        (b"[" + b"[]," * 1_000_000 + b"[]]", "holds a list"),
        (b'"' + b"\\" * (MAX_CONFIG_BYTES - 1), "is not JSON"),
        (b'"' + b'\\"' * (MAX_CONFIG_BYTES // 2 - 1), "is not JSON"),
        (b'""' * (MAX_CONFIG_BYTES // 2), "is not JSON"),
    ],
)
def test_a_file_that_is_no_config_is_refused_at_once(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(data, file=FILE)
    assert words in str(caught.value)
    assert str(caught.value).startswith(FILE)


def test_brackets_inside_text_are_not_nesting() -> None:
    text = "[{" * 1000 + '\\"'
    assert read_config(json.dumps({"name": text}).encode(), file=FILE) == {"name": text}


def test_messages_have_no_control_characters() -> None:
    with pytest.raises(ConfigError) as caught:
        spec_of(changed(torch_dtype="\x1b[31m\n\ud800"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("num_hidden_layers", "n_layer"),
        ("num_hidden_layers", "num_layers"),
        ("hidden_size", "n_embd"),
        ("num_attention_heads", "n_head"),
        ("num_key_value_heads", "num_kv_heads"),
        ("max_position_embeddings", "n_positions"),
    ],
)
def test_a_field_is_read_under_its_other_names(name: str, alias: str) -> None:
    assert spec_of({**without(name), alias: LLAMA[name]}) == spec_of(LLAMA)


def test_two_names_that_agree_are_one_fact() -> None:
    assert spec_of(changed(n_layer=4, num_layers=None)) == spec_of(LLAMA)


def test_the_largest_allowed_config_is_described_quickly() -> None:
    config = small("MixtralForCausalLM", "mixtral", num_local_experts=256, num_experts_per_tok=256)
    spec = spec_of({**config, "num_hidden_layers": 1024})
    assert len(spec.attention) == 1024


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**30), max_value=10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["full_attention", "bfloat16", "LlamaForCausalLM", "mixtral"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
field_names = st.sampled_from(
    sorted(
        {field for config in SMALL_CONFIGS.values() for field in config}
        | {"hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"}
    )
)


@settings(max_examples=300, deadline=2000)
@given(
    config=st.sampled_from(list(SMALL_CONFIGS.values())),
    changes=st.dictionaries(field_names, json_values, max_size=3),
    removed=st.sets(field_names, max_size=2),
)
def test_any_change_gives_a_model_or_one_error(
    config: dict[str, object], changes: dict[str, object], removed: set[str]
) -> None:
    mutated = {name: value for name, value in (config | changes).items() if name not in removed}
    try:
        spec = spec_of(read_config(json.dumps(mutated).encode(), file=FILE), file=FILE)
    except ConfigError:
        return
    assert isinstance(spec, ModelSpec)
    assert spec.num_parameters > 0
    assert all(size > 0 for tensor in spec.tensors for size in tensor.shape)


@settings(max_examples=200)
@given(data=st.binary(max_size=200) | st.text('{}[]",:0e-\\u aN', max_size=200).map(str.encode))
def test_any_bytes_give_an_object_or_one_error(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(read_config(data, file=FILE), dict)
