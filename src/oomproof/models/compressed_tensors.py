"""Reads what a config.json says in the words of compressed-tensors (vLLM, llm-compressor)."""

from __future__ import annotations

from functools import partial

from oomproof.formats import FP8_BLOCK, Component, DType, ceil_div
from oomproof.models.config import ConfigReader
from oomproof.models.quantized import (
    FP8_CAPABILITY,
    INT32_BITS,
    CheckpointQuantization,
    kept_modules,
    layout_format,
)
from oomproof.models.stored_parts import PartsOf, block_parts, row_parts, tensor_parts


def read_compressed_tensors(fields: ConfigReader) -> CheckpointQuantization:
    """One group of linear layers, in 8 bits or packed."""
    groups = fields.nested("config_groups", defaults={})
    if not groups.values:
        groups.fail("", "is empty")
    if len(groups.values) > 1:
        groups.fail(next(iter(groups.values)), "is one of several: only one group is planned")
    group = groups.nested(next(iter(groups.values)), defaults={})
    weights = group.nested("weights", defaults={"symmetric": True})
    bits = weights.required("num_bits")
    strategy = weights.text("strategy") or "tensor"
    group_size = weights.integer("group_size")
    packed = (fields.text("format") or "") == "pack-quantized"
    is_float = weights.text("type") == "float"
    if not packed and bits != 8:
        weights.fail("num_bits", f"{bits} is not 8, and the format is not pack-quantized")
    if strategy == "group" and (group_size is None or group_size < 1):
        weights.fail("group_size", f"{group_size} is no size of a group")
    inputs = group.value("input_activations")
    static = isinstance(inputs, dict) and inputs.get("dynamic") is False
    symmetric = weights.boolean("symmetric")
    name, capability = _name_of(bits, packed=packed, is_float=is_float, group_size=group_size)
    block = weights.integers("block_structure", low=1, high=65_536) or (128, 128)

    def scales(rows: int, columns: int) -> int:
        by_strategy = {
            "tensor": 1,
            "channel": rows,
            "group": rows * ceil_div(columns, group_size or columns),
            "block": ceil_div(rows, block[0]) * ceil_div(columns, block[-1]),
        }
        return by_strategy.get(strategy, rows)

    def layout(rows: int, columns: int) -> tuple[Component, ...]:
        scale = Component(name="weight_scale", dtype=DType.BFLOAT16, numel=scales(rows, columns))
        if packed:
            words = rows * ceil_div(columns * bits, INT32_BITS)
            parts = [
                Component(name="weight_packed", dtype=DType.INT32, numel=words),
                scale,
                Component(name="weight_shape", dtype=DType.INT64, numel=2),
            ]
            if not symmetric:
                zeros = ceil_div(rows * bits, INT32_BITS) * (scale.numel // rows)
                parts.append(Component(name="weight_zero_point", dtype=DType.INT32, numel=zeros))
            return tuple(parts)
        dtype = DType.FLOAT8_E4M3FN if is_float else DType.INT8
        parts = [Component(name="weight", dtype=dtype, numel=rows * columns), scale]
        if static:
            parts.append(Component(name="input_scale", dtype=DType.BFLOAT16, numel=1))
        return tuple(parts)

    held_as, parts, note = _held_compressed(
        strategy,
        DType.FLOAT8_E4M3FN if is_float else DType.INT8,
        unread=_unread(fields, group, packed=packed, symmetric=symmetric),
        static=static,
        whole_blocks=list(block) == [FP8_BLOCK] * 2,
        quantizes_inputs=inputs is not None,
    )
    return CheckpointQuantization(
        method="compressed-tensors",
        format=layout_format(name, bits, layout, "compressed-tensors", capability),
        kept_modules=kept_modules(fields, "ignore"),
        runs_with="vLLM, or transformers with compressed-tensors",
        held_as=held_as,
        parts=parts,
        note=note,
    )


def _unread(
    fields: ConfigReader, group: ConfigReader, *, packed: bool, symmetric: bool
) -> str | None:
    """What a compressed-tensors checkpoint has that the native engine does not read; or None."""
    if packed:
        return "packed codes"
    if not symmetric:
        return "zero points"
    if fields.value("kv_cache_scheme") is not None:
        return "scales of a KV cache"
    sparsity = fields.value("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return "sparse weights"
    if fields.value("transform_config"):
        return "transforms of its weights"
    if group.value("output_activations") is not None:
        return "scales of outputs"
    return None


def _held_compressed(
    strategy: str,
    codes: DType,
    *,
    unread: str | None,
    static: bool,
    whole_blocks: bool,
    quantizes_inputs: bool,
) -> tuple[str | None, PartsOf | None, str]:
    """held_as, parts and note of a compressed-tensors checkpoint in 8 bits."""
    is_float = codes is DType.FLOAT8_E4M3FN
    if unread is not None:
        return None, None, f"it has {unread}"
    if strategy == "block" and is_float and whole_blocks:
        parts = partial(block_parts, scale="weight_scale")
        return "fp8-block", parts, "activations stay in 16 bits"
    if strategy not in ("channel", "tensor"):
        return None, None, f"its scales are by {strategy}"
    if is_float and not quantizes_inputs:
        return None, None, "its activations are in 16 bits, those of native fp8 in 8"
    parts = partial(row_parts if strategy == "channel" else tensor_parts, codes=codes)
    if not is_float:
        return "int8", parts, "activations stay in 16 bits"
    static_note = "activations are scaled token by token, not by the checkpoint's static scales"
    return "fp8", parts, static_note if static else ""


def _name_of(
    bits: int, *, packed: bool, is_float: bool, group_size: int | None
) -> tuple[str, tuple[int, int] | None]:
    if packed:
        return f"w{bits}a16" + (f"-g{group_size}" if group_size else ""), None
    return ("fp8", FP8_CAPABILITY) if is_float else ("w8a8", None)
