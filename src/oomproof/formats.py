"""Formats a weight can be stored in, and the exact bytes each takes.

A format says which tensors replace one weight: its codes and what is needed to read them back.
The 4-bit layouts follow bitsandbytes (Dettmers et al., "QLoRA", 2023, arXiv:2305.14314): codes two
to a byte, one absmax for each block of 64 weights in row-major order, a 16-entry codebook; with
double quantization ("dq") the absmax values themselves become 8-bit codes with one float32 scale
for each 256 of them, a 256-entry codebook and one float32 offset a tensor. nf4-g16 is the same with
blocks of 16 and one float32 scale for all absmax values of a tensor: the bytes of nf4 with, where
scales are searched, less than two thirds of its error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from oomproof.errors import InputError

BLOCK_SIZE = 64
"""Weights that share one absmax in the 4-bit formats."""
FINE_BLOCK_SIZE = 16
"""The same in nf4-g16."""
FP8_BLOCK = 128
"""Rows, and columns, of the squares of weights that share a scale in fp8-block."""
NESTED_BLOCK_SIZE = 256
"""Absmax values that share one second-level scale under double quantization."""


class DType(StrEnum):
    """Element types of stored tensors, by torch's names."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZE[self]


_ITEMSIZE = {
    DType.FLOAT64: 8,
    DType.FLOAT32: 4,
    DType.BFLOAT16: 2,
    DType.FLOAT16: 2,
    DType.FLOAT8_E4M3FN: 1,
    DType.FLOAT8_E5M2: 1,
    DType.INT64: 8,
    DType.INT32: 4,
    DType.INT16: 2,
    DType.INT8: 1,
    DType.UINT8: 1,
    DType.BOOL: 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One of the tensors that a quantized weight consists of."""

    name: str
    """What it holds, in bitsandbytes' words: weight, absmax, nested_absmax, quant_map, …"""
    dtype: DType
    numel: int
    """Number of elements."""

    @property
    def size_bytes(self) -> int:
        """Stored bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A way to store the weights of a model's linear layers."""

    name: str
    bits_per_weight: float
    """Stored bits a weight, scales included, for large tensors."""
    weight_dtype: DType
    """Element type of the codes as a torch parameter holds them."""
    components: Callable[[int, int], tuple[Component, ...]]
    """(rows, columns) of the weight → the tensors that hold it."""
    min_compute_capability: tuple[int, int] | None = None
    """Lowest CUDA compute capability that runs it, None for any."""
    quant_type: str | None = None
    """bitsandbytes' codebook name for 4-bit formats."""
    double_quantized: bool = False
    block_size: int = BLOCK_SIZE
    """Weights that share a scale, where blocks of them do."""
    quantizes_experts: bool = False
    """Whether experts that are stacked in one parameter are stored so too."""
    foreign: bool = False
    """Whether it is the layout of checkpoints, in which no engine here holds weights."""
    by_tensor: Mapping[str, str] | None = None
    """Tensor name → format, of a mixture; what it does not name stays in 16 bits."""
    summary: str = ""

    @property
    def is_quantized(self) -> bool:
        """Whether weights lose precision against 16 bits."""
        return self.bits_per_weight < 16

    @property
    def has_block_scales(self) -> bool:
        """Whether weights share scales in blocks, which can be searched (`--search`)."""
        return not self.members.isdisjoint(SEARCHED_FORMATS)

    @property
    def members(self) -> frozenset[str]:
        """Names of the formats of a mixture; its own, of any other."""
        if self.by_tensor is None:
            return frozenset({self.name})
        return frozenset(self.by_tensor.values())

    def for_tensor(self, name: str) -> Format:
        """The format of one tensor."""
        if self.by_tensor is None:
            return self
        return FORMATS[self.by_tensor.get(name, "bf16")]

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Exact bytes of a [rows, columns] weight in this format, codes and scales."""
        return sum(part.size_bytes for part in self.components(rows, columns))


def ceil_div(numerator: int, denominator: int) -> int:
    """Integer division rounded up."""
    return -(-numerator // denominator)


def _plain(dtype: DType) -> Callable[[int, int], tuple[Component, ...]]:
    def components(rows: int, columns: int) -> tuple[Component, ...]:
        return (Component(name="weight", dtype=dtype, numel=rows * columns),)

    return components


def _row_scaled(dtype: DType, scale: str) -> Callable[[int, int], tuple[Component, ...]]:
    def components(rows: int, columns: int) -> tuple[Component, ...]:
        return (
            Component(name="weight", dtype=dtype, numel=rows * columns),
            Component(name=scale, dtype=DType.FLOAT32, numel=rows),
        )

    return components


def _table_4bit(rows: int, columns: int) -> tuple[Component, ...]:
    numel = rows * columns
    return (
        Component(name="weight", dtype=DType.UINT8, numel=ceil_div(numel, 2)),
        Component(name="absmax", dtype=DType.FLOAT32, numel=ceil_div(numel, BLOCK_SIZE)),
        Component(name="quant_map", dtype=DType.FLOAT32, numel=16),
    )


def _table_4bit_double_quantized(rows: int, columns: int) -> tuple[Component, ...]:
    numel = rows * columns
    blocks = ceil_div(numel, BLOCK_SIZE)
    nested_blocks = ceil_div(blocks, NESTED_BLOCK_SIZE)
    return (
        Component(name="weight", dtype=DType.UINT8, numel=ceil_div(numel, 2)),
        Component(name="absmax", dtype=DType.UINT8, numel=blocks),
        Component(name="quant_map", dtype=DType.FLOAT32, numel=16),
        Component(name="nested_absmax", dtype=DType.FLOAT32, numel=nested_blocks),
        Component(name="nested_quant_map", dtype=DType.FLOAT32, numel=256),
        Component(name="nested_offset", dtype=DType.FLOAT32, numel=1),
    )


def _table_4bit_fine(rows: int, columns: int) -> tuple[Component, ...]:
    numel = rows * columns
    return (
        Component(name="weight", dtype=DType.UINT8, numel=ceil_div(numel, 2)),
        Component(name="absmax", dtype=DType.UINT8, numel=ceil_div(numel, FINE_BLOCK_SIZE)),
        Component(name="quant_map", dtype=DType.FLOAT32, numel=16),
        Component(name="nested_absmax", dtype=DType.FLOAT32, numel=1),
        Component(name="nested_quant_map", dtype=DType.FLOAT32, numel=256),
        Component(name="nested_offset", dtype=DType.FLOAT32, numel=1),
    )


def _int4(rows: int, columns: int) -> tuple[Component, ...]:
    numel = rows * columns
    return (
        Component(name="weight", dtype=DType.UINT8, numel=ceil_div(numel, 2)),
        Component(name="scale", dtype=DType.BFLOAT16, numel=rows * ceil_div(columns, BLOCK_SIZE)),
    )


def _fp8_block(rows: int, columns: int) -> tuple[Component, ...]:
    squares = ceil_div(rows, FP8_BLOCK) * ceil_div(columns, FP8_BLOCK)
    return (
        Component(name="weight", dtype=DType.FLOAT8_E4M3FN, numel=rows * columns),
        Component(name="block_scale", dtype=DType.FLOAT32, numel=squares),
    )


_TABLE_BITS = 4 + 32 / BLOCK_SIZE
_NESTED_BITS = 4 + 8 / BLOCK_SIZE + 32 / (BLOCK_SIZE * NESTED_BLOCK_SIZE)

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            name="fp32",
            bits_per_weight=32,
            weight_dtype=DType.FLOAT32,
            components=_plain(DType.FLOAT32),
            summary="32 bits, for reference: computed in float32 too",
        ),
        Format(
            name="bf16",
            bits_per_weight=16,
            weight_dtype=DType.BFLOAT16,
            components=_plain(DType.BFLOAT16),
            min_compute_capability=(8, 0),
            summary="16 bits, the checkpoint's own precision",
        ),
        Format(
            name="fp16",
            bits_per_weight=16,
            weight_dtype=DType.FLOAT16,
            components=_plain(DType.FLOAT16),
            summary="16 bits, for GPUs below compute capability 8.0",
        ),
        Format(
            name="int8",
            bits_per_weight=8,
            weight_dtype=DType.INT8,
            components=_row_scaled(DType.INT8, "scale"),
            summary="8-bit integers, one float32 scale a row, weight-only",
        ),
        Format(
            name="llm-int8",
            bits_per_weight=8,
            weight_dtype=DType.INT8,
            components=_row_scaled(DType.INT8, "SCB"),
            summary="bitsandbytes LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339)",
        ),
        Format(
            name="fp8",
            bits_per_weight=8,
            weight_dtype=DType.FLOAT8_E4M3FN,
            components=_row_scaled(DType.FLOAT8_E4M3FN, "scale"),
            min_compute_capability=(8, 9),
            summary="e4m3, one float32 scale a row, 8-bit activations",
        ),
        Format(
            name="nf4",
            bits_per_weight=_TABLE_BITS,
            weight_dtype=DType.UINT8,
            components=_table_4bit,
            quant_type="nf4",
            summary="4-bit NormalFloat, float32 absmax for each 64 weights",
        ),
        Format(
            name="nf4-dq",
            bits_per_weight=_NESTED_BITS,
            weight_dtype=DType.UINT8,
            components=_table_4bit_double_quantized,
            quant_type="nf4",
            double_quantized=True,
            summary="4-bit NormalFloat, double-quantized absmax",
        ),
        Format(
            name="nf4-g16",
            bits_per_weight=4 + 8 / FINE_BLOCK_SIZE,
            weight_dtype=DType.UINT8,
            components=_table_4bit_fine,
            quant_type="nf4",
            double_quantized=True,
            block_size=FINE_BLOCK_SIZE,
            summary="4-bit NormalFloat, absmax for each 16 weights in 8 bits, one scale for all",
        ),
        Format(
            name="fp4",
            bits_per_weight=_TABLE_BITS,
            weight_dtype=DType.UINT8,
            components=_table_4bit,
            quant_type="fp4",
            summary="4-bit float (e2m1), float32 absmax for each 64 weights",
        ),
        Format(
            name="fp4-dq",
            bits_per_weight=_NESTED_BITS,
            weight_dtype=DType.UINT8,
            components=_table_4bit_double_quantized,
            quant_type="fp4",
            double_quantized=True,
            summary="4-bit float (e2m1), double-quantized absmax",
        ),
        Format(
            name="int4",
            bits_per_weight=4 + 16 / BLOCK_SIZE,
            weight_dtype=DType.UINT8,
            components=_int4,
            summary="4-bit integers, symmetric, bfloat16 scale for each 64 weights of a row",
        ),
    )
}

READ_FORMATS: dict[str, Format] = {
    "fp8-block": Format(
        name="fp8-block",
        bits_per_weight=8 + 32 / FP8_BLOCK**2,
        weight_dtype=DType.FLOAT8_E4M3FN,
        components=_fp8_block,
        summary="e4m3, one float32 scale for each 128 x 128, weight-only",
    )
}
"""Formats that the native engine holds where a checkpoint has them, and quantizes nothing into."""

SEARCHED_FORMATS = ("nf4", "nf4-dq", "nf4-g16", "fp4", "fp4-dq", "int4")
"""Formats whose block scales can be searched for the least error: other bits, the same layout."""

QUALITY_ORDER = ("bf16", "fp16", "int8", "llm-int8", "fp8", "nf4", "nf4-dq")
"""Best quality first: the order in which `--format auto` tries them (docs/design.md)."""


FIT = "fit"
"""The name of a mixture that a plan chooses, tensor by tensor, to fill the memory there is."""


def mixture(by_tensor: Mapping[str, str]) -> Format:
    """The format in which each tensor has its own.

    It has the bits of its smallest member: that decides what else an engine needs.

    Raises:
        InputError: A format is unknown.
    """
    members = [get_format(name) for name in sorted(set(by_tensor.values()))]
    smallest = min(members, key=lambda member: member.bits_per_weight)
    return Format(
        name=FIT,
        bits_per_weight=smallest.bits_per_weight,
        weight_dtype=smallest.weight_dtype,
        components=smallest.components,
        by_tensor=by_tensor,
        summary="each projection of each layer in its own format, to fill the memory there is",
    )


_CHECKPOINT_FORMAT = re.compile(
    r"(?:gptq|awq)-[0-9]{1,2}bit(?:-g[0-9]{1,6})?|w[0-9]{1,2}a(?:8|16)(?:-g[0-9]{1,6})?|fp8-block",
    re.ASCII,
)


def is_known_format(name: str) -> bool:
    """Whether a plan can be made in a format of that name: ours, or one that checkpoints have."""
    return name in FORMATS or name == FIT or _CHECKPOINT_FORMAT.fullmatch(name) is not None


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        InputError: There is none.
    """
    found = FORMATS.get(name)
    if found is None:
        raise InputError(
            f"unknown format {name!r}", remedy=f"use one of {', '.join(FORMATS)}, {FIT}"
        )
    return found


def held_format(name: str) -> Format:
    """As `get_format`, of what an engine holds: also what only checkpoints come in.

    Raises:
        InputError: There is none.
    """
    return READ_FORMATS.get(name) or get_format(name)
