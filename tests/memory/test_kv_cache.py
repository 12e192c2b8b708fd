"""Bytes of keys and values, by hand and by law."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import DType
from oomproof.memory.kv_cache import KV_FORMATS, PAGE_TOKENS, layer_kv_bytes, planned_tokens
from oomproof.models.resolve import resolve
from oomproof.models.spec import AttentionSpec

law = settings(derandomize=True, deadline=None, max_examples=200)

ATTENTION = st.builds(
    AttentionSpec,
    num_key_value_heads=st.integers(1, 64),
    key_head_dim=st.sampled_from([32, 64, 128, 192]),
    value_head_dim=st.sampled_from([32, 64, 128]),
    sliding_window=st.none() | st.integers(1, 8192),
)


def model_kv_bytes(name: str, context: int, *, concurrency: int = 1) -> int:
    return sum(
        layer_kv_bytes(layer, context=context, concurrency=concurrency, dtype=DType.BFLOAT16)
        for layer in resolve(name).attention
    )


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("llama-3.1-405b", 516_096),
        # No grouped queries: 2 × 32 layers × 4096 × 2 bytes.
        ("llama-2-7b", 524_288),
    ],
)
def test_a_token_takes_the_fields_figure(name: str, per_token: int) -> None:
    assert model_kv_bytes(name, 4096) == 4096 * per_token


def test_requests_at_once_multiply_the_cache() -> None:
    assert model_kv_bytes("llama-3.1-8b", 4096, concurrency=7) == 7 * 4096 * 131_072


def test_every_layer_of_mistral_v0_1_keeps_no_more_than_its_window() -> None:
    per_token = 2 * 32 * 8 * 128 * 2
    assert model_kv_bytes("mistral-7b-v0.1", 2048) == 2048 * per_token
    assert model_kv_bytes("mistral-7b-v0.1", 32_768) == 4096 * per_token


def test_only_the_sliding_layers_of_gemma_3_stop_at_their_window() -> None:
    attention = resolve("gemma-3-27b").attention
    sliding = [layer for layer in attention if layer.sliding_window is not None]
    assert {layer.sliding_window for layer in sliding} == {1024}
    assert len(attention) - len(sliding) == 10
    per_layer_token = 2 * 16 * 128 * 2
    expected = per_layer_token * (10 * 32_768 + len(sliding) * 1024)
    assert model_kv_bytes("gemma-3-27b", 32_768) == expected


def test_keys_and_values_may_differ_in_width() -> None:
    layer = AttentionSpec(num_key_value_heads=2, key_head_dim=192, value_head_dim=128)
    found = layer_kv_bytes(layer, context=256, concurrency=1, dtype=DType.FLOAT16)
    assert found == 2 * (192 + 128) * 256 * 2


def test_the_overhead_is_counted_once_a_request() -> None:
    layer = AttentionSpec(num_key_value_heads=1, key_head_dim=64, value_head_dim=64)
    found = layer_kv_bytes(
        layer, context=1, concurrency=3, dtype=DType.BFLOAT16, overhead_bytes=512
    )
    assert found == 3 * (128 * 256 * 2 + 512)


def test_fp8_keys_take_half_of_16_bits() -> None:
    layer = AttentionSpec(num_key_value_heads=8, key_head_dim=128, value_head_dim=128)
    sizes = {
        name: layer_kv_bytes(layer, context=1000, concurrency=2, dtype=dtype)
        for name, dtype in KV_FORMATS.items()
    }
    assert sizes["bf16"] == sizes["fp16"] == 2 * sizes["fp8"]


@pytest.mark.parametrize(("context", "tokens"), [(1, 256), (256, 256), (257, 512), (8192, 8192)])
def test_contexts_are_rounded_up_to_pages(context: int, tokens: int) -> None:
    assert planned_tokens(context) == tokens


@law
@given(st.integers(1, 10**7))
def test_a_page_is_the_most_that_rounding_adds(context: int) -> None:
    assert context <= planned_tokens(context) < context + PAGE_TOKENS
    assert planned_tokens(context) % PAGE_TOKENS == 0


@law
@given(ATTENTION, st.integers(1, 200_000), st.integers(0, 50_000), st.integers(1, 64))
def test_bytes_never_fall_with_context_concurrency_or_precision(
    layer: AttentionSpec, context: int, more: int, concurrency: int
) -> None:
    def size(context: int, concurrency: int, dtype: DType = DType.BFLOAT16) -> int:
        return layer_kv_bytes(layer, context=context, concurrency=concurrency, dtype=dtype)

    here = size(context, concurrency)
    assert here <= size(context + more, concurrency)
    assert here == concurrency * size(context, 1)
    assert here == 2 * size(context, concurrency, DType.FLOAT8_E4M3FN)


@law
@given(ATTENTION, st.integers(1, 200_000))
def test_a_window_never_takes_more_than_full_attention(layer: AttentionSpec, context: int) -> None:
    full = AttentionSpec(
        num_key_value_heads=layer.num_key_value_heads,
        key_head_dim=layer.key_head_dim,
        value_head_dim=layer.value_head_dim,
    )
    windowed, whole = (
        layer_kv_bytes(each, context=context, concurrency=1, dtype=DType.BFLOAT16)
        for each in (layer, full)
    )
    assert windowed <= whole
    if layer.sliding_window is None or layer.sliding_window >= planned_tokens(context):
        assert windowed == whole


def test_latent_attention_keeps_one_latent_for_all_heads() -> None:
    spec = resolve("deepseek-v3")
    per_token = sum(
        layer_kv_bytes(layer, context=256, concurrency=1, dtype=DType.BFLOAT16)
        for layer in spec.attention
    )
    # 61 layers of 512 + 64 values: the 70 KB a token of the DeepSeek-V3 report.
    assert per_token == 256 * 61 * (512 + 64) * 2
    layer = spec.attention[0]
    assert layer.is_latent
    assert (layer.query_head_dim, layer.output_head_dim) == (192, 128)
    expanded = 61 * 128 * (192 + 128) * 2
    assert expanded / (per_token / 256) > 70


@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT8_E4M3FN])
@pytest.mark.parametrize("context", [1, 256, 1024, 1025, 4096, 8192])
def test_hybrid_layers_keep_their_window_and_the_others_everything(
    dtype: DType, context: int
) -> None:
    spec = resolve("gemma-3-27b")
    windows = {layer.sliding_window for layer in spec.attention}
    assert windows == {1024, None}
    for layer in spec.attention:
        tokens = -(-context // 256) * 256
        if layer.sliding_window is not None:
            tokens = min(tokens, layer.sliding_window)
        per_token = layer.num_key_value_heads * (layer.key_head_dim + layer.value_head_dim)
        found = layer_kv_bytes(layer, context=context, concurrency=2, dtype=dtype)
        assert found == 2 * tokens * per_token * dtype.itemsize
