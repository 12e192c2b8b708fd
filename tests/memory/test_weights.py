"""What each parameter becomes on its device, against what the field measured."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.formats import FORMATS, DType
from oomproof.hardware.spec import DeviceSpec, HostSpec
from oomproof.memory.profiles import QUANTIZED_ROLES, EngineProfile, engine_profile
from oomproof.memory.weights import StoredTensor, resident_bytes, stored
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec, Role, TensorSpec
from oomproof.units import GIB
from tests.models.configs import SMALL_CONFIGS, spec_of

GB = 10**9
LINEAR_ONLY = frozenset({Role.LINEAR})
law = settings(derandomize=True, deadline=None, max_examples=100)


@cache
def known(name: str) -> ModelSpec:
    return resolve(name)


@cache
def cpu_profile(*features: str) -> EngineProfile:
    host = HostSpec(
        total_ram_bytes=64 * GIB,
        available_ram_bytes=60 * GIB,
        free_disk_bytes=None,
        cpu_count=8,
        cpu_features=frozenset(features),
    )
    device = DeviceSpec(index=0, name="cpu", kind="cpu", total_bytes=64 * GIB, free_bytes=60 * GIB)
    return engine_profile("transformers", device, host)


def held(spec: ModelSpec, format_name: str, dtype: DType = DType.BFLOAT16) -> list[StoredTensor]:
    roles = QUANTIZED_ROLES["transformers"]
    return [stored(tensor, FORMATS[format_name], dtype, roles) for tensor in spec.tensors]


def total(name: str, format_name: str) -> int:
    return sum(tensor.stored_bytes for tensor in held(known(name), format_name))


@pytest.mark.parametrize(
    ("name", "format_name", "gigabytes", "digit"),
    [
        ("llama-3.1-8b", "bf16", 16.06, 0.01),
        ("llama-3.1-8b", "nf4", 6.03, 0.01),
        ("llama-3.1-8b", "nf4-dq", 5.70, 0.01),
        ("llama-3.1-70b", "bf16", 141.1, 0.1),
        ("llama-3.1-70b", "nf4", 42.7, 0.1),
        ("llama-3.1-70b", "nf4-dq", 39.5, 0.1),
        ("llama-3.1-405b", "bf16", 811.7, 0.1),
        ("llama-3.1-405b", "nf4", 234.3, 0.1),
        ("llama-3.1-405b", "nf4-dq", 215.6, 0.1),
    ],
)
def test_weights_equal_the_fields_figures_to_their_last_digit(
    name: str, format_name: str, gigabytes: float, digit: float
) -> None:
    assert total(name, format_name) / GB == pytest.approx(gigabytes, abs=digit / 2 + 1e-9)


def test_weights_of_the_acid_cases_in_gib() -> None:
    assert total("llama-3.1-405b", "nf4-dq") / GIB == pytest.approx(200.8, abs=0.05)
    assert total("llama-3.1-70b", "nf4-dq") / GIB == pytest.approx(36.8, abs=0.05)
    assert total("llama-3.1-405b", "nf4") / GIB == pytest.approx(218.2, abs=0.05)


def test_16_bit_weights_are_two_bytes_a_parameter() -> None:
    for name in ("llama-3.1-8b", "gemma-3-27b", "gpt-oss-20b"):
        assert total(name, "bf16") == total(name, "fp16") == 2 * known(name).num_parameters


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen2.5-0.5b", "gemma-2-2b"])
def test_tied_embeddings_are_held_once(name: str) -> None:
    spec = known(name)
    assert spec.tie_word_embeddings
    large = [t for t in spec.tensors if t.shape == (spec.vocab_size, spec.hidden_size)]
    assert [t.role for t in large] == [Role.EMBEDDING]
    assert total(name, "bf16") == 2 * spec.num_parameters


def test_an_untied_head_is_a_second_tensor_in_the_compute_dtype() -> None:
    spec = known("llama-3.1-8b")
    heads = [
        part
        for tensor, part in zip(spec.tensors, held(spec, "nf4"), strict=True)
        if tensor.role in (Role.HEAD, Role.EMBEDDING)
    ]
    assert [part.quantized for part in heads] == [False, False]
    assert [part.stored_bytes for part in heads] == [128_256 * 4096 * 2] * 2


def test_experts_of_a_mixture_stay_in_16_bits_under_every_quantized_format() -> None:
    spec = known("mixtral-8x7b")
    for format_name in ("nf4", "nf4-dq", "llm-int8"):
        experts = [
            part
            for tensor, part in zip(spec.tensors, held(spec, format_name), strict=True)
            if tensor.role is Role.EXPERTS
        ]
        assert not any(part.quantized for part in experts)
        assert {part.dtype for part in experts} == {DType.BFLOAT16}
        assert sum(part.stored_bytes for part in experts) / GB == pytest.approx(90, abs=0.5)


@pytest.mark.parametrize("role", sorted(set(Role) - LINEAR_ONLY))
def test_what_is_no_linear_layer_stays_in_the_compute_dtype(role: Role) -> None:
    tensor = TensorSpec(name="t", shape=(64, 128), role=role)
    part = stored(tensor, FORMATS["nf4"], DType.FLOAT16, QUANTIZED_ROLES["transformers"])
    assert (part.quantized, part.dtype, part.stored_bytes) == (False, DType.FLOAT16, 64 * 128 * 2)


@pytest.mark.parametrize("shape", [(64,), (4, 8, 16)])
def test_only_matrices_are_quantized(shape: tuple[int, ...]) -> None:
    tensor = TensorSpec(name="t", shape=shape, role=Role.LINEAR)
    assert not stored(tensor, FORMATS["nf4"], DType.BFLOAT16, LINEAR_ONLY).quantized


def test_a_quantized_matrix_is_held_as_the_formats_components() -> None:
    tensor = TensorSpec(name="t", shape=(33, 7), role=Role.LINEAR)
    part = stored(tensor, FORMATS["nf4-dq"], DType.BFLOAT16, LINEAR_ONLY)
    assert part.quantized
    assert part.dtype is DType.UINT8
    assert part.components == FORMATS["nf4-dq"].components(33, 7)
    assert part.stored_bytes == 116 + 4 + 64 + 4 + 1024 + 4


def test_16_bits_are_never_called_quantized() -> None:
    tensor = TensorSpec(name="t", shape=(64, 64), role=Role.LINEAR)
    part = stored(tensor, FORMATS["fp16"], DType.FLOAT16, LINEAR_ONLY)
    assert (part.quantized, part.dtype) == (False, DType.FLOAT16)


def test_the_allocator_rounds_each_component_up_on_its_own() -> None:
    tensor = TensorSpec(name="t", shape=(33, 7), role=Role.LINEAR)
    part = stored(tensor, FORMATS["nf4-dq"], DType.BFLOAT16, LINEAR_ONLY)
    assert part.allocated_bytes(512) == 512 + 512 + 512 + 512 + 1024 + 512
    assert part.allocated_bytes(1) == part.stored_bytes


@law
@given(
    rows=st.integers(1, 5000),
    columns=st.integers(1, 5000),
    format_name=st.sampled_from(sorted(FORMATS)),
    alignment=st.sampled_from([1, 64, 512]),
)
def test_alignment_adds_less_than_one_unit_a_component(
    rows: int, columns: int, format_name: str, alignment: int
) -> None:
    tensor = TensorSpec(name="t", shape=(rows, columns), role=Role.LINEAR)
    part = stored(tensor, FORMATS[format_name], DType.BFLOAT16, LINEAR_ONLY)
    added = part.allocated_bytes(alignment) - part.stored_bytes
    assert 0 <= added <= len(part.components) * (alignment - 1)


@pytest.mark.parametrize("config", SMALL_CONFIGS)
def test_no_family_loses_a_parameter_in_any_format(config: str) -> None:
    spec = spec_of(SMALL_CONFIGS[config])
    for format_name in FORMATS:
        parts = held(spec, format_name)
        assert [part.name for part in parts] == [tensor.name for tensor in spec.tensors]
        for tensor, part in zip(spec.tensors, parts, strict=True):
            if not part.quantized:
                assert part.stored_bytes == 2 * tensor.numel


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b", "gemma-3-27b", "phi-4"])
def test_more_bits_never_take_fewer_bytes(name: str) -> None:
    in_order = ("nf4-dq", "nf4", "llm-int8", "bf16")
    sizes = [total(name, format_name) for format_name in in_order]
    assert sizes == sorted(sizes)


def test_a_cpu_that_repacks_keeps_the_larger_of_both_layouts() -> None:
    profile = replace(cpu_profile("avx512_bf16"), alignment_bytes=1)
    assert profile.repacks_4bit
    tensor = TensorSpec(name="t", shape=(4096, 4096), role=Role.LINEAR)
    codes, blocks = 4096 * 4096 // 2, 4096 * 4096 // 64
    nested = stored(tensor, FORMATS["nf4-dq"], DType.BFLOAT16, LINEAR_ONLY)
    # Nested scales vanish: one bfloat16 a block takes more than the 8-bit absmax did.
    assert resident_bytes(tensor, nested, profile) == codes + 2 * blocks + 64
    plain = stored(tensor, FORMATS["nf4"], DType.BFLOAT16, LINEAR_ONLY)
    # A float32 absmax shrinks, but it was there before the first forward.
    assert resident_bytes(tensor, plain, profile) == plain.stored_bytes


def test_only_4_bit_weights_are_repacked_and_only_where_the_cpu_does_it() -> None:
    tensor = TensorSpec(name="t", shape=(4096, 4096), role=Role.LINEAR)
    for profile in (cpu_profile(), cpu_profile("avx512_bf16")):
        for format_name in ("bf16", "llm-int8"):
            part = stored(tensor, FORMATS[format_name], DType.BFLOAT16, LINEAR_ONLY)
            loaded = part.allocated_bytes(profile.alignment_bytes)
            assert resident_bytes(tensor, part, profile) == loaded
    nested = stored(tensor, FORMATS["nf4-dq"], DType.BFLOAT16, LINEAR_ONLY)
    plain_cpu = cpu_profile()
    assert resident_bytes(tensor, nested, plain_cpu) == nested.allocated_bytes(
        plain_cpu.alignment_bytes
    )
