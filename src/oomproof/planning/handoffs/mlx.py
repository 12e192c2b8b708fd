"""MLX: affine quantization of every matrix, on one Mac or shared by several.

mlx-lm quantizes each layer whose last dimension is a multiple of the group, embedding and head
among them, to `bits` a weight and a 16-bit scale and bias for each group (mlx_lm/utils.py,
quantize_model; mlx's affine mode). Metal lends a process about three quarters of a Mac's memory;
the catalog's free bytes of a Mac are that. Several Macs share each layer's products (mlx_lm.server
under mlx.launch: models/*.py, shard): their key-value heads must divide by the number of Macs, and
each Mac holds the whole embedding and head.
"""

from __future__ import annotations

from oomproof.errors import InputError
from oomproof.formats import DType, ceil_div
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
    usable_bytes,
)
from oomproof.planning.request import PlanRequest
from oomproof.units import GIB, format_bytes

GROUP_SIZE = 64
BITS = (16, 8, 6, 5, 4, 3)
"""What mlx_lm.convert's affine mode takes, best quality first; 16 is no quantization."""
_OURS = {"bf16": 16, "fp16": 16, "int8": 8, "llm-int8": 8, "int4": 4, "nf4": 4, "nf4-dq": 4}
_SHARED = frozenset(
    {"llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "ministral3", "gpt_oss"}
)
"""Model types that mlx-lm 0.32 can share between Macs."""
OVERHEAD_BYTES = 2 * GIB
"""Metal's buffers of a prefill step of 2,048 tokens and of the process: an estimate."""


def mlx_bytes(tensor: TensorSpec, bits: int) -> int:
    """Bytes of a parameter."""
    matrix = tensor.role in (
        Role.LINEAR,
        Role.HEAD,
        Role.EMBEDDING,
        Role.EXPERTS,
        Role.ROUTER,
    )
    if bits == 16 or not matrix or len(tensor.shape) < 2 or tensor.shape[-1] % GROUP_SIZE:
        return 2 * tensor.numel
    return tensor.numel * bits // 8 + 2 * 2 * (tensor.numel // GROUP_SIZE)


def hand_off_mlx(
    spec: ModelSpec, hardware: Hardware, request: PlanRequest, format_name: str
) -> HandOff:
    """The most bits that fit, with the commands that convert and serve.

    Raises:
        InputError: No Mac, Macs that cannot share the model, or a quantized checkpoint.
    """
    if spec.checkpoint_quantization is not None:
        raise InputError(
            f"{spec.id} is already quantized, and mlx-lm converts 16-bit checkpoints",
            remedy="hand over the 16-bit checkpoint it was made from",
        )
    macs = gpus_of(hardware, ("mps",), "MLX")
    count = len(macs)
    _require_shareable(spec, count)
    context, concurrency = context_of(spec, request), concurrency_of(request)
    usable = [usable_bytes(mac, request) for mac in macs]
    kv_bytes = sum(
        layer_kv_bytes(layer, context=context, concurrency=concurrency, dtype=DType.FLOAT16)
        for layer in spec.attention
    )
    reasons: list[str] = []
    chosen, shortfall, weights = None, 0, 0
    for bits in _wanted(format_name):
        weights = _weights_of_each(spec, bits, count)
        missing = [
            max(0, weights + ceil_div(kv_bytes, count) + OVERHEAD_BYTES - each) for each in usable
        ]
        if not any(missing):
            chosen = bits
            break
        shortfall = sum(missing)
        reasons.append(f"{_name(bits)} does not fit: {format_bytes(shortfall)} missing")
    reasons.append("Metal lends about 75 % of a Mac's memory; iogpu.wired_limit_mb can raise it")
    if spec.extra_modules:
        reasons.append("mlx-lm loads the text model only; the vision tower is counted all the same")
    return HandOff(
        engine="mlx",
        model=spec.id,
        format=None if chosen is None else _name(chosen),
        fits=chosen is not None,
        commands=() if chosen is None else _commands(spec, chosen, count),
        context=context,
        concurrency=concurrency,
        devices=tuple(
            DeviceShare(
                index=mac.index,
                name=mac.name,
                usable_bytes=limit,
                weights_bytes=weights,
                kv_cache_bytes=ceil_div(kv_bytes, count),
                overhead_bytes=OVERHEAD_BYTES,
            )
            for mac, limit in zip(macs, usable, strict=True)
        ),
        shortfall_bytes=0 if chosen is not None else shortfall,
        download_bytes=spec.num_parameters * spec.dtype.itemsize,
        reasons=tuple(reasons),
    )


def _require_shareable(spec: ModelSpec, count: int) -> None:
    if count == 1:
        return
    model_type = str(spec.config.get("model_type"))
    if model_type not in _SHARED:
        raise InputError(
            f"mlx-lm does not share a {model_type} model between {count} Macs",
            remedy="plan one larger Mac",
        )
    heads = min(layer.num_key_value_heads for layer in spec.attention)
    if heads % count:
        raise InputError(
            f"{heads} key-value heads of {spec.id} do not divide between {count} Macs",
            remedy="plan a number of Macs that divides them",
        )


def _wanted(name: str) -> list[int]:
    if name == "auto":
        return list(BITS)
    if name in _OURS:
        return [_OURS[name]]
    raise InputError(
        f"{name} is no format of MLX", remedy=f"use --format auto, or one of {', '.join(_OURS)}"
    )


def _name(bits: int) -> str:
    return "bf16" if bits == 16 else f"{bits}-bit g{GROUP_SIZE}"


def _weights_of_each(spec: ModelSpec, bits: int, count: int) -> int:
    """Bytes that each of several Macs holds: products are shared, the rest is on every one."""
    shared = sum(mlx_bytes(t, bits) for t in spec.tensors if t.role in (Role.LINEAR, Role.EXPERTS))
    whole = sum(
        mlx_bytes(t, bits) for t in spec.tensors if t.role not in (Role.LINEAR, Role.EXPERTS)
    )
    return ceil_div(shared, count) + whole


def _commands(spec: ModelSpec, bits: int, count: int) -> tuple[str, ...]:
    source = repository(spec)
    lines = []
    model = source
    if bits != 16:
        model = f"{source.rstrip('/').rsplit('/', 1)[-1]}-{bits}bit"
        words = ["--hf-path", source, "--mlx-path", model]
        words += ["-q", "--q-bits", str(bits), "--q-group-size", str(GROUP_SIZE)]
        lines.append(command("mlx_lm.convert", *words))
    if count == 1:
        lines.append(command("mlx_lm.server", "--model", model))
    else:
        # hosts.json lists the Macs: [{"ssh": "first"}, {"ssh": "second"}].
        lines.append(
            command("mlx.launch", "--hostfile", "hosts.json", "mlx_lm.server", "--model", model)
        )
    return tuple(lines)
