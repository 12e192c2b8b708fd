"""llama.cpp: GGUF types and their mixtures, layers over the GPUs, the embedding in host RAM.

Block sizes are those of ggml/src/ggml-common.h. Which tensor of a mixture gets more bits, and what
a row that is no multiple of a block falls back to, follow src/llama-quant.cpp of ggml-org/llama.cpp
(llama_tensor_get_type_impl, tensor_type_fallback), without an importance matrix. A vision tower is
a file of its own there (--mmproj) and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

from oomproof.errors import InputError
from oomproof.formats import DType
from oomproof.hardware.spec import Hardware
from oomproof.memory.kv_cache import layer_kv_bytes
from oomproof.models.spec import ModelSpec, Role, TensorSpec
from oomproof.planning.handoffs.handoff import (
    DeviceShare,
    HandOff,
    command,
    concurrency_of,
    context_of,
    gpus_of,
    repository,
    spread,
    usable_bytes,
)
from oomproof.planning.request import PlanRequest
from oomproof.units import MIB, format_bytes

BLOCKS: dict[str, tuple[int, int]] = {
    # type → (weights of a block, bytes of it)
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_K": (256, 144),
    "Q4_0": (32, 18),
}
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
MIXTURES: dict[str, str] = {
    # ftype → its default type, best quality first
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_0": "Q4_0",
}
_UBATCH_TOKENS = 512
"""llama.cpp's default physical batch."""
CONTEXT_BYTES = 512 * MIB
"""CUDA context and its kernels: an estimate, not measured here."""
_BUFFER_MARGIN_BYTES = 256 * MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """Where a tensor stands in its model."""

    index: int
    count: int

    @property
    def gets_more_bits(self) -> bool:
        """llama-quant.cpp's use_more_bits: the outer eighths, and every third layer between."""
        eighth = self.count // 8
        outer = self.index < eighth or self.index >= 7 * self.count // 8
        return outer or (self.index - eighth) % 3 == 2


def gguf_type(tensor: TensorSpec, spec: ModelSpec, mixture: str) -> str:
    """The type that llama-quantize gives a tensor."""
    if tensor.role in (Role.NORM, Role.BIAS, Role.ROUTER) or len(tensor.shape) < 2:
        return "F32"
    default = MIXTURES[mixture]
    if default in ("BF16", "F16"):
        return default
    chosen = _mixed(tensor, spec, mixture, default)
    columns = tensor.shape[-1]
    while columns % BLOCKS[chosen][0]:
        chosen = _FALLBACKS.get(chosen, "F16")
    return chosen


def _mixed(tensor: TensorSpec, spec: ModelSpec, mixture: str, default: str) -> str:
    """A mixture's type for a matrix, whatever its columns divide by."""
    is_output = tensor.role is Role.HEAD or (
        tensor.role is Role.EMBEDDING and spec.tie_word_embeddings
    )
    if is_output:
        too_narrow = tensor.shape[-1] % BLOCKS[default][0] != 0
        return "Q8_0" if too_narrow or default == "Q8_0" else "Q6_K"
    if tensor.layer is None:
        return default
    layer = _Layer(index=tensor.layer, count=spec.num_hidden_layers)
    module = tensor.name.removesuffix(".weight").rsplit(".", 1)[-1]
    if spec.num_experts == 8 and module in ("v_proj", "k_proj"):
        return "Q8_0"
    return _RULES.get(module, _unchanged)(layer, mixture, default, spec)


def _unchanged(layer: _Layer, mixture: str, default: str, spec: ModelSpec) -> str:  # noqa: ARG001
    return default


def _values(layer: _Layer, mixture: str, default: str, spec: ModelSpec) -> str:  # noqa: ARG001
    if mixture in _MANY and layer.gets_more_bits:
        return "Q6_K"
    if mixture == "Q4_K_S" and layer.index < 4:
        return "Q5_K"
    # Llama's 80-layer models share a value head among eight query heads.
    return "Q5_K" if default == "Q4_K" and layer.count == 80 else default


def _down(layer: _Layer, mixture: str, default: str, spec: ModelSpec) -> str:  # noqa: ARG001
    if mixture in _MANY and layer.gets_more_bits:
        return "Q6_K"
    return "Q5_K" if mixture == "Q4_K_S" and layer.index < layer.count // 8 else default


def _attention_output(layer: _Layer, mixture: str, default: str, spec: ModelSpec) -> str:  # noqa: ARG001
    return "Q5_K" if spec.num_experts == 8 and default == "Q4_K" else default


def _fused(layer: _Layer, mixture: str, default: str, spec: ModelSpec) -> str:  # noqa: ARG001
    return {"Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}.get(mixture, default)


_MANY = ("Q4_K_M", "Q5_K_M")
_RULES: dict[str, Callable[[_Layer, str, str, ModelSpec], str]] = {
    "v_proj": _values,
    "down_proj": _down,
    "o_proj": _attention_output,
    "qkv_proj": _fused,
}
"""Module → what a mixture does to it."""


def gguf_bytes(tensor: TensorSpec, spec: ModelSpec, mixture: str) -> int:
    """Bytes of a tensor in the file, and on its device."""
    weights, size = BLOCKS[gguf_type(tensor, spec, mixture)]
    return prod(tensor.shape) // weights * size


def hand_off_llama_cpp(
    spec: ModelSpec, hardware: Hardware, request: PlanRequest, format_name: str
) -> HandOff:
    """The best mixture that fits, with the commands that make and serve it.

    Raises:
        InputError: An already quantized checkpoint, a format that is no mixture, no GPU.
    """
    if spec.checkpoint_quantization is not None:
        raise InputError(
            f"{spec.id} is already quantized, and llama.cpp converts 16-bit checkpoints",
            remedy="hand over the 16-bit checkpoint it was made from",
        )
    wanted = _wanted(format_name)
    devices = gpus_of(hardware, ("cuda", "rocm", "mps"), "llama.cpp")
    context, concurrency = context_of(spec, request), concurrency_of(request)
    usable = [usable_bytes(device, request) for device in devices]
    kv_type = "q8_0" if request.kv_format == "fp8" else "f16"
    reasons: list[str] = []
    shortfall = 0
    for mixture in wanted:
        needs = _unit_bytes(spec, mixture, context, concurrency, kv_type)
        ranges = spread(needs, partial(_range_overhead, spec, len(needs)), usable)
        if ranges is not None:
            break
        total = sum(needs) + len(usable) * _overhead_bytes(spec, with_head=False)
        shortfall = max(1, total - sum(usable))
        reasons.append(f"{mixture} does not fit: about {format_bytes(shortfall)} missing")
    else:
        ranges = None
    source_bytes = spec.num_parameters * spec.dtype.itemsize
    reasons.append(
        f"the token embedding stays in host RAM: {format_bytes(_embedding_bytes(spec, mixture))}"
    )
    reasons.append("contexts and compute buffers are estimates: they were not measured here")
    if spec.extra_modules:
        reasons.append("the vision tower is a file of its own (--mmproj) and is not counted")
    kv_units = _kv_units(spec, context, concurrency, kv_type)
    shares = [
        DeviceShare(
            index=device.index,
            name=device.name,
            usable_bytes=usable[position],
            weights_bytes=sum(needs[first:end]) - sum(kv_units[first:end]),
            kv_cache_bytes=sum(kv_units[first:end]),
            overhead_bytes=_overhead_bytes(spec, end == len(needs)),
        )
        for position, (device, (first, end)) in enumerate(zip(devices, ranges or [], strict=False))
    ]
    return HandOff(
        engine="llama.cpp",
        model=spec.id,
        format=None if ranges is None else mixture,
        fits=ranges is not None,
        commands=()
        if ranges is None
        else _commands(spec, mixture, ranges, context, concurrency, kv_type),
        context=context,
        concurrency=concurrency,
        devices=tuple(shares),
        shortfall_bytes=0 if ranges is not None else shortfall,
        download_bytes=source_bytes,
        host_bytes=_embedding_bytes(spec, mixture),
        reasons=tuple(reasons),
    )


def _wanted(name: str) -> list[str]:
    if name == "auto":
        return list(MIXTURES)
    found = {mixture.casefold(): mixture for mixture in MIXTURES}.get(name.casefold())
    if found is not None:
        return [found]
    # Our own words, in the nearest of llama.cpp's.
    nearest = {"fp16": "BF16", "int8": "Q8_0", "llm-int8": "Q8_0", "int4": "Q4_0"}
    if name in nearest:
        return [nearest[name]]
    raise InputError(
        f"{name} is no GGUF type", remedy=f"use --format auto, or one of {', '.join(MIXTURES)}"
    )


def _kv_units(spec: ModelSpec, context: int, concurrency: int, kv_type: str) -> list[int]:
    """Cache bytes of each layer, and of the output."""
    scale = (34, 64) if kv_type == "q8_0" else (1, 1)
    layers = [
        layer_kv_bytes(layer, context=context, concurrency=concurrency, dtype=DType.FLOAT16)
        * scale[0]
        // scale[1]
        for layer in spec.attention
    ]
    return [*layers, 0]


def _unit_bytes(
    spec: ModelSpec, mixture: str, context: int, concurrency: int, kv_type: str
) -> list[int]:
    """Bytes of each layer with its cache, and of norm and output; the embedding is elsewhere."""
    units = _kv_units(spec, context, concurrency, kv_type)
    for tensor in spec.tensors:
        size = gguf_bytes(tensor, spec, mixture)
        if tensor.layer is not None and tensor.name.startswith(spec.decoder_prefix):
            units[tensor.layer] += size
        elif tensor.role is Role.EMBEDDING:
            units[-1] += size if spec.tie_word_embeddings else 0
        elif tensor.name.startswith((spec.decoder_prefix, "lm_head")):
            units[-1] += size
    return units


def _embedding_bytes(spec: ModelSpec, mixture: str) -> int:
    return sum(gguf_bytes(t, spec, mixture) for t in spec.tensors if t.role is Role.EMBEDDING)


def _range_overhead(spec: ModelSpec, num_units: int, _first: int, end: int) -> int:
    return _overhead_bytes(spec, end == num_units)


def _overhead_bytes(spec: ModelSpec, with_head: bool) -> int:
    # Hidden states, gate and up of a physical batch in float32, and its logits.
    layer = _UBATCH_TOKENS * 4 * (3 * spec.intermediate_size + 6 * spec.hidden_size)
    logits = _UBATCH_TOKENS * 4 * spec.vocab_size if with_head else 0
    return CONTEXT_BYTES + _BUFFER_MARGIN_BYTES + max(layer, logits)


def _commands(
    spec: ModelSpec,
    mixture: str,
    ranges: list[tuple[int, int]],
    context: int,
    concurrency: int,
    kv_type: str,
) -> tuple[str, ...]:
    name = repository(spec).rstrip("/").rsplit("/", 1)[-1]
    source, made = f"{name}-BF16.gguf", f"{name}-{mixture}.gguf"
    lines = []
    folder = repository(spec)
    if spec.source.kind != "folder":
        folder = name
        lines.append(command("hf", "download", repository(spec), "--local-dir", name))
    lines.append(
        command("python", "convert_hf_to_gguf.py", folder, "--outtype", "bf16", "--outfile", source)
    )
    if mixture != "BF16":
        lines.append(command("llama-quantize", source, made, mixture))
    words: list[object] = ["llama-server", "-m", made, "-ngl", spec.num_hidden_layers + 1]
    words += ["-c", context * concurrency, "-np", concurrency, "-fa", "on"]
    if kv_type != "f16":
        words += ["-ctk", kv_type, "-ctv", kv_type]
    if len(ranges) > 1:
        words += ["-sm", "layer", "-ts", ",".join(str(end - first) for first, end in ranges)]
    lines.append(command(*words))
    return tuple(lines)
