"""Bytes of what lives while tokens are computed, against products written out by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import DType
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import HostSpec
from oomproof.memory.profiles import EngineProfile, engine_profile
from oomproof.memory.workspace import (
    WorkspaceShape,
    attention_bytes,
    chunk_tokens,
    dequantization_bytes,
    fragmentation_bytes,
    logits_bytes,
    mask_bytes,
    mlp_bytes,
    repacking_bytes,
    residual_bytes,
    score_bytes,
    workspace_bytes,
)
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec
from oomproof.units import GIB, MIB
from tests.models.configs import SMALL_CONFIGS, spec_of

law = settings(derandomize=True, deadline=None, max_examples=150)
HOST = HostSpec(
    total_ram_bytes=64 * GIB,
    available_ram_bytes=60 * GIB,
    free_disk_bytes=None,
    cpu_count=8,
    cpu_features=frozenset({"avx512_bf16"}),
)


@cache
def profile_of(machine: str) -> EngineProfile:
    hardware = describe(machine, host=HOST)
    return engine_profile("transformers", hardware.devices[0], HOST)


@cache
def model(name: str) -> ModelSpec:
    return spec_of(SMALL_CONFIGS[name]) if name in SMALL_CONFIGS else resolve(name)


def shape(
    context: int = 8192, *, largest_linear: int = 0, has_head: bool = False
) -> WorkspaceShape:
    return WorkspaceShape(
        context=context,
        compute_dtype=DType.BFLOAT16,
        largest_linear=largest_linear,
        has_head=has_head,
    )


def test_a_prompt_is_processed_in_chunks_of_the_profile() -> None:
    assert chunk_tokens(100, profile_of("24GiB")) == 256
    assert chunk_tokens(700, profile_of("24GiB")) == 768
    assert chunk_tokens(100_000, profile_of("24GiB")) == 1024
    assert chunk_tokens(100_000, profile_of("cpu")) == 256


def test_residuals_are_three_copies_and_two_in_float32() -> None:
    assert residual_bytes(model("llama"), tokens=10, itemsize=2) == 10 * 64 * (3 * 2 + 2 * 4)


def test_grouped_attention_expands_keys_and_values_to_every_query_head() -> None:
    # 8 query heads and 4 key-value heads of 8.
    projected = 10 * (3 * 64 + 2 * 4 * 16) * 2
    output = 2 * 10 * 64 * 2
    mask = 10 * 300 * (3 + 2)
    expanded = 300 * 8 * (8 + 8) * 2
    sizes = [
        attention_bytes(
            model("llama"), tokens=10, context=300, itemsize=2, expands_kv_heads=expands
        )
        for expands in (False, True)
    ]
    assert sizes == [projected + output + mask, projected + output + mask + expanded]


def test_ungrouped_attention_has_nothing_to_expand() -> None:
    spec = model("llama without key-value heads")
    sizes = {
        attention_bytes(spec, tokens=10, context=300, itemsize=2, expands_kv_heads=expands)
        for expands in (False, True)
    }
    assert len(sizes) == 1


def test_unfused_attention_holds_its_scores() -> None:
    capped = model("gemma2")
    assert capped.eager_attention
    plain = replace(capped, eager_attention=False)
    sizes = [
        attention_bytes(spec, tokens=10, context=300, itemsize=2, expands_kv_heads=True)
        for spec in (capped, plain)
    ]
    scores = score_bytes(capped, tokens=10, context=300, itemsize=2)
    assert scores == 8 * 10 * 300 * (3 * 2 + 4)
    assert sizes[0] - sizes[1] == scores


def test_products_are_those_computed_by_hand() -> None:
    spec = model("llama")
    assert mask_bytes(tokens=10, context=300, itemsize=2) == 10 * 300 * 5
    assert mlp_bytes(spec, tokens=10, itemsize=2) == 4 * 10 * 96 * 2
    assert logits_bytes(spec, 2) == 128 * (2 + 4 + 16 + 16)


def test_dequantizing_writes_a_16_bit_copy_and_absmax_twice() -> None:
    found = dequantization_bytes(shape(largest_linear=6400), profile_of("24GiB"))
    assert found == 6400 * 2 + 2 * 100 * 4


def test_a_cpu_that_repacks_needs_seven_bytes_a_weight_instead_of_a_copy() -> None:
    profile = profile_of("cpu")
    assert dequantization_bytes(shape(largest_linear=6400), profile) == 0
    assert repacking_bytes(shape(largest_linear=6400), profile) == 7 * 6400
    assert repacking_bytes(shape(largest_linear=6400), profile_of("24GiB")) == 0


def test_fragmentation_grows_with_half_of_the_dequantized_copy() -> None:
    profile = profile_of("24GiB")
    assert fragmentation_bytes(0, profile) == 96 * MIB
    assert fragmentation_bytes(1000, profile) == 96 * MIB + 500


def test_the_dequantized_copy_of_405b_is_what_the_field_measured() -> None:
    spec = model("llama-3.1-405b")
    largest = spec.hidden_size * spec.intermediate_size
    scratch = dequantization_bytes(shape(largest_linear=largest), profile_of("24GiB"))
    absmax = 2 * 4 * largest // 64
    assert (scratch - absmax) / GIB == pytest.approx(1.6, abs=0.05)


def test_the_whole_is_the_largest_moment_with_what_libraries_keep() -> None:
    spec, profile = model("llama"), profile_of("24GiB")
    attention = attention_bytes(spec, tokens=256, context=256, itemsize=2, expands_kv_heads=True)
    layer = residual_bytes(spec, 256, 2) + max(attention, mlp_bytes(spec, tokens=256, itemsize=2))
    kept = profile.library_workspace_bytes + profile.fragmentation_bytes
    assert workspace_bytes(spec, shape(100), profile) == kept + layer
    many_words = replace(spec, vocab_size=10**6)
    assert workspace_bytes(many_words, shape(100), profile) == kept + layer
    found = workspace_bytes(many_words, shape(100, has_head=True), profile)
    assert found == kept + logits_bytes(many_words, 2)


@law
@given(
    name=st.sampled_from([*sorted(SMALL_CONFIGS), "llama-3.1-8b", "gemma-2-9b", "mixtral-8x7b"]),
    machine=st.sampled_from(["24GiB", "H100", "cpu"]),
    context=st.integers(1, 150_000),
    more=st.integers(0, 50_000),
    linear=st.integers(0, 10**9),
    more_linear=st.integers(0, 10**8),
)
def test_workspace_never_falls_as_more_is_asked(
    name: str, machine: str, context: int, more: int, linear: int, more_linear: int
) -> None:
    spec, profile = model(name), profile_of(machine)
    here = workspace_bytes(spec, shape(context, largest_linear=linear), profile)
    assert here >= profile.library_workspace_bytes + profile.fragmentation_bytes
    assert here <= workspace_bytes(spec, shape(context + more, largest_linear=linear), profile)
    wider = shape(context, largest_linear=linear + more_linear)
    assert here <= workspace_bytes(spec, wider, profile)
    assert here <= workspace_bytes(
        spec, shape(context, largest_linear=linear, has_head=True), profile
    )
