"""Quantizing and multiplying, declared once as torch operators: schema, sizes, meaning, kernel.

The default of each operator is plain torch (reference.py) and serves the CPU; CUDA tensors go to
Triton kernels (`*_triton.py`, imported with the first of them), which write only to what they are
given, do not synchronize and can be captured in a CUDA graph.

Shapes: a weight is [rows, columns] = [out_features, in_features], an input `x` [tokens, columns]
with x.stride(1) == 1, a product `out` [tokens, rows] with out.stride(1) == 1: it may be a part of
the columns of a wider tensor. Codes are flat, row-major. `scratch` is flat uint8, at least
scratch.least_scratch_bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oomproof.formats import BLOCK_SIZE, NESTED_BLOCK_SIZE, ceil_div
from oomproof.quantization import reference
from oomproof.quantization.library import on_cuda, operator, writes_where_told
from oomproof.quantization.tiled import TiledSet


@operator("oomproof::quantize_4bit", mutates_args=())
def quantize_4bit(
    weight: torch.Tensor, quant_type: str, search: bool = False, block_size: int = BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a 4-bit table, two to a byte, the first in the high half; and absmax of each block.

    Args:
        weight: Any shape, any floating type.
        quant_type: "nf4" or "fp4".
        search: Whether the scale of a block is the one of least error (search.py), in the place of
            absmax.
        block_size: Weights that share a scale.

    Returns:
        uint8 [ceil(n / 2)] and float32 [ceil(n / block_size)], n being the number of weights.
    """
    return reference.quantize_4bit(weight, quant_type, search, block_size)


@quantize_4bit.register_fake
def _(
    weight: torch.Tensor,
    quant_type: str,  # noqa: ARG001
    search: bool = False,  # noqa: ARG001
    block_size: int = BLOCK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    n = weight.numel()
    return (
        weight.new_empty(ceil_div(n, 2), dtype=torch.uint8),
        weight.new_empty(ceil_div(n, block_size), dtype=torch.float32),
    )


@operator("oomproof::quantize_absmax", mutates_args=())
def quantize_absmax(
    absmax: torch.Tensor, block_size: int = NESTED_BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization of absmax values.

    Args:
        absmax: float32 [blocks].
        block_size: Of those that share a scale; 0 for one for all.

    Returns:
        Codes uint8 [blocks], their own absmax float32 [ceil(blocks / block_size)], or [1], and the
        mean that was taken off, float32 [].
    """
    return reference.quantize_absmax(absmax, block_size)


@quantize_absmax.register_fake
def _(
    absmax: torch.Tensor, block_size: int = NESTED_BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = absmax.numel()
    return (
        absmax.new_empty(blocks, dtype=torch.uint8),
        absmax.new_empty(ceil_div(blocks, block_size) if block_size else 1),
        absmax.new_empty(()),
    )


@operator("oomproof::quantize_rows_int8", mutates_args=())
def quantize_rows_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit integers with a float32 scale a row: int8 [rows, columns], float32 [rows]."""
    return reference.quantize_rows_int8(weight)


@quantize_rows_int8.register_fake
def _(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(weight, dtype=torch.int8),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    )


@operator("oomproof::quantize_rows_fp8", mutates_args=())
def quantize_rows_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with a float32 scale a row: float8_e4m3fn [rows, columns], float32 [rows]."""
    return reference.quantize_rows_fp8(weight)


@quantize_rows_fp8.register_fake
def _(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(weight, dtype=torch.float8_e4m3fn),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    )


@operator("oomproof::quantize_groups_int4", mutates_args=())
def quantize_groups_int4(
    weight: torch.Tensor, search: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 4-bit integers, a bfloat16 scale for each 64 weights of a row.

    Codes are stored with 8 added, two to a byte, the first in the high half: uint8
    [ceil(rows * columns / 2)], bfloat16 [rows, ceil(columns / 64)]. With `search` a scale is the
    one of least error (search.py), and may be negative.
    """
    return reference.quantize_groups_int4(weight, search)


@quantize_groups_int4.register_fake
def _(
    weight: torch.Tensor,
    search: bool = False,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    return (
        weight.new_empty(ceil_div(rows * columns, 2), dtype=torch.uint8),
        weight.new_empty(rows, ceil_div(columns, BLOCK_SIZE), dtype=torch.bfloat16),
    )


@operator("oomproof::quantize_4bit_out", mutates_args=("codes", "absmax"))
def quantize_4bit_out(
    weight: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    quant_type: str,
    search: bool = False,
    block_size: int = BLOCK_SIZE,
) -> None:
    """`quantize_4bit` of a contiguous slice into tensors of the sizes that it returns."""
    found = reference.quantize_4bit(weight, quant_type, search, block_size)
    for into, part in zip((codes, absmax), found, strict=True):
        into.copy_(part)


@operator("oomproof::quantize_absmax_out", mutates_args=("codes", "nested_absmax", "offset"))
def quantize_absmax_out(
    absmax: torch.Tensor,
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    offset: torch.Tensor,
    nested_quant_map: torch.Tensor,  # noqa: ARG001
    block_size: int = NESTED_BLOCK_SIZE,
) -> None:
    """`quantize_absmax` into tensors of the sizes that it returns; the codebook is an input."""
    for into, part in zip(
        (codes, nested_absmax, offset), reference.quantize_absmax(absmax, block_size), strict=True
    ):
        into.copy_(part)


@operator("oomproof::quantize_rows_out", mutates_args=("codes", "scale"))
def quantize_rows_out(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """`quantize_rows_int8` or `quantize_rows_fp8` into tensors of the sizes that it returns.

    Which of the two is said by the type of `codes`, int8 or float8_e4m3fn.
    """
    int8 = codes.dtype == torch.int8
    quantize = reference.quantize_rows_int8 if int8 else reference.quantize_rows_fp8
    for into, part in zip((codes, scale), quantize(weight), strict=True):
        into.copy_(part)


@operator("oomproof::quantize_groups_int4_out", mutates_args=("codes", "scale"))
def quantize_groups_int4_out(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    starts_low: bool,
    search: bool = False,
) -> None:
    """`quantize_groups_int4` of a contiguous slice into tensors that are there.

    Args:
        weight: [rows, columns].
        codes: The bytes in which the slice has codes.
        scale: [rows, groups].
        starts_low: The first code is the low half of its byte; the high half stays as it is.
        search: Whether scales are searched.
    """
    found, scales = reference.codes_int4(weight, search)
    flat = found.reshape(-1)
    if starts_low:
        flat = torch.cat((codes[:1] >> 4, flat))
    codes.copy_(reference.pack(flat))
    scale.copy_(scales)


@operator("oomproof::linear_4bit", mutates_args=("out", "scratch"))
def linear_4bit(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    quant_map: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,  # noqa: ARG001
) -> None:
    """The product with a weight in nf4 or fp4.

    Args:
        x: [tokens, columns].
        codes: As `quantize_4bit` returns them.
        absmax: float32 [blocks].
        quant_map: The codebook, float32 [16].
        out: [tokens, rows], in the type of x.
        scratch: uint8.
    """
    reference.linear_4bit(x, codes, absmax, quant_map, out)


@operator("oomproof::linear_4bit_dq", mutates_args=("out", "scratch"))
def linear_4bit_dq(  # noqa: PLR0913, PLR0917
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_quant_map: torch.Tensor,
    offset: torch.Tensor,
    quant_map: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,  # noqa: ARG001
    block_size: int = BLOCK_SIZE,
) -> None:
    """As `linear_4bit`, with doubly quantized absmax values (`quantize_absmax`).

    Of another block size than 64 all absmax values share one scale.
    """
    whole = reference.dequantize_absmax(absmax, nested_absmax, nested_quant_map, offset)
    reference.linear_4bit(x, codes, whole, quant_map, out, block_size)


@operator("oomproof::linear_int4", mutates_args=("out", "scratch"))
def linear_int4(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,  # noqa: ARG001
) -> None:
    """The product with a weight of `quantize_groups_int4`."""
    reference.linear_int4(x, codes, scale, out)


@operator("oomproof::linear_4bit_tiled", mutates_args=("out", "scratch"))
def linear_4bit_tiled(  # noqa: PLR0913, PLR0917 - a set's tensors
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    quant_map: torch.Tensor | None,
    codebook: str,
    nested: Sequence[torch.Tensor],
    segments: Sequence[int],
    out: torch.Tensor,
    scratch: torch.Tensor,  # noqa: ARG001
) -> None:
    """The product with a set of linears in any format of 4 bits, in tiles.

    Args:
        x: [tokens, columns].
        codes: As the following five, of TiledSet.arguments.
        scales: Of all tiles.
        quant_map: None for int4.
        codebook: "nf4", "fp4" or "int4".
        nested: Three tensors a linear, or none.
        segments: Three numbers a linear.
        out: [tokens, rows of all linears], in the type of x.
        scratch: uint8.
    """
    reference.linear_4bit_tiled(
        x, TiledSet.of(codes, scales, quant_map, codebook, nested, segments), out
    )


@operator("oomproof::gated_4bit_tiled", mutates_args=("out", "scratch"))
def gated_4bit_tiled(  # noqa: PLR0913, PLR0917 - a set's tensors
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    quant_map: torch.Tensor | None,
    codebook: str,
    nested: Sequence[torch.Tensor],
    segments: Sequence[int],
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    scratch: torch.Tensor,  # noqa: ARG001
) -> None:
    """Silu(first linear) times the second (arXiv:2002.05202), without their whole products.

    Args:
        x: As for `linear_4bit_tiled`, as the following six; gate and up are the set.
        codes: Of all tiles.
        scales: Of all tiles.
        quant_map: None for int4.
        codebook: "nf4", "fp4" or "int4".
        nested: Three tensors a linear, or none.
        segments: Three numbers a linear.
        biases: Of both linears, or none.
        out: [tokens, rows of one linear], in the type of x.
        scratch: uint8.
    """
    weights = TiledSet.of(codes, scales, quant_map, codebook, nested, segments)
    product = x.new_empty(len(x), weights.rows)
    reference.linear_4bit_tiled(x, weights, product)
    if biases:
        product += torch.cat(tuple(biases))
    gate, up = product.float().chunk(2, dim=1)
    out.copy_(torch.nn.functional.silu(gate) * up)


@operator("oomproof::linear_int8", mutates_args=("out", "scratch"))
def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,  # noqa: ARG001
) -> None:
    """The product with a weight of `quantize_rows_int8`; inputs stay as they are."""
    reference.linear_int8(x, weight, scale, out)


@operator("oomproof::linear_fp8", mutates_args=("out", "scratch"))
def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,  # noqa: ARG001
) -> None:
    """The product with a weight of `quantize_rows_fp8`; each token's input becomes e4m3 too."""
    reference.linear_fp8(x, weight, scale, out)


@operator("oomproof::linear_fp8_block", mutates_args=("out", "scratch"))
def linear_fp8_block(
    x: torch.Tensor,
    weight: torch.Tensor,
    block_scale: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,  # noqa: ARG001
) -> None:
    """The product with e4m3 codes that have a scale for each square of 128 × 128.

    Args:
        x: [tokens, columns]; inputs stay as they are.
        weight: float8_e4m3fn [rows, columns].
        block_scale: float32 [ceil(rows / 128), ceil(columns / 128)].
        out: [tokens, rows], in the type of x.
        scratch: uint8.
    """
    reference.linear_fp8_block(x, weight, block_scale, out)


for _operator, _module, _function in (
    (quantize_4bit_out, "quantize_triton", "quantize_4bit_out"),
    (quantize_absmax_out, "quantize_triton", "quantize_absmax_out"),
    (quantize_rows_out, "quantize_triton", "quantize_rows_out"),
    (quantize_groups_int4_out, "quantize_triton", "quantize_groups_int4_out"),
    (linear_4bit, "products_cuda", "linear_4bit"),
    (linear_4bit_dq, "products_cuda", "linear_4bit_dq"),
    (linear_int4, "products_cuda", "linear_int4"),
    (linear_4bit_tiled, "products_cuda", "linear_4bit_tiled"),
    (gated_4bit_tiled, "products_cuda", "gated_4bit_tiled"),
    (linear_int8, "products_cuda", "linear_int8"),
    (linear_fp8, "products_cuda", "linear_fp8"),
    (linear_fp8_block, "products_cuda", "linear_fp8_block"),
):
    _operator.register_fake(writes_where_told)
    _operator.register_kernel("cuda")(on_cuda(f"oomproof.quantization.{_module}", _function))
