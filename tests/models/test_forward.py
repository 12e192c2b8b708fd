"""How a decoder computes, read from config.json: numbers, or the reason why ours does not."""

from __future__ import annotations

import contextlib
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import ConfigError
from oomproof.models.config import ConfigReader
from oomproof.models.forward import ROPE_KINDS, Forward, ForwardSpec, RopeSpec, read_forward
from tests.models.configs import SMALL_CONFIGS, small, spec_of

law = settings(derandomize=True, deadline=None, max_examples=200)

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
NATIVE = {"llama", "mistral", "ministral", "qwen2", "qwen3", "granite", "seed-oss"}


def read(fields: dict[str, Any], *, head_dim: int = 64) -> ForwardSpec | str:
    values = {"max_position_embeddings": 256, **fields}
    return read_forward(
        ConfigReader(values=values, file="config.json"), Forward(), head_dim=head_dim
    )


def numbers(fields: dict[str, Any]) -> ForwardSpec:
    found = read(fields)
    assert isinstance(found, ForwardSpec), found
    return found


def rope(fields: dict[str, Any]) -> RopeSpec:
    return numbers(fields).rope


# --- what every decoder has


def test_a_silent_file_gives_the_fields_defaults() -> None:
    assert numbers({}) == ForwardSpec(
        rms_norm_eps=1e-6, rope=RopeSpec(theta=10_000.0), attention_scale=0.125
    )


def test_a_files_numbers_are_taken() -> None:
    found = numbers({"rms_norm_eps": 1e-5, "rope_theta": 500_000, "hidden_act": "silu"})
    assert (found.rms_norm_eps, found.rope) == (1e-5, RopeSpec(theta=500_000.0))


def test_multipliers_belong_to_the_families_that_name_them() -> None:
    fields = {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078125,
        "logits_scaling": 16.0,
    }
    granite = spec_of(SMALL_CONFIGS["granite"] | fields).forward
    assert granite is not None
    assert granite.embedding_multiplier == 12.0
    assert granite.residual_multiplier == 0.22
    assert granite.attention_scale == 0.0078125
    assert granite.logits_divisor == 16.0
    plain = spec_of(SMALL_CONFIGS["llama"] | fields).forward
    assert plain is not None
    assert plain == spec_of(SMALL_CONFIGS["llama"]).forward
    assert (plain.embedding_multiplier, plain.residual_multiplier, plain.logits_divisor) == (
        (1.0, 1.0, 1.0)
    )
    assert plain.attention_scale == 8**-0.5


def test_a_granite_that_names_no_multiplier_scales_its_scores_by_one() -> None:
    found = spec_of(SMALL_CONFIGS["granite"]).forward
    assert found is not None
    assert (found.attention_scale, found.embedding_multiplier) == (1.0, 1.0)
    assert (found.residual_multiplier, found.logits_divisor) == (1.0, 1.0)


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_a_model_has_its_numbers_or_a_reason_why_it_has_none(name: str) -> None:
    spec = spec_of(SMALL_CONFIGS[name])
    if spec.family in NATIVE:
        assert spec.forward is not None
        assert spec.not_native is None
    else:
        assert spec.forward is None
        assert spec.not_native == "the native engine has no decoder of this family yet"


def test_every_family_that_is_computed_here_is_tested_here() -> None:
    specs = [spec_of(config) for config in SMALL_CONFIGS.values()]
    assert {spec.family for spec in specs if spec.forward is not None} == NATIVE


# --- rotary positions


@pytest.mark.parametrize("kind", ROPE_KINDS)
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_a_kind_reads_alike_in_the_words_of_any_transformers(key: str, kind: str) -> None:
    stretched = {key: kind} | ({} if kind == "default" else YARN)
    new = rope({"rope_parameters": {**stretched, "rope_theta": 5e5}})
    old = rope({"rope_scaling": stretched, "rope_theta": 5e5})
    mixed = rope({"rope_parameters": stretched, "rope_theta": 5e5})
    assert new == old == mixed
    assert (new.theta, new.kind) == (5e5, kind)
    assert new.factor == (1.0 if kind == "default" else 4.0)


def test_what_stretches_llama_3_1_is_read() -> None:
    assert rope({"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5}) == RopeSpec(
        theta=5e5,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.5,
        high_freq_factor=5.0,
        original_max_position_embeddings=8192,
    )


def test_what_stretches_by_yarn_is_read() -> None:
    options = {"attention_factor": 1.25, "beta_fast": 24, "beta_slow": 2, "truncate": True}
    assert rope({"rope_parameters": {"rope_type": "yarn", **YARN, **options}}) == RopeSpec(
        theta=10_000.0,
        kind="yarn",
        factor=4.0,
        original_max_position_embeddings=64,
        attention_factor=1.25,
        beta_fast=24.0,
        beta_slow=2.0,
    )


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_the_original_length_is_beside_the_parameters_or_among_them_or_the_maximum(
    kind: str,
) -> None:
    def original(inside: int | None, beside: int | None) -> int:
        parameters = {"rope_type": kind, **LLAMA3, "original_max_position_embeddings": inside}
        fields = {"rope_parameters": parameters, "original_max_position_embeddings": beside}
        return rope(fields).original_max_position_embeddings

    assert original(64, None) == 64
    assert original(64, 32) == original(None, 32) == 32
    assert original(None, None) == 256


def test_an_empty_object_says_nothing() -> None:
    assert rope({"rope_parameters": {}, "rope_scaling": {}}) == RopeSpec(theta=10_000.0)
    both = {"rope_scaling": {}, "rope_parameters": {"rope_theta": 7e4}}
    assert rope(both) == RopeSpec(theta=7e4)


def test_a_whole_head_may_be_named_as_such() -> None:
    for fields in (
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1}},
    ):
        assert isinstance(read(fields), ForwardSpec)


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"rope_theta": 777.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 777.0},
    "llama3": {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "rope_theta": 5e5}},
    "llama3, short": {
        "rope_scaling": {
            "rope_type": "llama3",
            **LLAMA3,
            "original_max_position_embeddings": 128,
        }
    },
    "yarn": {"rope_scaling": {"type": "yarn", **YARN}},
    "yarn, from the maximum": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn, length beside": {
        "rope_scaling": {"type": "yarn", **YARN},
        "original_max_position_embeddings": 32,
    },
    "yarn, every option": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            **YARN,
            "attention_factor": 1.3,
            "beta_fast": 20.0,
            "beta_slow": 3.0,
            "truncate": True,
        }
    },
    "two kinds at once": {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 4}},
    "both objects": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "rope_theta": 777.0,
    },
}


@pytest.mark.parametrize("fields", ROPES.values(), ids=ROPES)
def test_positions_are_rotated_as_transformers_rotates_them(fields: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from oomproof.engine.native.rotary import frequencies_of

    config = small("LlamaForCausalLM", "llama", head_dim=32, **fields)
    found = spec_of(config).forward
    assert found is not None
    frequencies, factor = frequencies_of(found.rope, 32)
    ours: dict[str, Any] = {name: config[name] for name in config if name != "model_type"}
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model("llama", **ours))
    assert torch.allclose(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling)


# --- reasons


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_act": "gelu"}, "computes silu, not 'gelu'"),
        ({"hidden_act": "x" * 200}, "computes silu, not 'xxx"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "no 'dynamic' rotary positions"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "no 'longrope' rotary positions"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "no 'mrope' rotary"),
        ({"partial_rotary_factor": 0.5}, "rotates whole heads, not 0.5 of them"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "rotates whole heads, not 0.25 of them",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
            "no yarn rotary positions with mscale",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", **YARN, "truncate": False}},
            "no yarn rotary positions without truncation",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            "rotates all layers alike",
        ),
    ],
)
def test_what_the_decoder_cannot_say_is_a_reason(fields: dict[str, Any], reason: str) -> None:
    found = read(fields)
    assert isinstance(found, str)
    assert found.startswith("the native engine ")
    assert reason in found
    assert "\n" not in found
    assert len(found) < 200
    spec = spec_of(SMALL_CONFIGS["llama"] | fields)
    assert (spec.forward, spec.not_native) == (None, found)


def test_a_head_without_halves_is_a_reason() -> None:
    assert read({}, head_dim=15) == (
        "the native engine rotates the halves of a head, and 15 has none"
    )


def test_a_family_that_is_not_computed_here_is_not_read_any_further() -> None:
    reader = ConfigReader(values={"hidden_act": 5, "rope_theta": "x"}, file="config.json")
    assert read_forward(reader, None, head_dim=64) == (
        "the native engine has no decoder of this family yet"
    )


# --- refusals


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_act": 5}, "'hidden_act': 5 is not a name"),
        ({"rms_norm_eps": "x"}, "'rms_norm_eps': 'x' is not a number"),
        ({"rms_norm_eps": 0}, "'rms_norm_eps': 0 is not more than 0 and at most 1"),
        ({"rms_norm_eps": 1.5}, "'rms_norm_eps': 1.5 is not more than 0 and at most 1"),
        ({"rms_norm_eps": True}, "'rms_norm_eps': True is not a number"),
        ({"rope_theta": -1}, "'rope_theta': -1 is not more than 1"),
        ({"rope_theta": 1}, "'rope_theta': 1 is not more than 1"),
        ({"rope_theta": 1e13}, r"'rope_theta': 1e\+13 is not .* at most 1e\+12"),
        ({"rope_theta": 10**400}, "'rope_theta': 1000.* is too large a number"),
        ({"rope_parameters": "abc"}, "'rope_parameters': 'abc' is not an object"),
        ({"rope_scaling": [1]}, r"'rope_scaling': \[1\] is not an object"),
        ({"rope_scaling": 0}, "'rope_scaling': 0 is not an object"),
        (
            {"rope_parameters": {"rope_theta": "x"}},
            r"'rope_parameters\.rope_theta': 'x' is not a number",
        ),
        ({"rope_scaling": {"type": 3}}, r"'rope_scaling\.type': 3 is not a name"),
        ({"rope_scaling": {"rope_type": ""}}, r"'rope_scaling\.rope_type': '' is not a name"),
        ({"rope_scaling": {"type": "linear"}}, r"'rope_scaling\.factor': is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            r"'rope_scaling\.factor': 0\.5 is less than 1",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 1e7}},
            r"'rope_scaling\.factor': 1e\+07 is not .* at most 1e\+06",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 0}},
            r"'rope_scaling\.low_freq_factor': 0 is not more than 0",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": "4"}},
            r"'rope_scaling\.high_freq_factor': '4' is not a number",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    **LLAMA3,
                    "original_max_position_embeddings": 8192.5,
                }
            },
            r"'rope_scaling\.original_max_position_embeddings': 8192\.5 is not a whole number",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "attention_factor": -1.0}},
            r"'rope_scaling\.attention_factor': -1 is not more than 0",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "beta_fast": 0}},
            r"'rope_scaling\.beta_fast': 0 is not more than 0",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "truncate": "no"}},
            r"'rope_scaling\.truncate': 'no' is not true or false",
        ),
        ({"partial_rotary_factor": "half"}, "'partial_rotary_factor': 'half' is not a number"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_bound(
    fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json, field {named}"):
        read(fields)


@pytest.mark.parametrize(
    "field",
    ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"],
)
@pytest.mark.parametrize("value", [0, -0.5, 1e7, "x", False])
def test_a_wrong_multiplier_is_refused_with_its_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"field '{field}'"):
        spec_of(SMALL_CONFIGS["granite"] | {field: value})


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**400),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.sampled_from([*ROPE_KINDS, "dynamic", "longrope", "silu", "gelu"]),
)
_ROPE_FIELDS = [
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate",
    "partial_rotary_factor", "mscale",
]  # fmt: skip
_OBJECTS = st.dictionaries(st.sampled_from(_ROPE_FIELDS), _VALUES) | _VALUES
_FILES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("hidden_act", "rms_norm_eps", "rope_theta"), _VALUES),
        **dict.fromkeys(("rope_parameters", "rope_scaling"), _OBJECTS),
        "partial_rotary_factor": _VALUES,
        "original_max_position_embeddings": _VALUES,
    },
)


@law
@given(_FILES)
def test_any_file_gives_numbers_or_a_reason_or_one_error(fields: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        found = read(fields)
        if isinstance(found, str):
            assert found.startswith("the native engine ")
            return
        assert found.rope.kind in ROPE_KINDS
        values = (found.rms_norm_eps, found.rope.theta, found.rope.factor, found.attention_scale)
        assert all(0 < number < inf for number in values)
