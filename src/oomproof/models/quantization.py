"""Checkpoints that are quantized already: how config.json says so, and what they then hold.

One reader and one layout a method, registered in READERS. A layout gives, for a linear layer of
[rows, columns] = [out_features, in_features], the tensors that a checkpoint holds in place of its
weight, under their names in the file:

bitsandbytes        QLoRA's 4-bit formats and LLM.int8(), as formats.py has them
fbgemm_fp8          float8 e4m3 with a float32 scale a row, and a bound of the input's scale
                    (transformers, integrations/fbgemm_fp8.py)
fp8                 "fine-grained": a float32 scale for each block, mostly 128 × 128
                    (transformers, integrations/finegrained_fp8.py; DeepSeek-V3, Qwen3)
compressed-tensors  by its `format`: float- and int-quantized (a scale a tensor, a row or a block),
                    pack-quantized (codes in int32) (vllm-project/compressed-tensors, compressors/)
gptq                codes packed along the input in int32, a zero and a 16-bit scale a group, and
                    the group of each input (AutoGPTQ, nn_modules/qlinear)
awq                 codes packed along the output, a zero and a 16-bit scale a group
                    (AutoAWQ, modules/linear)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from oomproof.formats import FORMATS, Component, DType, Format, ceil_div
from oomproof.models.config import ConfigReader
from oomproof.models.spec import CheckpointSpec, CheckpointTensor, Role, TensorSpec

PLAIN_DTYPES = frozenset({DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32, DType.FLOAT64})
"""Element types of weights that are not quantized."""
_DEFAULT_KEPT = ("lm_head",)
_FP8_CAPABILITY = (8, 9)
_INT32_BITS = 32
MAX_QUANT_STATE_BYTES = 4096
"""Of the JSON that a bitsandbytes checkpoint holds for each weight; it has about 180."""

Layout = Callable[[int, int], tuple[Component, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointQuantization:
    """How a checkpoint is quantized."""

    method: str
    """quant_method of its quantization_config."""
    format: Format | None
    """What its linear layers are stored in; None for a method that is not planned."""
    kept_modules: tuple[str, ...] = ()
    """Modules that stay in 16 bits, as the config names them."""
    runs_with: str = ""
    """What runs such a checkpoint, where no engine of ours does."""

    @property
    def is_bitsandbytes_4bit(self) -> bool:
        """Whether its weights are codes of 4 bits as our own engine holds them."""
        return (
            self.method == "bitsandbytes"
            and self.format is not None
            and self.format.quant_type is not None
        )

    def keeps(self, module: str) -> bool:
        """Whether a module stays in 16 bits.

        A name of the config means the module, everything below it, and every module whose path it
        ends or stands in whole; "re:…" is a regular expression (compressed-tensors' `ignore`).
        """
        return any(_matches(name, module) for name in self.kept_modules)


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
    if method is None and fields.boolean("load_in_4bit"):
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPart:
    """A tensor that a bitsandbytes 4-bit checkpoint holds for one weight."""

    component: str
    """What it is, in the words of formats.py; "quant_state" for JSON that says how to read it."""
    name: str
    """Its name in the file."""
    dtype: DType
    shape: tuple[int, ...] | None
    """None for quant_state, whose length varies."""


def bitsandbytes_parts(
    name: str, shape: tuple[int, ...], weight_format: Format
) -> tuple[StoredPart, ...]:
    """What bitsandbytes 4-bit checkpoints hold for the weight `name`.

    As transformers 5 with bitsandbytes 0.50 writes them: the codes are a column, and the offset of
    double quantization is a number in quant_state.
    """
    rows, columns = shape
    found = [
        StoredPart(
            component=part.name,
            name=name if part.name == "weight" else f"{name}.{part.name}",
            dtype=part.dtype,
            shape=(part.numel, 1) if part.name == "weight" else (part.numel,),
        )
        for part in weight_format.components(rows, columns)
        if part.name != "nested_offset"
    ]
    state = f"{name}.quant_state.bitsandbytes__{weight_format.quant_type}"
    return (
        *found,
        StoredPart(component="quant_state", name=state, dtype=DType.UINT8, shape=None),
    )


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


def _matches(name: str, module: str) -> bool:
    if name.startswith("re:"):
        try:
            return re.match(name.removeprefix("re:"), module) is not None
        except re.error:
            return False
    return f".{name}." in f".{module}."


def _kept(fields: ConfigReader, name: str) -> tuple[str, ...]:
    return fields.texts(name) or _DEFAULT_KEPT


def _bitsandbytes(fields: ConfigReader) -> CheckpointQuantization:
    kept = _kept(fields, "llm_int8_skip_modules")
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
    return CheckpointQuantization(
        method="bitsandbytes", format=FORMATS[name], kept_modules=kept, runs_with="transformers"
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
        format=_fp8("fp8", layout, "e4m3, a float32 scale a row (FBGEMM)"),
        kept_modules=_kept(fields, "modules_to_not_convert"),
        runs_with="vLLM, or transformers with fbgemm-gpu",
    )


def _fine_grained_fp8(fields: ConfigReader) -> CheckpointQuantization:
    block = fields.integers("weight_block_size", low=1, high=65_536) or (128, 128)
    if len(block) != 2:
        fields.fail("weight_block_size", f"{list(block)} is not [rows, columns]")

    def layout(rows: int, columns: int) -> tuple[Component, ...]:
        blocks = ceil_div(rows, block[0]) * ceil_div(columns, block[1])
        return (
            Component(name="weight", dtype=DType.FLOAT8_E4M3FN, numel=rows * columns),
            Component(name="weight_scale_inv", dtype=DType.FLOAT32, numel=blocks),
        )

    return CheckpointQuantization(
        method="fp8",
        format=_fp8("fp8-block", layout, f"e4m3, a float32 scale for each {block[0]}x{block[1]}"),
        kept_modules=_kept(fields, "modules_to_not_convert"),
        runs_with="vLLM, or transformers with a kernel from the hub",
    )


def _compressed_tensors(fields: ConfigReader) -> CheckpointQuantization:
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
            words = rows * ceil_div(columns * bits, _INT32_BITS)
            parts = [
                Component(name="weight_packed", dtype=DType.INT32, numel=words),
                scale,
                Component(name="weight_shape", dtype=DType.INT64, numel=2),
            ]
            if not symmetric:
                zeros = ceil_div(rows * bits, _INT32_BITS) * (scale.numel // rows)
                parts.append(Component(name="weight_zero_point", dtype=DType.INT32, numel=zeros))
            return tuple(parts)
        dtype = DType.FLOAT8_E4M3FN if is_float else DType.INT8
        parts = [Component(name="weight", dtype=dtype, numel=rows * columns), scale]
        if static:
            parts.append(Component(name="input_scale", dtype=DType.BFLOAT16, numel=1))
        return tuple(parts)

    return CheckpointQuantization(
        method="compressed-tensors",
        format=_format(name, bits, layout, "compressed-tensors", capability),
        kept_modules=_kept(fields, "ignore"),
        runs_with="vLLM, or transformers with compressed-tensors",
    )


def _name_of(
    bits: int, *, packed: bool, is_float: bool, group_size: int | None
) -> tuple[str, tuple[int, int] | None]:
    if packed:
        return f"w{bits}a16" + (f"-g{group_size}" if group_size else ""), None
    return ("fp8", _FP8_CAPABILITY) if is_float else ("w8a8", None)


def _gptq(fields: ConfigReader) -> CheckpointQuantization:
    bits, group_size = fields.required("bits"), fields.required("group_size")

    def layout(rows: int, columns: int) -> tuple[Component, ...]:
        groups = ceil_div(columns, group_size) if group_size > 0 else 1
        return (
            Component(
                name="qweight",
                dtype=DType.INT32,
                numel=ceil_div(columns * bits, _INT32_BITS) * rows,
            ),
            Component(
                name="qzeros", dtype=DType.INT32, numel=groups * ceil_div(rows * bits, _INT32_BITS)
            ),
            Component(name="scales", dtype=DType.FLOAT16, numel=groups * rows),
            Component(name="g_idx", dtype=DType.INT32, numel=columns),
        )

    return CheckpointQuantization(
        method="gptq",
        format=_format(f"gptq-{bits}bit{_group_name(group_size)}", bits, layout, "GPTQ"),
        kept_modules=_kept(fields, "modules_to_not_convert"),
        runs_with="vLLM, or transformers with gptqmodel",
    )


def _awq(fields: ConfigReader) -> CheckpointQuantization:
    bits, group_size = fields.required("bits"), fields.required("group_size")

    def layout(rows: int, columns: int) -> tuple[Component, ...]:
        groups = ceil_div(columns, group_size) if group_size > 0 else 1
        words = ceil_div(rows * bits, _INT32_BITS)
        return (
            Component(name="qweight", dtype=DType.INT32, numel=columns * words),
            Component(name="qzeros", dtype=DType.INT32, numel=groups * words),
            Component(name="scales", dtype=DType.FLOAT16, numel=groups * rows),
        )

    return CheckpointQuantization(
        method="awq",
        format=_format(f"awq-{bits}bit{_group_name(group_size)}", bits, layout, "AWQ"),
        kept_modules=_kept(fields, "modules_to_not_convert"),
        runs_with="vLLM, or transformers with gptqmodel",
    )


def _group_name(group_size: int) -> str:
    return f"-g{group_size}" if group_size > 0 else ""


def _fp8(name: str, layout: Layout, summary: str) -> Format:
    return _format(name, 8, layout, summary, _FP8_CAPABILITY)


def _format(
    name: str,
    bits: int,
    layout: Layout,
    summary: str,
    capability: tuple[int, int] | None = None,
) -> Format:
    """The layout as a format; its bits a weight are those of a large tensor, scales included."""
    rows = columns = 8192
    stored = sum(part.size_bytes for part in layout(rows, columns))
    return Format(
        name=name,
        bits_per_weight=max(bits, 8 * stored / (rows * columns)),
        weight_dtype=layout(rows, columns)[0].dtype,
        components=layout,
        min_compute_capability=capability,
        quantizes_experts=True,
        summary=f"{summary}; as the checkpoint holds it",
    )


READERS: dict[str, Callable[[ConfigReader], CheckpointQuantization]] = {
    "bitsandbytes": _bitsandbytes,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fine_grained_fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
"""quant_method → its reader."""
