"""What each engine is known to do on each kind of device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest

from oomproof.errors import InputError
from oomproof.formats import FORMATS
from oomproof.hardware.spec import DeviceKind, DeviceSpec, HostSpec
from oomproof.memory.arena import ALIGNMENT_BYTES
from oomproof.memory.kv_cache import KV_FORMATS
from oomproof.memory.native import CHUNK_TOKENS, DEVICE_STAGING_BYTES, PINNED_BYTES
from oomproof.memory.profiles import (
    NATIVE_FORMATS,
    QUANTIZED_ROLES,
    EngineProfile,
    engine_profile,
    native_profile,
    transformers_profile,
)
from oomproof.models.spec import Role
from oomproof.units import GIB, MIB


def host(*features: str) -> HostSpec:
    return HostSpec(
        total_ram_bytes=64 * GIB,
        available_ram_bytes=60 * GIB,
        free_disk_bytes=None,
        cpu_count=8,
        cpu_features=frozenset(features),
    )


def profile(
    kind: DeviceKind,
    capability: tuple[int, int] | None = None,
    *features: str,
    engine: str = "transformers",
) -> EngineProfile:
    device = DeviceSpec(
        index=0,
        name=kind,
        kind=kind,
        total_bytes=24 * GIB,
        free_bytes=23 * GIB,
        compute_capability=capability,
    )
    return engine_profile(engine, device, host(*features))


TRANSFORMERS = [
    profile("cuda", (7, 5)),
    profile("cuda", (8, 0)),
    profile("cuda", (9, 0)),
    profile("cuda", (12, 0)),
    profile("cuda"),
    profile("rocm"),
    profile("mps"),
    profile("cpu"),
    profile("cpu", None, "avx512_bf16"),
]
NATIVE = [
    profile("cuda", (8, 0), engine="native"),
    profile("cuda", (8, 6), engine="native"),
    profile("cuda", (8, 9), engine="native"),
    profile("cuda", (9, 0), engine="native"),
    profile("cuda", (12, 0), engine="native"),
    profile("cuda", engine="native"),
    profile("cpu", engine="native"),
]


engines = pytest.mark.parametrize("engine", ["native", "transformers"])


@pytest.mark.parametrize("engine", ["", "vllm", "Transformers", "auto"])
def test_an_unknown_engine_is_refused_with_the_known_ones(engine: str) -> None:
    device = DeviceSpec(index=0, name="g", kind="cuda", total_bytes=GIB, free_bytes=GIB)
    said = rf"unknown engine '{engine}': use one of native, transformers"
    with pytest.raises(InputError, match=said):
        engine_profile(engine, device, host())


@pytest.mark.parametrize("each", [*TRANSFORMERS, *NATIVE])
def test_no_coefficient_is_negative_and_names_are_known(each: EngineProfile) -> None:
    for field in fields(each):
        value = getattr(each, field.name)
        if isinstance(value, int | float):
            assert value >= 0, field.name
    assert each.alignment_bytes > 0
    assert each.prefill_chunk_tokens > 0
    assert each.margin_bytes > 0
    assert each.formats <= FORMATS.keys()
    assert each.kv_formats <= KV_FORMATS.keys()


@pytest.mark.parametrize("each", TRANSFORMERS)
def test_transformers_runs_bitsandbytes_formats_and_no_kernels_of_ours(each: EngineProfile) -> None:
    assert {"bf16", "fp16"} <= each.formats
    assert not each.formats & {"int4", "int8", "fp8", "fp32"}
    assert each.kv_formats == {"bf16", "fp16"}
    assert each.kv_in_compute_dtype
    assert not each.is_static


@pytest.mark.parametrize("each", NATIVE)
def test_our_own_engine_runs_every_format_but_llm_int8_and_keeps_any_cache(
    each: EngineProfile,
) -> None:
    assert each.formats == FORMATS.keys() - {"llm-int8"} == NATIVE_FORMATS
    assert each.kv_formats == KV_FORMATS.keys()
    assert not each.kv_in_compute_dtype


@pytest.mark.parametrize("each", NATIVE)
def test_our_own_engine_allocates_what_its_layout_lists_and_expands_nothing(
    each: EngineProfile,
) -> None:
    assert each.is_static
    assert not each.expands_kv_heads
    assert each.alignment_bytes == ALIGNMENT_BYTES
    assert each.prefill_chunk_tokens == CHUNK_TOKENS
    assert (each.buffer_bytes, each.kv_layer_overhead_bytes, each.staging_growth) == (0, 0, 0)


def test_only_a_gpu_has_a_context_graphs_and_pinned_buffers() -> None:
    *gpus, cpu = NATIVE
    assert (cpu.context_bytes, cpu.graph_bytes_per_layer, cpu.pinned_bytes) == (0, 0, 0)
    for gpu in gpus:
        assert gpu.context_bytes > 500 * MIB
        assert gpu.graph_bytes_per_layer > 0
        assert gpu.pinned_bytes >= PINNED_BYTES
        assert gpu.loading_bytes == DEVICE_STAGING_BYTES


def test_a_processor_dequantizes_in_copies_and_a_gpu_in_its_scratch_buffer() -> None:
    *gpus, cpu = NATIVE
    assert cpu.dequantizes_to_scratch
    assert not any(gpu.dequantizes_to_scratch for gpu in gpus)


def test_quantizing_reaches_linear_layers_only() -> None:
    assert dict(QUANTIZED_ROLES) == {
        "transformers": frozenset({Role.LINEAR}),
        "native": frozenset({Role.LINEAR}),
    }
    every = [*TRANSFORMERS, *NATIVE]
    assert {each.quantized_roles for each in every} == {frozenset({Role.LINEAR})}


def test_bitsandbytes_is_not_offered_on_apples_gpu() -> None:
    assert profile("mps").formats == {"bf16", "fp16"}


def test_cuda_tensors_take_multiples_of_512_bytes() -> None:
    assert profile("cuda", (8, 9)).alignment_bytes == 512


@engines
def test_hopper_keeps_a_larger_cublas_workspace(engine: str) -> None:
    assert profile("cuda", (9, 0), engine=engine).library_workspace_bytes == 32 * MIB
    assert profile("cuda", (8, 0), engine=engine).library_workspace_bytes == 9 * MIB


def test_the_cuda_context_covers_what_was_measured() -> None:
    # 692 MiB with 4 bits, 756 with LLM.int8(); unmeasured architectures take the most measured.
    for capability in ((7, 5), (8, 0), (9, 0), (12, 0), None):
        assert profile("cuda", capability).context_bytes >= 756 * MIB


def test_a_processor_has_no_cuda_context_and_pins_nothing() -> None:
    found = profile("cpu")
    assert (found.context_bytes, found.pinned_bytes) == (0, 0)


def test_4_bit_weights_are_repacked_with_avx512_bf16_and_dequantized_without() -> None:
    with_it, without = profile("cpu", None, "avx512_bf16"), profile("cpu", None, "avx2")
    assert (with_it.repacks_4bit, with_it.dequantizes_to_scratch) == (True, False)
    assert (without.repacks_4bit, without.dequantizes_to_scratch) == (False, True)
    assert not profile("cuda", (9, 0), "avx512_bf16").repacks_4bit


@engines
def test_equal_devices_have_equal_profiles(engine: str) -> None:
    first, second = (profile("cuda", (8, 6), engine=engine) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    ("engine", "made"), [("transformers", transformers_profile), ("native", native_profile)]
)
def test_engine_names_lead_to_their_profile(
    engine: str, made: Callable[[DeviceSpec, HostSpec], EngineProfile]
) -> None:
    device = DeviceSpec(index=0, name="g", kind="cuda", total_bytes=GIB, free_bytes=GIB)
    found = made(device, host())
    assert found == engine_profile(engine, device, host())
    assert found.engine == engine
