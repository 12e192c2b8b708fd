"""Checkpoints that are quantized already: how config.json says so, and what they then hold.

One reader and one layout a method, registered in READERS. A layout gives, for a linear layer of
[rows, columns] = [out_features, in_features], the tensors that a checkpoint holds in place of its
weight, under their names in the file:

bitsandbytes        QLoRA's 4-bit formats and LLM.int8(), as formats.py has them
fbgemm_fp8          float8 e4m3 with a float32 scale a row, and a bound of the input's scale
                    (transformers, integrations/fbgemm_fp8.py)
fp8                 "fine-grained": a float32 scale for each block, mostly 128 × 128
                    (transformers, integrations/finegrained_fp8.py; DeepSeek-V3, Qwen3); without
                    blocks a scale a tensor (neuralmagic/AutoFP8)
compressed-tensors  by its `format`: float- and int-quantized (a scale a tensor, a row or a block),
                    pack-quantized (codes in int32) (vllm-project/compressed-tensors, compressors/)
gptq                codes packed along the input in int32, a zero and a 16-bit scale a group, and
                    the group of each input (AutoGPTQ, nn_modules/qlinear)
awq                 codes packed along the output, a zero and a 16-bit scale a group
                    (AutoAWQ, modules/linear)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod

from oomproof.formats import FORMATS, FP8_BLOCK, Component, DType, ceil_div
from oomproof.models.compressed_tensors import read_compressed_tensors
from oomproof.models.config import ConfigReader
from oomproof.models.quantized import (
    FP8_CAPABILITY,
    INT32_BITS,
    CheckpointQuantization,
    kept_modules,
    layout_format,
)
from oomproof.models.spec import CheckpointSpec, CheckpointTensor, Role, TensorSpec
from oomproof.models.stored_parts import (
    bitsandbytes_parts,
    block_parts,
    llm_int8_parts,
    row_parts,
    tensor_parts,
)

PLAIN_DTYPES = frozenset({DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32, DType.FLOAT64})
"""Element types of weights that are not quantized."""
MAX_QUANT_STATE_BYTES = 4096
"""Of the JSON that a bitsandbytes checkpoint holds for each weight; it has about 180."""


def read_quantization(reader: ConfigReader) -> CheckpointQuantization | None:
    """What a config.json says of quantization; None for plain weights.

    Raises:
        ConfigError: A quantization_config without a method, or with a field that is missing, of
            the wrong type or out of bounds.
    """
    if reader.value("quantization_config") is None:
        return None
    fields = reader.nested("quantization_config", defaults={})
    method = fields.text("quant_method")
    if method is None and (fields.boolean("load_in_4bit") or fields.boolean("load_in_8bit")):
        method = "bitsandbytes"  # before transformers 4.38 the method was not written
    if method is None:
        fields.fail("quant_method", "is missing")
    read = READERS.get(method)
    if read is None:
        return CheckpointQuantization(method=method, format=None)
    return read(fields)


def as_stored(
    tensors: Iterable[TensorSpec],
    quantization: CheckpointQuantization | None,
    checkpoint: CheckpointSpec | None,
) -> tuple[TensorSpec, ...]:
    """Marks what an already quantized checkpoint keeps in 16 bits, and what it stores for the rest.

    Args:
        tensors: The model's parameters.
        quantization: How the checkpoint is quantized.
        checkpoint: Its headers, where they were read: they are exact where a config is not.
    """
    if quantization is None or quantization.format is None:
        return tuple(tensors)
    held = parts_of_modules(checkpoint) if checkpoint is not None else {}
    return tuple(_as_stored(tensor, quantization, held) for tensor in tensors)


def parts_of_modules(
    checkpoint: CheckpointSpec,
) -> Mapping[str, Mapping[str, CheckpointTensor]]:
    """Module → the tensors that a checkpoint holds for it, by the last part of their names."""
    modules: dict[str, dict[str, CheckpointTensor]] = {}
    for tensor in checkpoint.tensors:
        module, _, part = tensor.name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    return modules


def _as_stored(
    tensor: TensorSpec,
    quantization: CheckpointQuantization,
    held: Mapping[str, Mapping[str, CheckpointTensor]],
) -> TensorSpec:
    if tensor.role not in (Role.LINEAR, Role.EXPERTS):
        return tensor
    module = tensor.name.removesuffix(".weight")
    parts = held.get(module)
    if parts is None:
        return replace(tensor, kept=quantization.keeps(module))
    weight = parts.get("weight")
    if weight is not None and weight.dtype in PLAIN_DTYPES:
        return replace(tensor, kept=True)
    if quantization.method == "bitsandbytes":
        # Its statistics lie in the file otherwise than in memory: formats.py has the latter.
        return tensor
    stored = tuple(
        Component(name=name, dtype=part.dtype, numel=prod(part.shape))
        for name, part in parts.items()
        if name != "bias"
    )
    return replace(tensor, stored_as=stored)


def _bitsandbytes(fields: ConfigReader) -> CheckpointQuantization:
    kept = kept_modules(fields, "llm_int8_skip_modules")
    if fields.boolean("load_in_8bit"):
        name = "llm-int8"
    elif fields.boolean("load_in_4bit"):
        quant_type = fields.text("bnb_4bit_quant_type") or "fp4"
        if quant_type not in ("nf4", "fp4"):
            fields.fail("bnb_4bit_quant_type", f"{quant_type!r} is neither nf4 nor fp4")
        storage = fields.text("bnb_4bit_quant_storage") or "uint8"
        if storage != "uint8":
            fields.fail("bnb_4bit_quant_storage", f"{storage!r} is not uint8")
        name = quant_type + ("-dq" if fields.boolean("bnb_4bit_use_double_quant") else "")
    else:
        fields.fail("load_in_4bit", "is not true, and neither is load_in_8bit")
    weight_format = FORMATS[name]
    is_int8 = name == "llm-int8"
    return CheckpointQuantization(
        method="bitsandbytes",
        format=weight_format,
        kept_modules=kept,
        runs_with="transformers",
        held_as="int8" if is_int8 else name,
        parts=(
            llm_int8_parts if is_int8 else partial(bitsandbytes_parts, weight_format=weight_format)
        ),
        note="activations stay in 16 bits, outliers or not" if is_int8 else "",
    )


def _fbgemm_fp8(fields: ConfigReader) -> CheckpointQuantization:
    def layout(rows: int, columns: int) -> tuple[Component, ...]:
        return (
            Component(name="weight", dtype=DType.FLOAT8_E4M3FN, numel=rows * columns),
            Component(name="weight_scale", dtype=DType.FLOAT32, numel=rows),
            Component(name="input_scale_ub", dtype=DType.FLOAT32, numel=1),
        )

    return CheckpointQuantization(
        method="fbgemm_fp8",
        format=layout_format(
            "fp8", 8, layout, "e4m3, a float32 scale a row (FBGEMM)", FP8_CAPABILITY
        ),
        kept_modules=kept_modules(fields, "modules_to_not_convert"),
        runs_with="vLLM, or transformers with fbgemm-gpu",
        held_as="fp8",
        parts=partial(row_parts, codes=DType.FLOAT8_E4M3FN),
        note="activations are scaled token by token, and not bounded by input_scale_ub",
    )


def _fp8(fields: ConfigReader) -> CheckpointQuantization:
    if fields.value("weight_block_size") is None:
        return _auto_fp8(fields)
    block = fields.integers("weight_block_size", low=1, high=65_536)
    if len(block) != 2:
        fields.fail("weight_block_size", f"{list(block)} is not [rows, columns]")
    is_held = list(block) == [FP8_BLOCK] * 2 and fields.text("activation_scheme") != "static"

    def layout(rows: int, columns: int) -> tuple[Component, ...]:
        blocks = ceil_div(rows, block[0]) * ceil_div(columns, block[1])
        return (
            Component(name="weight", dtype=DType.FLOAT8_E4M3FN, numel=rows * columns),
            Component(name="weight_scale_inv", dtype=DType.FLOAT32, numel=blocks),
        )

    return CheckpointQuantization(
        method="fp8",
        format=layout_format(
            "fp8-block",
            8,
            layout,
            f"e4m3, a float32 scale for each {block[0]}x{block[1]}",
            FP8_CAPABILITY,
        ),
        kept_modules=kept_modules(fields, "modules_to_not_convert"),
        runs_with="vLLM, or transformers with a kernel from the hub",
        held_as="fp8-block" if is_held else None,
        parts=partial(block_parts, scale="weight_scale_inv") if is_held else None,
        note="activations stay in 16 bits"
        if is_held
        else f"blocks of {FP8_BLOCK} x {FP8_BLOCK} with dynamic activations are read",
    )


def _auto_fp8(fields: ConfigReader) -> CheckpointQuantization:
    static = fields.text("activation_scheme") == "static"

    def layout(rows: int, columns: int) -> tuple[Component, ...]:
        names = ("weight_scale", *(("input_scale",) if static else ()))
        scales = (Component(name=name, dtype=DType.FLOAT32, numel=1) for name in names)
        codes = Component(name="weight", dtype=DType.FLOAT8_E4M3FN, numel=rows * columns)
        return (codes, *scales)

    summary = "e4m3, a float32 scale a tensor (AutoFP8)"
    kept = "ignored_layers" if fields.texts("ignored_layers") else "modules_to_not_convert"
    return CheckpointQuantization(
        method="fp8",
        format=layout_format("fp8", 8, layout, summary, FP8_CAPABILITY),
        kept_modules=kept_modules(fields, kept),
        runs_with="vLLM",
        held_as="fp8",
        parts=partial(tensor_parts, codes=DType.FLOAT8_E4M3FN),
        note=(
            "activations are scaled token by token, not by the checkpoint's static scales"
            if static
            else ""
        ),
    )


def _gptq(fields: ConfigReader) -> CheckpointQuantization:
    bits, group_size = fields.required("bits"), fields.required("group_size")

    def layout(rows: int, columns: int) -> tuple[Component, ...]:
        groups = ceil_div(columns, group_size) if group_size > 0 else 1
        return (
            Component(
                name="qweight",
                dtype=DType.INT32,
                numel=ceil_div(columns * bits, INT32_BITS) * rows,
            ),
            Component(
                name="qzeros", dtype=DType.INT32, numel=groups * ceil_div(rows * bits, INT32_BITS)
            ),
            Component(name="scales", dtype=DType.FLOAT16, numel=groups * rows),
            Component(name="g_idx", dtype=DType.INT32, numel=columns),
        )

    return CheckpointQuantization(
        method="gptq",
        format=layout_format(f"gptq-{bits}bit{_group_name(group_size)}", bits, layout, "GPTQ"),
        kept_modules=kept_modules(fields, "modules_to_not_convert"),
        runs_with="vLLM, or transformers with gptqmodel",
    )


def _awq(fields: ConfigReader) -> CheckpointQuantization:
    bits, group_size = fields.required("bits"), fields.required("group_size")

    def layout(rows: int, columns: int) -> tuple[Component, ...]:
        groups = ceil_div(columns, group_size) if group_size > 0 else 1
        words = ceil_div(rows * bits, INT32_BITS)
        return (
            Component(name="qweight", dtype=DType.INT32, numel=columns * words),
            Component(name="qzeros", dtype=DType.INT32, numel=groups * words),
            Component(name="scales", dtype=DType.FLOAT16, numel=groups * rows),
        )

    return CheckpointQuantization(
        method="awq",
        format=layout_format(f"awq-{bits}bit{_group_name(group_size)}", bits, layout, "AWQ"),
        kept_modules=kept_modules(fields, "modules_to_not_convert"),
        runs_with="vLLM, or transformers with gptqmodel",
    )


def _group_name(group_size: int) -> str:
    return f"-g{group_size}" if group_size > 0 else ""


READERS: dict[str, Callable[[ConfigReader], CheckpointQuantization]] = {
    "bitsandbytes": _bitsandbytes,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "compressed-tensors": read_compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
"""quant_method → its reader."""
