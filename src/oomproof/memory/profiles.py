"""What an engine needs besides weights and cache, on each kind of device.

Every coefficient here was measured; `measured` says when, on what and with which versions. The
formulas that use them are in memory/workspace.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from oomproof.errors import InputError
from oomproof.hardware.catalog import architecture_of
from oomproof.hardware.spec import DeviceSpec, HostSpec
from oomproof.memory.arena import ALIGNMENT_BYTES
from oomproof.memory.native import CHUNK_TOKENS, DEVICE_STAGING_BYTES, PINNED_BYTES
from oomproof.models.spec import Role
from oomproof.units import KIB, MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineProfile:
    """An engine on one kind of device."""

    engine: str
    """"native" or "transformers"."""
    device_kind: str
    """DeviceSpec.kind, or its GPU architecture where figures differ: "hopper", "cuda", "cpu"."""
    formats: frozenset[str]
    """Formats that the engine runs there."""
    kv_formats: frozenset[str]
    kv_in_compute_dtype: bool
    """Whether keys and values cannot be kept in another dtype than they are computed in."""
    quantized_roles: frozenset[Role]
    """QUANTIZED_ROLES of the engine."""
    alignment_bytes: int
    """Granularity of the allocator that holds the weights."""
    context_bytes: int
    """CUDA context and modules, after the first answer."""
    library_workspace_bytes: int
    """What cuBLAS and its like allocate through torch, once."""
    fragmentation_bytes: int
    """What torch's allocator reserves and cannot hand out, whatever the model."""
    buffer_bytes: int
    """Buffers beside the parameters, such as rotary frequencies."""
    kv_layer_overhead_bytes: int
    """What each layer's cache of a request keeps besides keys and values."""
    prefill_chunk_tokens: int
    """A prompt is processed this many tokens at a time."""
    expands_kv_heads: bool
    """Whether attention copies keys and values to every query head (grouped-query models)."""
    dequantizes_to_scratch: bool
    """Whether a product with a quantized weight first writes a 16-bit copy of it."""
    repacks_4bit: bool
    """Whether 4-bit weights are rewritten at the first forward (CPU with AVX-512 bf16)."""
    scratch_bytes_4bit: float
    """Bytes a weight that quantizing to 4 bits needs on the device, besides source and result."""
    scratch_bytes_8bit: float
    """The same for 8 bits."""
    staging_growth: float
    """What each layer adds to the staging of the largest source, as a share of it."""
    pinned_bytes: int
    """Page-locked host buffers while loading."""
    host_runtime_bytes: int
    """RAM of the process without a model."""
    margin_bytes: int
    measured: str
    """When, on which device, with which versions."""
    is_static: bool = False
    """Whether KV pool and workspace are what memory/native.py lists, allocated once."""
    graph_bytes_per_layer: int = 0
    """What a decode step recorded as a CUDA graph takes from the driver, for each layer."""
    prompt_graph_bytes_per_layer: int = 0
    """The same for a piece of a prompt, which has more launches."""
    loading_bytes: int = 0
    """What loading takes on the device, whatever the model."""


QUANTIZED_ROLES: dict[str, frozenset[Role]] = {
    # bitsandbytes replaces linear layers, not the head, nor experts kept as 3-D parameters.
    "transformers": frozenset({Role.LINEAR}),
    "native": frozenset({Role.LINEAR}),
}
"""Engine → what a quantized format really quantizes; the rest stays in the compute dtype."""

_TRANSFORMERS_FORMATS = frozenset({"bf16", "fp16", "llm-int8", "nf4", "nf4-dq", "fp4", "fp4-dq"})
_UNQUANTIZED_FORMATS = frozenset({"bf16", "fp16"})
_CUDA_ALIGNMENT_BYTES = 512
"""torch's CUDA allocator hands out multiples of this (c10/cuda/CUDACachingAllocator.cpp)."""

_CUDA_CONTEXT_BYTES = {
    # 692 MiB with 4-bit weights, 756 with LLM.int8() (benchmarks/results/contract-h200.jsonl).
    "hopper": 768 * MIB,
}
"""GPU architecture → bytes outside torch's allocator after the first answer, where measured."""
_UNMEASURED_CUDA_CONTEXT_BYTES = max(_CUDA_CONTEXT_BYTES.values())
_HOPPER_CUBLAS_WORKSPACE_BYTES = 32 * MIB
_CUBLAS_WORKSPACE_BYTES = 9 * MIB
"""torch's default cuBLAS workspaces (aten/src/ATen/cuda/CUDABlas.cpp): 32 MiB on Hopper, else 8."""


def transformers_profile(device: DeviceSpec, host: HostSpec) -> EngineProfile:
    """transformers with bitsandbytes on that device."""
    if device.kind == "cpu":
        return _transformers_cpu(host)
    architecture = architecture_of(device.compute_capability)
    return EngineProfile(
        engine="transformers",
        device_kind=device.kind,
        formats=_UNQUANTIZED_FORMATS if device.kind == "mps" else _TRANSFORMERS_FORMATS,
        kv_formats=frozenset({"bf16", "fp16"}),
        kv_in_compute_dtype=True,
        quantized_roles=QUANTIZED_ROLES["transformers"],
        alignment_bytes=_CUDA_ALIGNMENT_BYTES,
        context_bytes=_CUDA_CONTEXT_BYTES.get(architecture, _UNMEASURED_CUDA_CONTEXT_BYTES),
        library_workspace_bytes=(
            _HOPPER_CUBLAS_WORKSPACE_BYTES if architecture == "hopper" else _CUBLAS_WORKSPACE_BYTES
        ),
        fragmentation_bytes=96 * MIB,
        buffer_bytes=16 * KIB,
        kv_layer_overhead_bytes=512,
        prefill_chunk_tokens=1024,
        expands_kv_heads=True,
        dequantizes_to_scratch=True,
        repacks_4bit=False,
        scratch_bytes_4bit=0.0,
        # bitsandbytes quantizes a float16 copy (Int8Params._quantize).
        scratch_bytes_8bit=2.0,
        # 405B: 1.6 GiB with 2 layers, 3.4 with 31, 4.2 with 43 (rehearsals-4xh200.jsonl).
        staging_growth=0.035,
        pinned_bytes=128 * MIB,
        host_runtime_bytes=2048 * MIB,
        margin_bytes=256 * MIB,
        measured=_measured(architecture),
    )


def _measured(architecture: str) -> str:
    source = (
        "2026-11-21, NVIDIA H200, torch 2.11, transformers 5.17, bitsandbytes 0.50.2 "
        "(benchmarks/results/rehearsals-h200.jsonl)"
    )
    return source if architecture == "hopper" else f"on another architecture: {source}"


def _transformers_cpu(host: HostSpec) -> EngineProfile:
    return EngineProfile(
        engine="transformers",
        device_kind="cpu",
        formats=_TRANSFORMERS_FORMATS,
        kv_formats=frozenset({"bf16", "fp16"}),
        kv_in_compute_dtype=True,
        quantized_roles=QUANTIZED_ROLES["transformers"],
        alignment_bytes=64,
        context_bytes=0,
        library_workspace_bytes=64 * MIB,
        fragmentation_bytes=32 * MIB,
        buffer_bytes=16 * KIB,
        kv_layer_overhead_bytes=64,
        prefill_chunk_tokens=256,
        expands_kv_heads=True,
        dequantizes_to_scratch="avx512_bf16" not in host.cpu_features,
        repacks_4bit="avx512_bf16" in host.cpu_features,
        # bitsandbytes' plain-torch kernel: float32 copy, scaled copy, int32 (fp4: int64) codes.
        scratch_bytes_4bit=20.0,
        scratch_bytes_8bit=14.0,
        staging_growth=0.0,
        pinned_bytes=0,
        host_runtime_bytes=1024 * MIB,
        margin_bytes=64 * MIB,
        measured="2026-11-21, AVX-512 bf16 processor, torch 2.13, transformers 5.23",
    )


NATIVE_FORMATS = frozenset(
    {"fp32", "bf16", "fp16", "int8", "fp8", "int4", "nf4", "nf4-dq", "nf4-g16", "fp4", "fp4-dq"}
)
_NATIVE_KV_FORMATS = frozenset({"bf16", "fp16", "fp8", "fp32"})


def native_profile(device: DeviceSpec, host: HostSpec) -> EngineProfile:  # noqa: ARG001
    """Our own engine on that device: what it allocates is known, what is around it was measured."""
    on_gpu = device.kind != "cpu"
    architecture = architecture_of(device.compute_capability)
    context_bytes = _NATIVE_CONTEXT_BYTES.get(architecture, max(_NATIVE_CONTEXT_BYTES.values()))
    return EngineProfile(
        engine="native",
        device_kind=device.kind,
        formats=NATIVE_FORMATS,
        kv_formats=_NATIVE_KV_FORMATS,
        kv_in_compute_dtype=False,
        quantized_roles=QUANTIZED_ROLES["native"],
        alignment_bytes=ALIGNMENT_BYTES,
        context_bytes=context_bytes if on_gpu else 0,
        library_workspace_bytes=(
            (
                _HOPPER_CUBLAS_WORKSPACE_BYTES
                if architecture == "hopper"
                else _CUBLAS_WORKSPACE_BYTES
            )
            if on_gpu
            else 64 * MIB
        ),
        # Two segments that grow by 20 MiB, cuBLAS' own and the rest; one of 2 for what is small.
        fragmentation_bytes=32 * MIB,
        buffer_bytes=0,
        kv_layer_overhead_bytes=0,
        prefill_chunk_tokens=CHUNK_TOKENS,
        expands_kv_heads=False,
        dequantizes_to_scratch=not on_gpu,
        repacks_4bit=False,
        scratch_bytes_4bit=0.0 if on_gpu else 24.0,
        scratch_bytes_8bit=0.0 if on_gpu else 12.0,
        staging_growth=0.0,
        pinned_bytes=PINNED_BYTES + 32 * MIB if on_gpu else 0,
        host_runtime_bytes=2048 * MIB if on_gpu else 1024 * MIB,
        margin_bytes=128 * MIB if on_gpu else 64 * MIB,
        measured="2026-11-21, NVIDIA H200, torch 2.11, Triton 3.6 "
        "(benchmarks/results/rehearsals-native-h200.jsonl)",
        is_static=True,
        graph_bytes_per_layer=_GRAPH_BYTES_PER_LAYER if on_gpu else 0,
        prompt_graph_bytes_per_layer=_PROMPT_GRAPH_BYTES_PER_LAYER if on_gpu else 0,
        loading_bytes=DEVICE_STAGING_BYTES if on_gpu else 64 * MIB,
    )


_NATIVE_CONTEXT_BYTES = {"hopper": 784 * MIB}
"""GPU architecture → bytes outside torch's allocator, where measured."""
_GRAPH_BYTES_PER_LAYER = 96 * KIB
_PROMPT_GRAPH_BYTES_PER_LAYER = 256 * KIB

_ENGINES = {"native": native_profile, "transformers": transformers_profile}


def engine_profile(engine: str, device: DeviceSpec, host: HostSpec) -> EngineProfile:
    """The profile of an engine on a device.

    Raises:
        InputError: No engine of that name.
    """
    found = _ENGINES.get(engine)
    if found is None:
        raise InputError(f"unknown engine {engine!r}", remedy=f"use one of {', '.join(_ENGINES)}")
    return found(device, host)
