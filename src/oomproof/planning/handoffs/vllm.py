"""vLLM: 16 bits, FP8, or a repository that is quantized already; equal shares over equal GPUs.

NF4 is none of its formats: bitsandbytes left its core with version 0.28. With `--quantization fp8`
vLLM quantizes while loading, one layer in 16 bits at a time (version 0.33,
model_executor/layers/quantization/online/fp8.py; older ones held the whole model in 16 bits first).
Tensor parallelism splits every product, the embedding and the head; heads must divide by the GPUs,
and key-value heads are repeated where there are fewer of them than GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from oomproof.errors import InputError, NotRunnableError
from oomproof.formats import Component, DType, ceil_div
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.memory.kv_cache import layer_kv_bytes
from oomproof.memory.weights import stored
from oomproof.models.catalog import find
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.handoffs.handoff import (
    DeviceShare,
    HandOff,
    command,
    concurrency_of,
    context_of,
    gpus_of,
    repository,
    usable_bytes,
)
from oomproof.planning.request import PlanRequest
from oomproof.units import GIB, format_bytes

FP8_CAPABILITY = (8, 9)
OVERHEAD_BYTES = int(2.5 * GIB)
"""CUDA context, CUDA graphs, NCCL and the activations of 8,192 batched tokens: an estimate."""
_PLACEHOLDER = "ORG/QUANTIZED-REPO"
_W4A16_GROUP = 128
_NAMES = ("bf16", "fp16", "fp8", "int4")
_NOT_VLLMS = {
    "nf4": "nf4 is no format of vLLM, whose core has had no bitsandbytes since 0.28",
    "nf4-dq": "nf4-dq is no format of vLLM, whose core has had no bitsandbytes since 0.28",
    "fp4": "fp4 is no format of vLLM, whose core has had no bitsandbytes since 0.28",
    "fp4-dq": "fp4-dq is no format of vLLM, whose core has had no bitsandbytes since 0.28",
    "llm-int8": "LLM.int8() is no format of vLLM, whose core has had no bitsandbytes since 0.28",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """A way to run a model in vLLM."""

    format: str
    weights_bytes: int
    loading_bytes: int
    """What the GPUs hold at most while loading, all together."""
    repository: str
    options: tuple[str, ...] = ()
    note: str | None = None


def hand_off_vllm(
    spec: ModelSpec, hardware: Hardware, request: PlanRequest, format_name: str
) -> HandOff:
    """The best quality that fits over the fewest equal GPUs, with the command that serves it.

    Raises:
        InputError: A format that vLLM does not know, or no GPU.
        NotRunnableError: FP8 was asked for on a GPU that has none, or the checkpoint is
            bitsandbytes'.
    """
    gpus = gpus_of(hardware, ("cuda", "rocm"), "vLLM")
    equal = _equal_gpus(gpus)
    context, concurrency = context_of(spec, request), concurrency_of(request)
    reasons: list[str] = []
    if len(equal) < len(gpus):
        reasons.append(
            f"vLLM gives every GPU an equal share: {len(equal)} of the {len(gpus)} GPUs are used"
        )
    choices = _choices(spec, format_name, equal[0], reasons)
    utilization = _utilization(equal, request)
    shortfall = 0
    for choice in choices:
        for size in _sizes(spec, len(equal)):
            kv_bytes = _kv_bytes_of_each(spec, context, concurrency, size, request)
            needs = max(
                ceil_div(choice.weights_bytes, size) + kv_bytes,
                ceil_div(choice.loading_bytes, size),
            )
            usable = floor(utilization * equal[0].total_bytes)
            shortfall = size * max(0, needs + OVERHEAD_BYTES - usable)
            if shortfall == 0:
                if choice.note:
                    reasons.append(choice.note)
                return _done(
                    spec, request, equal[:size], choice, kv_bytes, usable, utilization, reasons
                )
        reasons.append(f"{choice.format} does not fit: {format_bytes(shortfall)} missing")
    return HandOff(
        engine="vllm",
        model=spec.id,
        format=None,
        fits=False,
        commands=(),
        context=context,
        concurrency=concurrency,
        devices=(),
        shortfall_bytes=shortfall,
        download_bytes=spec.num_parameters * spec.dtype.itemsize,
        reasons=tuple(reasons),
    )


def _choices(spec: ModelSpec, asked: str, gpu: DeviceSpec, reasons: list[str]) -> list[_Choice]:
    """What vLLM can run of this model, best quality first."""
    quantization = spec.checkpoint_quantization
    if quantization is not None:
        return [_as_it_is(spec, gpu)]
    has_fp8 = gpu.compute_capability is None or gpu.compute_capability >= FP8_CAPABILITY
    no_fp8 = "FP8 needs compute capability 8.9" + (
        ""
        if gpu.compute_capability is None
        else f", {gpu.name} has {gpu.compute_capability[0]}.{gpu.compute_capability[1]}"
    )
    if asked in _NOT_VLLMS:
        instead = "FP8 or a quantized repository" if has_fp8 else "a quantized repository"
        reasons.append(f"{_NOT_VLLMS[asked]}; {instead} is proposed instead")
        asked = "below 16 bits"
    elif asked not in ("auto", *_NAMES):
        raise InputError(
            f"{asked} is no format of vLLM",
            remedy=f"use --format auto, or one of {', '.join(_NAMES)}",
        )
    if asked == "fp8" and not has_fp8:
        raise NotRunnableError(f"{no_fp8}: it would become 16 bits, at twice the memory")
    found = []
    if asked in ("auto", "bf16", "fp16"):
        found.append(_sixteen_bits(spec))
    if asked in ("auto", "fp8", "below 16 bits"):
        if has_fp8:
            found += _fp8(spec)
        else:
            reasons.append(no_fp8)
    if asked in ("auto", "int4", "below 16 bits"):
        found.append(_four_bits(spec))
    return found


def _sixteen_bits(spec: ModelSpec) -> _Choice:
    size = spec.num_parameters * 2
    return _Choice(
        format="bf16", weights_bytes=size, loading_bytes=size, repository=repository(spec)
    )


def _fp8(spec: ModelSpec) -> list[_Choice]:
    """While loading from 16 bits; then from a checkpoint in FP8, which needs no such room."""
    scales = sum(4 for t in spec.tensors if t.role is Role.LINEAR)
    uniform = scales + sum(
        t.numel * (1 if t.role in (Role.LINEAR, Role.EXPERTS) else 2) for t in spec.tensors
    )
    online = _Choice(
        format="fp8",
        weights_bytes=uniform,
        loading_bytes=uniform + _largest_layer_bytes(spec),
        repository=repository(spec),
        options=("--quantization", "fp8"),
        note="--quantization fp8 quantizes layer by layer while loading (vLLM 0.33; much older "
        "versions need room for the 16-bit model)",
    )
    sibling = find(f"{spec.id.split('/')[-1].casefold()}-fp8")
    if sibling is None:
        ready = _Choice(
            format="fp8 (a quantized repository)",
            weights_bytes=uniform,
            loading_bytes=uniform,
            repository=_PLACEHOLDER,
            note=f"the model does not fit while it is quantized: put a repository of {spec.id} in "
            f"FP8 in the place of {_PLACEHOLDER}",
        )
    else:
        own = sibling.spec()
        size = _stored_bytes(own)
        ready = _Choice(
            format="fp8 (a quantized repository)",
            weights_bytes=size,
            loading_bytes=size,
            repository=sibling.repository,
            note=f"{sibling.repository} is in FP8 already, in its own layout",
        )
    return [online, ready]


def _largest_layer_bytes(spec: ModelSpec) -> int:
    """The largest layer in 16 bits."""
    layers: dict[int, int] = {}
    for tensor in spec.tensors:
        if tensor.layer is not None:
            layers[tensor.layer] = layers.get(tensor.layer, 0) + 2 * tensor.numel
    return max(layers.values())


def _four_bits(spec: ModelSpec) -> _Choice:
    def size(rows: int, columns: int) -> int:
        scales = rows * ceil_div(columns, _W4A16_GROUP)
        return ceil_div(rows * columns, 2) + scales * DType.BFLOAT16.itemsize

    total = 0
    for tensor in spec.tensors:
        if tensor.role in (Role.LINEAR, Role.EXPERTS) and len(tensor.shape) > 1:
            *experts, rows, columns = tensor.shape
            total += size(rows, columns) * (experts[0] if experts else 1)
        else:
            total += 2 * tensor.numel
    return _Choice(
        format=f"w4a16-g{_W4A16_GROUP} (a quantized repository)",
        weights_bytes=total,
        loading_bytes=total,
        repository=_PLACEHOLDER,
        note="vLLM does not quantize to 4 bits while loading: put a repository of "
        f"{spec.id} in AWQ, GPTQ or compressed-tensors in the place of {_PLACEHOLDER}",
    )


def _as_it_is(spec: ModelSpec, gpu: DeviceSpec) -> _Choice:
    quantization = spec.checkpoint_quantization
    assert quantization is not None
    if quantization.format is None:
        raise NotRunnableError(f"{spec.id} is a {quantization.method} checkpoint: not sized here")
    if quantization.method == "bitsandbytes":
        raise NotRunnableError(
            f"{spec.id} is a bitsandbytes checkpoint, which vLLM's core has not read since 0.28",
            remedy="hand over the 16-bit checkpoint, or one in FP8, AWQ or GPTQ",
        )
    needed = quantization.format.min_compute_capability
    if needed and gpu.compute_capability and gpu.compute_capability < needed:
        has = gpu.compute_capability
        raise NotRunnableError(
            f"{quantization.format.name} needs compute capability {needed[0]}.{needed[1]}, "
            f"{gpu.name} has {has[0]}.{has[1]}: it would become 16 bits, at twice the memory"
        )
    size = _stored_bytes(spec)
    return _Choice(
        format=quantization.format.name,
        weights_bytes=size,
        loading_bytes=size,
        repository=repository(spec),
    )


def _stored_bytes(spec: ModelSpec) -> int:
    quantization = spec.checkpoint_quantization
    assert quantization is not None
    assert quantization.format is not None
    parts: list[Component] = []
    for tensor in spec.tensors:
        held = stored(tensor, quantization.format, DType.BFLOAT16, frozenset({Role.LINEAR}))
        parts += held.components
    return sum(part.size_bytes for part in parts)


def _equal_gpus(gpus: tuple[DeviceSpec, ...]) -> tuple[DeviceSpec, ...]:
    """The kind of GPU with the most memory together."""
    kinds: dict[tuple[str, int], list[DeviceSpec]] = {}
    for gpu in gpus:
        kinds.setdefault((gpu.name, gpu.total_bytes), []).append(gpu)
    return tuple(max(kinds.values(), key=lambda kind: sum(gpu.free_bytes for gpu in kind)))


def _sizes(spec: ModelSpec, count: int) -> list[int]:
    """Tensor-parallel sizes that the heads divide by, the smallest first."""
    return [
        size
        for size in (1, 2, 4, 8, 16)
        if size <= count and spec.num_attention_heads % size == 0 and _divides(spec, size)
    ]


def _divides(spec: ModelSpec, size: int) -> bool:
    return all(
        layer.num_key_value_heads % size == 0 or size % layer.num_key_value_heads == 0
        for layer in spec.attention
    )


def _kv_bytes_of_each(
    spec: ModelSpec, context: int, concurrency: int, size: int, request: PlanRequest
) -> int:
    dtype = DType.FLOAT8_E4M3FN if request.kv_format == "fp8" else DType.BFLOAT16
    total = 0
    for layer in spec.attention:
        whole = layer_kv_bytes(layer, context=context, concurrency=concurrency, dtype=dtype)
        total += ceil_div(whole, min(size, layer.num_key_value_heads))
    return total


def _utilization(gpus: tuple[DeviceSpec, ...], request: PlanRequest) -> float:
    """--gpu-memory-utilization: a share of the total, rounded down."""
    shares = [usable_bytes(gpu, request) / gpu.total_bytes for gpu in gpus]
    return floor(100 * min(shares)) / 100


def _done(
    spec: ModelSpec,
    request: PlanRequest,
    gpus: tuple[DeviceSpec, ...],
    choice: _Choice,
    kv_bytes: int,
    usable: int,
    utilization: float,
    reasons: list[str],
) -> HandOff:
    size = len(gpus)
    context, concurrency = context_of(spec, request), concurrency_of(request)
    words: list[object] = ["vllm", "serve", choice.repository, *choice.options]
    if size > 1:
        words += ["--tensor-parallel-size", size]
    words += ["--max-model-len", context, "--max-num-seqs", concurrency]
    words += ["--gpu-memory-utilization", f"{utilization:.2f}"]
    if request.kv_format == "fp8":
        words += ["--kv-cache-dtype", "fp8"]
    reasons.append(
        f"{format_bytes(OVERHEAD_BYTES)} a GPU for context, graphs and activations: an estimate"
    )
    return HandOff(
        engine="vllm",
        model=spec.id,
        format=choice.format,
        fits=True,
        commands=(command(*words),),
        context=context,
        concurrency=concurrency,
        devices=tuple(
            DeviceShare(
                index=gpu.index,
                name=gpu.name,
                usable_bytes=usable,
                weights_bytes=ceil_div(choice.weights_bytes, size),
                kv_cache_bytes=kv_bytes,
                overhead_bytes=OVERHEAD_BYTES,
            )
            for gpu in gpus
        ),
        shortfall_bytes=0,
        download_bytes=choice.weights_bytes
        if "repository" in choice.format
        else spec.num_parameters * spec.dtype.itemsize,
        reasons=tuple(reasons),
    )
