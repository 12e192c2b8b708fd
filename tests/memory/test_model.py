"""The terms of a device for any range of a model's units, and the laws they obey."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import FORMATS, DType
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import HostSpec
from oomproof.memory.model import Demand, MemoryModel, WeightCosts, unit_of
from oomproof.memory.profiles import EngineProfile, engine_profile
from oomproof.memory.terms import DeviceTerms, HostTerms
from oomproof.memory.weights import resident_bytes, stored
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec, Role, TensorSpec
from oomproof.units import GIB
from tests.models.configs import SMALL_CONFIGS, small, spec_of

law = settings(derandomize=True, deadline=None, max_examples=80)
MACHINES = ("H100", "A100-80GB", "T4", "24GiB", "cpu", "cpu with avx512_bf16")
"""For transformers."""
NATIVE_MACHINES = ("native H100", "native RTX 3090", "native 24GiB", "native cpu")
CATALOG = ("llama-3.1-8b", "llama-3.2-1b", "mixtral-8x7b", "gemma-2-9b", "gemma-3-4b")


@cache
def known(name: str) -> ModelSpec:
    return spec_of(SMALL_CONFIGS[name]) if name in SMALL_CONFIGS else resolve(name)


@cache
def profile_of(machine: str) -> EngineProfile:
    name, _, feature = machine.removeprefix("native ").partition(" with ")
    host = HostSpec(
        total_ram_bytes=64 * GIB,
        available_ram_bytes=60 * GIB,
        free_disk_bytes=None,
        cpu_count=8,
        cpu_features=frozenset({feature} - {""}),
    )
    engine = "native" if machine.startswith("native ") else "transformers"
    return engine_profile(engine, describe(name, host=host).devices[0], host)


def memory_model(
    spec: ModelSpec,
    format_name: str = "bf16",
    machine: str = "24GiB",
    *,
    context: int = 8192,
    concurrency: int = 1,
    kv_dtype: DType = DType.BFLOAT16,
) -> MemoryModel:
    costs = WeightCosts(spec, FORMATS[format_name], profile_of(machine), DType.BFLOAT16)
    demand = Demand(context=context, concurrency=concurrency, kv_dtype=kv_dtype)
    return MemoryModel(costs, demand)


@st.composite
def llamas(draw: st.DrawFn) -> ModelSpec:
    heads, head_dim = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([8, 64]))
    return spec_of(
        small(
            "LlamaForCausalLM",
            "llama",
            hidden_size=heads * head_dim,
            head_dim=head_dim,
            num_attention_heads=heads,
            num_key_value_heads=draw(st.sampled_from([n for n in (1, 2, 4, 8) if n <= heads])),
            intermediate_size=draw(st.integers(1, 20_000)),
            num_hidden_layers=draw(st.integers(1, 8)),
            vocab_size=draw(st.integers(1, 300_000)),
            max_position_embeddings=2**20,
            tie_word_embeddings=draw(st.booleans()),
            attention_bias=draw(st.booleans()),
            torch_dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        )
    )


SPECS = llamas() | st.sampled_from(sorted(SMALL_CONFIGS)).map(known)
LARGE = st.sampled_from(CATALOG).map(known)
FORMAT_NAMES = st.sampled_from(sorted(FORMATS))
MACHINE_NAMES = st.sampled_from([*MACHINES, *NATIVE_MACHINES])
CONTEXTS = st.integers(1, 150_000)


def test_the_peak_is_the_equation_of_the_design() -> None:
    terms = DeviceTerms(
        cuda_context=1,
        weights=20,
        kv_cache=300,
        workspace=4000,
        staging=50_000,
        graphs=600_000,
        comm=7_000_000,
        margin=80_000_000,
    )
    assert terms.peak_bytes == 1 + 20 + (300 + 4000 + 600_000 + 7_000_000) + 80_000_000
    loading = replace(terms, staging=10**9)
    assert loading.peak_bytes == 1 + 20 + 10**9 + 80_000_000
    assert list(terms.as_dict()) == (
        ["cuda_context", "weights", "kv_cache", "workspace", "staging", "graphs", "comm", "margin"]
    )
    assert DeviceTerms().peak_bytes == 0


def test_the_hosts_peak_is_the_sum_of_its_terms() -> None:
    terms = HostTerms(runtime=1, staging=20, pinned=300, offloaded=4000, margin=50000)
    assert terms.peak_bytes == 54321
    assert list(terms.as_dict()) == ["runtime", "staging", "pinned", "offloaded", "margin"]


@law
@given(SPECS | LARGE, FORMAT_NAMES, MACHINE_NAMES, CONTEXTS, st.integers(1, 9))
def test_growing_peaks_equal_the_terms_of_every_range(
    spec: ModelSpec, format_name: str, machine: str, context: int, concurrency: int
) -> None:
    model = memory_model(spec, format_name, machine, context=context, concurrency=concurrency)
    for first in range(model.num_units):
        peaks = [
            model.terms(first, end).peak_bytes for end in range(first + 1, model.num_units + 1)
        ]
        assert list(model.peaks_from(first)) == peaks
        assert [
            model.peak_bytes(first, end) for end in range(first + 1, model.num_units + 1)
        ] == peaks
    assert list(model.peaks_from(model.num_units)) == []


@pytest.mark.parametrize(
    ("machine", "format_name"),
    [
        *(("24GiB", name) for name in ("bf16", "nf4-dq", "llm-int8")),
        *(("native 24GiB", name) for name in ("bf16", "nf4-dq", "int8", "int4")),
    ],
)
def test_growing_peaks_equal_the_terms_of_every_range_of_405b(
    machine: str, format_name: str
) -> None:
    model = memory_model(known("llama-3.1-405b"), format_name, machine, context=32_768)
    for first in (0, 1, 63, 126, 127):
        assert list(model.peaks_from(first)) == [
            model.terms(first, end).peak_bytes for end in range(first + 1, model.num_units + 1)
        ]


@law
@given(SPECS, FORMAT_NAMES, MACHINE_NAMES, CONTEXTS)
def test_a_longer_range_never_peaks_lower_unless_it_is_the_whole_model(
    spec: ModelSpec, format_name: str, machine: str, context: int
) -> None:
    model = memory_model(spec, format_name, machine, context=context)
    for first in range(model.num_units):
        peaks = list(model.peaks_from(first))[: -1 if first == 0 else None]
        assert peaks == sorted(peaks)
        if first + 1 < model.num_units:
            shorter = list(model.peaks_from(first + 1))
            assert all(a >= b for a, b in zip(peaks[1:], shorter, strict=False))


@law
@given(SPECS | LARGE, FORMAT_NAMES, MACHINE_NAMES)
def test_weights_and_cache_of_ranges_add_up_to_the_whole(
    spec: ModelSpec, format_name: str, machine: str
) -> None:
    model = memory_model(spec, format_name, machine)
    cuts = sorted({0, 1, model.num_units // 2, model.num_units - 1, model.num_units})
    for whole in (model.weights_bytes, model.traffic_bytes, model.kv_bytes):
        assert sum(whole(a, b) for a, b in pairwise(cuts)) == whole()
    profile = model.profile
    expected = profile.buffer_bytes + sum(
        resident_bytes(
            tensor,
            stored(tensor, FORMATS[format_name], DType.BFLOAT16, profile.quantized_roles),
            profile,
        )
        for tensor in spec.tensors
    )
    assert model.weights_bytes() == expected


def test_a_device_without_units_holds_nothing() -> None:
    model = memory_model(known("llama"))
    assert model.terms(3, 3) == DeviceTerms()
    assert model.terms(0, 0).peak_bytes == 0


def test_units_are_embedding_then_layers_then_norm_and_head() -> None:
    spec = known("llama-3.1-8b")
    units = {tensor.name: unit_of(tensor, spec) for tensor in spec.tensors}
    assert units["model.embed_tokens.weight"] == 0
    assert units["model.layers.0.mlp.up_proj.weight"] == 1
    assert units["model.layers.31.mlp.up_proj.weight"] == 32
    assert units["model.norm.weight"] == units["lm_head.weight"] == 33
    assert memory_model(spec).num_units == 34


def test_a_vision_tower_stands_where_the_embedding_is() -> None:
    spec = known("gemma3-multimodal")
    assert spec.decoder_prefix == "model.language_model"
    assert spec.extra_modules == ("model.vision_tower", "model.multi_modal_projector")
    outside = [t for t in spec.tensors if not t.name.startswith("model.language_model.")]
    assert outside
    assert {unit_of(tensor, spec) for tensor in outside} == {0}


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_every_decoder_layer_has_its_own_unit(name: str) -> None:
    spec = known(name)
    for tensor in spec.tensors:
        unit = unit_of(tensor, spec)
        assert 0 <= unit <= spec.num_hidden_layers + 1
        if tensor.layer is not None:
            assert unit == tensor.layer + 1
    assert {unit_of(tensor, spec) for tensor in spec.tensors} == set(
        range(spec.num_hidden_layers + 2)
    )


@pytest.mark.parametrize(("machine", "counters"), [("24GiB", 32 * 512), ("native 24GiB", 0)])
def test_the_cache_and_the_weights_of_8b_are_the_fields_figures(
    machine: str, counters: int
) -> None:
    terms = memory_model(known("llama-3.1-8b"), "nf4-dq", machine).terms(0, 34)
    assert terms.kv_cache == 8192 * 131_072 + counters
    assert terms.weights / 10**9 == pytest.approx(5.70, abs=0.01)
    assert terms.comm == 0


def test_only_transformers_passes_hidden_states_through_buffers_of_their_own() -> None:
    model = memory_model(known("llama-3.1-8b"), "nf4-dq", "native 24GiB")
    assert model.terms(0, 33).comm == model.terms(1, 34).comm == 0


def test_only_a_part_of_a_model_needs_buffers_for_neighbours() -> None:
    model = memory_model(known("llama-3.1-8b"))
    hidden_states = 2 * 1024 * 4096 * 2
    assert model.terms(0, 34).comm == 0
    assert model.terms(0, 33).comm == model.terms(1, 34).comm == hidden_states


def test_logits_are_computed_where_the_head_is() -> None:
    words = small("LlamaForCausalLM", "llama", vocab_size=10**6)
    untied = memory_model(spec_of(words), context=1)
    assert untied.terms(5, 6).workspace > untied.terms(4, 5).workspace
    assert untied.terms(0, 1).workspace == untied.terms(4, 5).workspace
    tied = memory_model(spec_of(words | {"tie_word_embeddings": True}), context=1)
    assert tied.terms(0, 1).workspace > tied.terms(1, 2).workspace
    assert tied.terms(5, 6).workspace == tied.terms(1, 2).workspace


def test_an_embedding_is_read_one_row_a_token_and_a_tied_one_whole() -> None:
    untied = memory_model(known("llama-3.1-8b"))
    assert untied.traffic_bytes(0, 1) == 4096 * 2
    tied = memory_model(known("llama-3.2-1b"))
    assert tied.traffic_bytes(0, 1) == 2048 * 2 + 128_256 * 2048 * 2


def test_a_token_reads_only_its_own_experts() -> None:
    spec = known("mixtral-8x7b")
    model = memory_model(spec)
    experts = sum(2 * t.numel for t in spec.tensors if t.role is Role.EXPERTS)
    idle = model.weights_bytes(1, model.num_units) - model.traffic_bytes(1, model.num_units)
    assert idle == experts * 6 // 8


def test_staging_counts_what_loading_a_tensor_takes() -> None:
    spec = known("llama-3.1-8b")
    kept = profile_of("24GiB").fragmentation_bytes
    largest = 14_336 * 4096
    assert memory_model(spec, "bf16").terms(1, 2).staging == kept
    absmax = 3 * largest // 64 * 4
    assert memory_model(spec, "nf4").terms(1, 2).staging == staged(kept, 2 * largest + absmax)
    int8 = memory_model(spec, "llm-int8").terms(1, 2).staging
    assert int8 == staged(kept, 2 * largest + 2 * largest + absmax)


def staged(kept: int, source: int, layers: int = 1) -> int:
    """Staging of some layers whose largest source is of that size."""
    return kept + source + int(profile_of("24GiB").staging_growth * layers * source)


def test_every_layer_leaves_holes_that_the_next_source_does_not_fit_in() -> None:
    model = memory_model(known("llama-3.1-405b"), "nf4-dq")
    kept = profile_of("24GiB").fragmentation_bytes
    source = model.terms(1, 2).staging - kept
    growth = profile_of("24GiB").staging_growth
    for layers in (2, 31, 43):
        expected = kept + source / (1 + growth) * (1 + growth * layers)
        assert model.terms(1, 1 + layers).staging == pytest.approx(expected, rel=1e-6)
    # benchmarks/results/rehearsals-4xh200.jsonl: 4,336 MiB with 43 layers.
    assert model.terms(42, 85).staging > 4336 * 2**20


def test_stacked_experts_are_staged_twice() -> None:
    spec = known("mixtral-8x7b")
    experts = max(t.numel for t in spec.tensors if t.role is Role.EXPERTS)
    kept = profile_of("24GiB").fragmentation_bytes
    assert memory_model(spec, "nf4").terms(1, 2).staging == staged(kept, 2 * 2 * experts)


def test_weights_of_another_dtype_are_staged_in_their_own() -> None:
    spec = replace(known("llama"), dtype=DType.FLOAT32)
    largest = max(t.numel for t in spec.tensors)
    kept = profile_of("24GiB").fragmentation_bytes
    found = memory_model(spec, "bf16").terms(0, 6).staging
    assert found == staged(kept, 4 * largest, spec.num_hidden_layers)


@law
@given(
    spec=SPECS | LARGE,
    format_name=FORMAT_NAMES,
    machine=MACHINE_NAMES,
    context=CONTEXTS,
    more=st.integers(0, 50_000),
    concurrency=st.integers(1, 16),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_no_term_falls_with_context_or_concurrency(
    spec: ModelSpec,
    format_name: str,
    machine: str,
    context: int,
    more: int,
    concurrency: int,
    cut: tuple[float, float],
) -> None:
    here, longer, busier = (
        memory_model(spec, format_name, machine, context=tokens, concurrency=requests)
        for tokens, requests in (
            (context, concurrency),
            (context + more, concurrency),
            (context, concurrency + 1),
        )
    )
    first, end = sorted(round(part * here.num_units) for part in cut)
    base = here.terms(first, end)
    for other in (longer.terms(first, end), busier.terms(first, end)):
        for name, size in base.as_dict().items():
            assert size <= other.as_dict()[name], name
        assert base.peak_bytes <= other.peak_bytes


@law
@given(LARGE, st.sampled_from([*MACHINES[:4], *NATIVE_MACHINES[:3]]), CONTEXTS)
def test_a_more_precise_format_never_peaks_lower_on_a_gpu(
    spec: ModelSpec, machine: str, context: int
) -> None:
    peaks = []
    eight_bits = "int8" if machine in NATIVE_MACHINES else "llm-int8"
    for format_name in ("nf4-dq", "nf4", eight_bits, "bf16"):
        model = memory_model(spec, format_name, machine, context=context)
        peaks.append(model.terms(0, model.num_units).peak_bytes)
    assert peaks == sorted(peaks)


@law
@given(SPECS, FORMAT_NAMES, MACHINE_NAMES, CONTEXTS)
def test_an_fp8_cache_is_half_of_a_16_bit_one(
    spec: ModelSpec, format_name: str, machine: str, context: int
) -> None:
    wide = memory_model(spec, format_name, machine, context=context)
    narrow = memory_model(spec, format_name, machine, context=context, kv_dtype=DType.FLOAT8_E4M3FN)
    overhead = wide.profile.kv_layer_overhead_bytes * spec.num_hidden_layers
    assert wide.kv_bytes() - overhead == 2 * (narrow.kv_bytes() - overhead)


def test_a_tensor_outside_the_decoder_is_placed_with_the_embedding() -> None:
    spec = known("llama")
    extra = TensorSpec(name="visual.patch.weight", shape=(4, 4), role=Role.OTHER)
    assert unit_of(extra, spec) == 0
