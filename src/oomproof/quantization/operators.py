"""Quantizing and multiplying, declared once as torch operators: schema, sizes, plain-torch meaning.

Each operator is its own reference: it runs on any device, serves the CPU, and checks every faster
kernel that is registered for it. Shapes: a weight is [rows, columns] = [out_features,
in_features], an input [tokens, columns], a product [tokens, rows]; codes are flat, row-major.
"""

from __future__ import annotations

import torch

from oomproof.formats import BLOCK_SIZE, NESTED_BLOCK_SIZE, ceil_div
from oomproof.quantization.tables import table_4bit, table_dynamic, thresholds_4bit

_TINY = 1e-38
INT8_MAX = 127
INT4_MAX = 7
INT4_OFFSET = 8
FP8_MAX = 448.0
"""The largest finite e4m3 value."""


@torch.library.custom_op("oomproof::quantize_4bit", mutates_args=())
def quantize_4bit(weight: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a 4-bit table, two to a byte, the first in the high half; and absmax of each block.

    Args:
        weight: Any shape, any floating type.
        quant_type: "nf4" or "fp4".

    Returns:
        uint8 [ceil(n / 2)] and float32 [ceil(n / 64)], n being the number of weights.
    """
    scaled, absmax = _scaled_blocks(weight, BLOCK_SIZE)
    thresholds, ascending = (part.to(weight.device) for part in thresholds_4bit(quant_type))
    if quant_type == "fp4":
        codes = ascending[torch.bucketize(scaled.abs(), thresholds)] + 8 * (scaled < 0)
    else:
        codes = ascending[torch.bucketize(scaled, thresholds)]
    codes = codes.to(torch.uint8).reshape(-1)
    # What fills up the last byte is the code of 0.
    return _pack(codes[: weight.numel() + weight.numel() % 2]), absmax


@quantize_4bit.register_fake
def _(weight: torch.Tensor, quant_type: str) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    n = weight.numel()
    return (
        weight.new_empty(ceil_div(n, 2), dtype=torch.uint8),
        weight.new_empty(ceil_div(n, BLOCK_SIZE), dtype=torch.float32),
    )


@torch.library.custom_op("oomproof::quantize_absmax", mutates_args=())
def quantize_absmax(
    absmax: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization of absmax values.

    Args:
        absmax: float32 [blocks].

    Returns:
        Codes uint8 [blocks], their own absmax float32 [ceil(blocks / 256)], and the mean that was
        taken off, float32 [].
    """
    offset = absmax.mean()
    scaled, nested_absmax = _scaled_blocks(absmax - offset, NESTED_BLOCK_SIZE)
    table = table_dynamic().to(absmax.device)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return codes.reshape(-1)[: absmax.numel()].clone(), nested_absmax, offset


@quantize_absmax.register_fake
def _(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = absmax.numel()
    return (
        absmax.new_empty(blocks, dtype=torch.uint8),
        absmax.new_empty(ceil_div(blocks, NESTED_BLOCK_SIZE)),
        absmax.new_empty(()),
    )


@torch.library.custom_op("oomproof::quantize_rows_int8", mutates_args=())
def quantize_rows_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit integers with a float32 scale a row: int8 [rows, columns], float32 [rows]."""
    values = weight.float()
    scale = values.abs().amax(dim=1) / INT8_MAX
    codes = (values / scale.clamp(min=_TINY).unsqueeze(1)).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale


@quantize_rows_int8.register_fake
def _(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(weight, dtype=torch.int8),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    )


@torch.library.custom_op("oomproof::quantize_rows_fp8", mutates_args=())
def quantize_rows_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with a float32 scale a row: float8_e4m3fn [rows, columns], float32 [rows]."""
    return _rows_fp8(weight)


@quantize_rows_fp8.register_fake
def _(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(weight, dtype=torch.float8_e4m3fn),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    )


@torch.library.custom_op("oomproof::quantize_groups_int4", mutates_args=())
def quantize_groups_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 4-bit integers, a bfloat16 scale for each 64 weights of a row.

    Codes are stored with 8 added, two to a byte, the first in the high half: uint8
    [ceil(rows * columns / 2)], bfloat16 [rows, ceil(columns / 64)].
    """
    rows, columns = weight.shape
    groups = ceil_div(columns, BLOCK_SIZE)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * BLOCK_SIZE - columns))
    blocks = padded.reshape(rows, groups, BLOCK_SIZE)
    scale = (blocks.abs().amax(dim=2) / INT4_MAX).to(torch.bfloat16)
    codes = blocks / scale.float().clamp(min=_TINY).unsqueeze(2)
    codes = codes.round().clamp(-INT4_OFFSET, INT4_MAX).reshape(rows, -1)[:, :columns]
    return _pack((codes + INT4_OFFSET).to(torch.uint8).reshape(-1)), scale


@quantize_groups_int4.register_fake
def _(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    return (
        weight.new_empty(ceil_div(rows * columns, 2), dtype=torch.uint8),
        weight.new_empty(rows, ceil_div(columns, BLOCK_SIZE), dtype=torch.bfloat16),
    )


@torch.library.custom_op("oomproof::linear_4bit", mutates_args=())
def linear_4bit(
    x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, rows: int, quant_type: str
) -> torch.Tensor:
    """The product with a weight in nf4 or fp4.

    Args:
        x: [tokens, columns].
        codes: As `quantize_4bit` returns them.
        absmax: float32 [blocks].
        rows: Rows of the weight.
        quant_type: "nf4" or "fp4".
    """
    weight = dequantize_4bit(codes, absmax, (rows, x.shape[-1]), quant_type, x.dtype)
    return torch.nn.functional.linear(x, weight)


@linear_4bit.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,  # noqa: ARG001
    absmax: torch.Tensor,  # noqa: ARG001
    rows: int,
    quant_type: str,  # noqa: ARG001
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("oomproof::linear_4bit_dq", mutates_args=())
def linear_4bit_dq(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    offset: torch.Tensor,
    rows: int,
    quant_type: str,
) -> torch.Tensor:
    """As `linear_4bit`, with doubly quantized absmax values (`quantize_absmax`)."""
    whole = dequantize_absmax(absmax, nested_absmax, offset)
    weight = dequantize_4bit(codes, whole, (rows, x.shape[-1]), quant_type, x.dtype)
    return torch.nn.functional.linear(x, weight)


@linear_4bit_dq.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,  # noqa: ARG001
    absmax: torch.Tensor,  # noqa: ARG001
    nested_absmax: torch.Tensor,  # noqa: ARG001
    offset: torch.Tensor,  # noqa: ARG001
    rows: int,
    quant_type: str,  # noqa: ARG001
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("oomproof::linear_int8", mutates_args=())
def linear_int8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The product with a weight of `quantize_rows_int8`; inputs stay as they are."""
    product = torch.nn.functional.linear(x.float(), weight.float())
    return (product * scale).to(x.dtype)


@linear_int8.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("oomproof::linear_int4", mutates_args=())
def linear_int4(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, rows: int
) -> torch.Tensor:
    """The product with a weight of `quantize_groups_int4`."""
    weight = dequantize_int4(codes, scale, (rows, x.shape[-1]), x.dtype)
    return torch.nn.functional.linear(x, weight)


@linear_int4.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,  # noqa: ARG001
    scale: torch.Tensor,  # noqa: ARG001
    rows: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("oomproof::linear_fp8", mutates_args=())
def linear_fp8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The product with a weight of `quantize_rows_fp8`; each token's input becomes e4m3 too."""
    tokens = x.reshape(-1, x.shape[-1])
    quantized, token_scale = _rows_fp8(tokens)
    product = torch.nn.functional.linear(quantized.float(), weight.float())
    product = product * token_scale.unsqueeze(1) * scale
    return product.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@linear_fp8.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def dequantize_4bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, ...],
    quant_type: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight that codes and absmax stand for, multiplied in float32 as bitsandbytes does."""
    table = table_4bit(quant_type).to(codes.device)
    values = table[_unpack(codes).to(torch.int64)]
    count = _product(shape)
    scales = absmax.repeat_interleave(BLOCK_SIZE)[:count]
    return (values[:count] * scales).to(dtype).reshape(shape)


def dequantize_absmax(
    codes: torch.Tensor, nested_absmax: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """absmax values of double quantization: float32 [blocks]."""
    values = table_dynamic().to(codes.device)[codes.to(torch.int64)]
    scales = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    return values * scales + offset


def dequantize_int4(
    codes: torch.Tensor, scale: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """The weight of `quantize_groups_int4`."""
    rows, columns = shape
    values = _unpack(codes)[: rows * columns].float().reshape(shape) - INT4_OFFSET
    scales = scale.float().repeat_interleave(BLOCK_SIZE, dim=1)[:, :columns]
    return (values * scales).to(dtype)


def _rows_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = values.float()
    scale = wide.abs().amax(dim=1) / FP8_MAX
    codes = (wide / scale.clamp(min=_TINY).unsqueeze(1)).clamp(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def _scaled_blocks(values: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values over the largest magnitude of their block, float32 [blocks, size], and those [blocks].

    Whole blocks are multiplied by the reciprocal, a last short one is divided, as bitsandbytes
    does: the codes of values between two table entries depend on it.
    """
    flat = values.reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % size))
    blocks = padded.reshape(-1, size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)
    if flat.numel() % size:
        scaled[-1] = blocks[-1] / absmax[-1].clamp(min=_TINY)
    return scaled.clamp(-1, 1), absmax


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes, two to a byte, the first in the high half."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[0::2] << 4) | codes[1::2]


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed >> 4, packed & 0xF), dim=1).reshape(-1)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
