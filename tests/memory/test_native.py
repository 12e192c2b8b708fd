"""What the native engine allocates, by name and shape, and the terms that are made of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import FORMATS, DType, ceil_div
from oomproof.hardware.describe import describe
from oomproof.memory.arena import ALIGNMENT_BYTES
from oomproof.memory.kv_cache import PAGE_TOKENS, planned_tokens
from oomproof.memory.model import Demand, MemoryModel, WeightCosts
from oomproof.memory.native import (
    CHUNK_TOKENS,
    DECODE_SPLITS,
    SPLIT_TOKENS,
    Share,
    StepShape,
    chunk_tokens,
    decode_splits,
    graph_sizes,
    layer_kv_bytes,
    layer_pages,
    next_piece,
    prompt_sizes,
    scratch_bytes,
    step_buffers,
    step_layout,
    step_tokens,
)
from oomproof.memory.profiles import EngineProfile, engine_profile
from oomproof.memory.sampler import sampler_buffers
from oomproof.memory.slices import SLICE_BYTES, SLICE_ROWS, UP_ROWS
from oomproof.models.resolve import resolve
from oomproof.models.spec import AttentionSpec, ModelSpec
from oomproof.units import MIB, round_up
from tests.models.configs import SMALL_CONFIGS, spec_of

law = settings(derandomize=True, deadline=None, max_examples=100)
CONTEXTS = st.integers(1, 200_000)
REQUESTS = st.integers(1, 4096)
DTYPES = st.sampled_from([DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32])
FAMILIES = [name for name, config in SMALL_CONFIGS.items() if spec_of(config).not_native is None]
SHAPE = StepShape(
    context=8192, concurrency=4, compute_dtype=DType.BFLOAT16, quantized=True, has_head=True
)


@cache
def known(name: str) -> ModelSpec:
    return spec_of(SMALL_CONFIGS[name]) if name in SMALL_CONFIGS else resolve(name)


SPECS = st.sampled_from(FAMILIES).map(known)


@cache
def profile_of(machine: str) -> EngineProfile:
    hardware = describe(machine)
    return engine_profile("native", hardware.devices[0], hardware.host)


def memory_model(
    spec: ModelSpec,
    format_name: str = "bf16",
    machine: str = "H100",
    *,
    context: int = 8192,
    concurrency: int = 1,
    compute_dtype: DType = DType.BFLOAT16,
) -> MemoryModel:
    costs = WeightCosts(spec, FORMATS[format_name], profile_of(machine), compute_dtype)
    demand = Demand(context=context, concurrency=concurrency, kv_dtype=DType.BFLOAT16)
    return MemoryModel(costs, demand)


def attention(window: int | None = None) -> AttentionSpec:
    return AttentionSpec(
        num_key_value_heads=8, key_head_dim=128, value_head_dim=128, sliding_window=window
    )


# --- pages


@pytest.mark.parametrize(
    ("window", "context", "pages"),
    [
        (None, 1, 1),
        (None, 256, 1),
        (None, 257, 2),
        (None, 8192, 32),
        # A window of 4,096 and a chunk of 2,048 that may begin inside a page.
        (4096, 131_072, 25),
        (4096, 6400, 25),
        # Shorter contexts never need a ring.
        (4096, 6144, 24),
        (4096, 256, 1),
        # Chunks are no longer than the context.
        (100, 300, 2),
        (1, 100_000, 10),
        (200_000, 8192, 32),
    ],
)
def test_pages_of_a_layer_hold_its_window_and_the_chunk_that_is_written(
    window: int | None, context: int, pages: int
) -> None:
    assert layer_pages(attention(window), context) == pages


@law
@given(st.none() | st.integers(1, 200_000), CONTEXTS)
def test_no_token_that_a_chunk_may_look_at_is_written_over(
    window: int | None, context: int
) -> None:
    pages = layer_pages(attention(window), context)
    whole = ceil_div(context, PAGE_TOKENS)
    assert 1 <= pages <= whole
    if pages < whole:
        # At worst the oldest token of the window is the last one of its page.
        assert window is not None
        assert pages * PAGE_TOKENS >= window + chunk_tokens(context) + PAGE_TOKENS - 1
    else:
        assert pages * PAGE_TOKENS >= context


@law
@given(st.none() | st.integers(1, 200_000), CONTEXTS, st.integers(0, 10_000))
def test_more_context_never_takes_fewer_pages(window: int | None, context: int, more: int) -> None:
    layer = attention(window)
    assert layer_pages(layer, context) <= layer_pages(layer, context + more)


@law
@given(CONTEXTS, st.integers(1, 64), st.sampled_from([1, 2, 4]))
def test_a_layers_cache_is_the_keys_and_values_of_its_pages(
    context: int, requests: int, itemsize: int
) -> None:
    dtype = {1: DType.FLOAT8_E4M3FN, 2: DType.BFLOAT16, 4: DType.FLOAT32}[itemsize]
    for window in (None, 512):
        layer = attention(window)
        found = layer_kv_bytes(layer, context=context, concurrency=requests, dtype=dtype)
        tokens = layer_pages(layer, context) * PAGE_TOKENS
        assert found == requests * tokens * 2 * 8 * 128 * itemsize


def test_the_cache_of_sliding_layers_stops_growing() -> None:
    spec = known("mistral with its default window")
    assert {layer.sliding_window for layer in spec.attention} == {4096}
    short, long = (memory_model(spec, context=context).kv_bytes() for context in (8192, 131_072))
    assert short == long
    everything = replace(attention(), num_key_value_heads=4, key_head_dim=16, value_head_dim=16)
    assert long == 4 * 25 * PAGE_TOKENS * 2 * 4 * 16 * 2
    assert long < 4 * layer_kv_bytes(everything, context=8192, concurrency=1, dtype=DType.BFLOAT16)


# --- tokens, graphs and splits


@pytest.mark.parametrize(
    ("context", "requests", "chunk", "step"),
    [
        (1, 1, 256, 256),
        (257, 1, 512, 512),
        (8192, 1, 2048, 2048),
        (8192, 2048, 2048, 2048),
        (8192, 2049, 2048, 2049),
        (256, 4096, 256, 4096),
    ],
)
def test_a_call_has_a_chunk_of_a_prompt_or_a_token_of_every_request(
    context: int, requests: int, chunk: int, step: int
) -> None:
    assert CHUNK_TOKENS == 2048
    assert chunk_tokens(context) == chunk
    assert step_tokens(replace(SHAPE, context=context, concurrency=requests)) == step


@pytest.mark.parametrize(
    ("requests", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (4, (1, 2, 4)),
        (20, (1, 2, 4, 8, 16, 20)),
        (64, (1, 2, 4, 8, 16, 32, 64)),
    ],
)
def test_steps_are_recorded_for_powers_of_two_and_for_every_request_at_once(
    requests: int, sizes: tuple[int, ...]
) -> None:
    assert graph_sizes(requests) == sizes


def test_pieces_of_prompts_are_recorded_up_to_the_chunk() -> None:
    assert prompt_sizes(2048) == (64, 512, 2048)
    assert prompt_sizes(512) == (64, 512)
    assert prompt_sizes(300) == (64, 300)
    assert prompt_sizes(16) == (16,)


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (1, [64]),
        (128, [64, 64]),
        (250, [512]),
        (600, [64, 64, 512]),
        (1000, [512, 512]),
        (1300, [2048]),
        (2049, [64, 2048]),
        (5000, [2048, 512, 512, 2048]),
    ],
)
def test_a_prompt_is_cut_into_the_pieces_that_take_the_least_time(
    tokens: int, pieces: list[int]
) -> None:
    found = []
    while tokens > 0:
        found.append(next_piece(tokens, (64, 512, 2048)))
        tokens -= found[-1]
    assert found == pieces


@law
@given(REQUESTS)
def test_every_number_of_requests_finds_a_graph_less_than_twice_its_size(requests: int) -> None:
    sizes = graph_sizes(requests)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == requests
    for active in range(1, requests + 1):
        assert next(size for size in sizes if size >= active) < 2 * active


@pytest.mark.parametrize(
    ("context", "splits"), [(1, 1), (SPLIT_TOKENS, 1), (SPLIT_TOKENS + 1, 2), (8192, 16)]
)
def test_attention_of_a_step_is_split_by_context(context: int, splits: int) -> None:
    assert decode_splits(context) == splits
    assert decode_splits(10**9) == DECODE_SPLITS


# --- buffers


def test_the_buffers_of_8b_are_those_computed_by_hand() -> None:
    sizes = {one.name: one.size_bytes for one in step_buffers(known("llama-3.1-8b"), SHAPE)}
    tokens, requests, vocabulary = 2048, 4, 128_256
    assert {name: size for name, size in sizes.items() if not name.startswith("sampler.")} == {
        "inputs": 3 * tokens * 4,
        "hidden": tokens * 4096 * 2,
        "normed": tokens * 4096 * 2,
        "scratch": SLICE_ROWS * 14_336 * 2,
        "pages.0": requests * 32 * 4,
        "rotary": 2 * 8192 * 64 * 4,
        "qkv": tokens * (32 + 2 * 8) * 128 * 2,
        "attended": tokens * 32 * 128 * 2,
        "partials": requests * 32 * 16 * (128 + 2) * 4,
        # 512 blocks and one a request and KV head: 4 heads of 128 and two softmax numbers for each.
        "step_partials": (512 + requests * 8) * (4 * 128 + 4 * 128 // 2) * 4,
        "squares": 64 * 4096 // 64 * 4,
        "product_counters": 256 * 4,
        "counters": requests * 8 * 8 * 4,
        "hidden_next": requests * 4096 * 2,
        "gated": tokens * 14_336 * 2,
        "last_hidden": requests * 4096 * 2,
        "head_out": requests * vocabulary * 2,
        "logits": requests * vocabulary * 4,
        "drawn": requests * 8,
    }
    drawing = {
        f"sampler.{name}": prod(shape) * dtype.itemsize
        for name, shape, dtype in sampler_buffers(requests, vocabulary)
    }
    assert {name: size for name, size in sizes.items() if name in drawing} == drawing
    assert drawing["sampler.counts"] == requests * vocabulary * 4


def test_layers_that_look_back_equally_far_share_a_table_of_pages() -> None:
    tables = {
        one.name: one.shape
        for one in step_buffers(known("ministral"), SHAPE)
        if one.name.startswith("pages.")
    }
    # Half of its layers see 32 tokens; a chunk of 2,048 may begin inside a page.
    assert tables == {"pages.0": (4, 32), "pages.32": (4, 10)}


def test_a_device_without_layers_or_head_has_no_buffers_for_them() -> None:
    spec = known("llama-3.1-8b")

    def names(*, layers: bool, head: bool) -> set[str]:
        shape = replace(SHAPE, has_layers=layers, has_head=head)
        return {one.name for one in step_buffers(spec, shape)}

    neither, head = names(layers=False, head=False), names(layers=False, head=True)
    assert neither == {"inputs", "hidden", "normed", "scratch"}
    assert "logits" in head > neither
    assert "qkv" in names(layers=True, head=False) > neither
    assert head | names(layers=True, head=False) == names(layers=True, head=True)


def test_unquantized_weights_need_scratch_where_up_waits_for_its_gate_alone() -> None:
    plain = replace(SHAPE, quantized=False)
    for name, rows in (("llama-3.2-1b", 4096), ("llama-3.1-405b", 4096), ("llama", 96)):
        spec = known(name)
        assert rows in {UP_ROWS, spec.intermediate_size}
        sizes = {one.name: one.size_bytes for one in step_buffers(spec, plain)}
        assert sizes["scratch"] == scratch_bytes(spec, plain) == 2048 * rows * 2
        assert scratch_bytes(spec, replace(plain, has_layers=False)) == 0


def test_scratch_holds_slices_of_the_widest_weight() -> None:
    assert scratch_bytes(known("llama"), SHAPE) == 32 * MIB
    for name, columns in (("llama-3.1-405b", 53_248), ("qwen3-32b", 25_600)):
        assert scratch_bytes(known(name), SHAPE) == SLICE_ROWS * columns * 2
        in_float32 = replace(SHAPE, compute_dtype=DType.FLOAT32)
        assert scratch_bytes(known(name), in_float32) == SLICE_ROWS * columns * 4
    # 16 MiB where up waits, and a slice beside it.
    assert scratch_bytes(known("llama-3.2-1b"), SHAPE) == 16 * MIB + SLICE_BYTES


def test_an_8b_has_no_more_workspace_than_a_chunk_of_1024_took() -> None:
    """Where gate and up were whole beside each other."""
    spec = known("llama-3.1-8b")
    for quantized, then in ((True, 160), (False, 104)):
        shape = replace(SHAPE, concurrency=1, quantized=quantized)
        layers = step_layout(spec, replace(shape, has_head=False))
        assert layers.size_bytes < (then + 8) * MIB


@law
@given(SPECS, CONTEXTS, st.integers(1, 300), DTYPES, st.booleans(), st.booleans())
def test_every_buffer_has_a_name_of_its_own_and_its_place(
    spec: ModelSpec,
    context: int,
    requests: int,
    compute_dtype: DType,
    quantized: bool,
    has_head: bool,
) -> None:
    shape = StepShape(
        context=context,
        concurrency=requests,
        compute_dtype=compute_dtype,
        quantized=quantized,
        has_head=has_head,
    )
    buffers = step_buffers(spec, shape)
    assert len({one.name for one in buffers}) == len(buffers)
    layout = step_layout(spec, shape)
    for one in buffers:
        assert layout.offsets[one.name] + one.size_bytes <= layout.size_bytes
        assert layout.buffers[one.name] == one
    rotary = layout.buffers["rotary"]
    assert rotary.shape[1] == planned_tokens(context) >= context


# --- terms


@law
@given(
    spec=SPECS | st.sampled_from(["llama-3.1-8b", "llama-3.2-1b", "qwen3-8b"]).map(known),
    format_name=st.sampled_from(sorted(profile_of("H100").formats)),
    machine=st.sampled_from(["H100", "RTX 3090", "24GiB", "cpu"]),
    context=CONTEXTS,
    requests=st.integers(1, 64),
    compute_dtype=DTYPES,
)
def test_the_workspace_is_the_layouts_bytes_and_what_was_measured_around_it(
    spec: ModelSpec,
    format_name: str,
    machine: str,
    context: int,
    requests: int,
    compute_dtype: DType,
) -> None:
    model = memory_model(
        spec,
        format_name,
        machine,
        context=context,
        concurrency=requests,
        compute_dtype=compute_dtype,
    )
    profile, weight_format = model.profile, FORMATS[format_name]
    last = model.num_units
    for first, end in ((0, last), (0, 2), (2, last), (1, 2)):
        has_head = first == 0 if spec.tie_word_embeddings else end == last
        layout = step_layout(
            spec,
            StepShape(
                context=context,
                concurrency=requests,
                compute_dtype=compute_dtype,
                quantized=weight_format.is_quantized,
                has_head=has_head,
            ),
        )
        around = profile.library_workspace_bytes + profile.fragmentation_bytes
        if machine == "cpu" and weight_format.is_quantized:
            # The references make copies of a whole weight: codes, values and scales.
            around += 24 * max(t.numel for t in spec.tensors if t.role == "linear")
        assert model.terms(first, end).workspace == layout.size_bytes + around


def test_a_parts_workspace_needs_no_logits_where_the_head_is_elsewhere() -> None:
    model = memory_model(known("llama-3.1-8b"), "nf4", concurrency=8)
    with_head, without = model.terms(17, 34).workspace, model.terms(0, 17).workspace
    # Logits of eight requests in float32, and counts of every token.
    assert with_head - without > 2 * 8 * 128_256 * 4


@pytest.mark.parametrize(("requests", "graphs"), [(1, 1), (4, 3), (20, 6)])
def test_recorded_steps_take_their_bytes_for_every_layer(requests: int, graphs: int) -> None:
    model = memory_model(known("llama-3.1-8b"), "nf4", concurrency=requests)
    step, piece = (
        model.profile.graph_bytes_per_layer,
        model.profile.prompt_graph_bytes_per_layer,
    )
    assert 0 < step < piece
    # Pieces of 64, 512 and 2,048 tokens.
    per_layer = graphs * step + 3 * piece
    assert model.terms(0, 34).graphs == per_layer * 34
    assert model.terms(10, 20).graphs == per_layer * 10
    on_a_cpu = memory_model(known("llama-3.1-8b"), "nf4", "cpu", concurrency=requests)
    assert on_a_cpu.terms(0, 34).graphs == 0


def test_staging_is_the_same_whatever_the_size_of_a_tensor() -> None:
    profile = profile_of("H100")
    fixed = profile.fragmentation_bytes + profile.loading_bytes
    for name in ("llama-3.2-1b", "llama-3.1-405b"):
        model = memory_model(known(name))
        assert model.staging_bytes(0, model.num_units) == fixed
    largest = 14_336 * 4096
    nf4 = memory_model(known("llama-3.1-8b"), "nf4")
    assert nf4.staging_bytes(1, 2) == nf4.staging_bytes(1, 33) == fixed + largest // 64 * 4


@law
@given(SPECS, st.sampled_from(sorted(profile_of("H100").formats)))
def test_weights_are_aligned_one_by_one(spec: ModelSpec, format_name: str) -> None:
    model = memory_model(spec, format_name)
    for unit in range(model.num_units):
        assert model.weights_bytes(unit, unit + 1) % ALIGNMENT_BYTES == 0
    if format_name == "bf16":
        assert model.weights_bytes() == sum(
            round_up(2 * tensor.numel, ALIGNMENT_BYTES) for tensor in spec.tensors
        )


@law
@given(CONTEXTS, REQUESTS)
def test_ranks_share_heads_and_width_and_nothing_else(context: int, requests: int) -> None:
    spec = known("llama-3.1-8b")
    whole = replace(SHAPE, context=context, concurrency=requests)
    half = replace(whole, share=Share(rank=1, ranks=2))
    split = {"qkv", "attended", "partials", "gated", "counters"}
    # A GPU's blocks are as many with few heads.
    not_all = {"step_partials"}
    for one, part in zip(step_buffers(spec, whole), step_buffers(spec, half), strict=True):
        factor = 2 if one.name in split else 1
        assert one.name == part.name
        if one.name in not_all:
            continue
        assert one.size_bytes == factor * part.size_bytes
    sizes = [
        layer_kv_bytes(
            spec.attention[0],
            context=context,
            concurrency=requests,
            dtype=DType.BFLOAT16,
            share=share,
        )
        for share in (whole.share, half.share)
    ]
    assert sizes[0] == 2 * sizes[1]


def test_heads_that_ranks_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="8 KV heads cannot be split evenly over 3 ranks"):
        layer_kv_bytes(
            known("llama-3.1-8b").attention[0],
            context=1,
            concurrency=1,
            dtype=DType.BFLOAT16,
            share=Share(ranks=3),
        )
