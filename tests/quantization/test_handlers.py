"""Weights that are written slice by slice, and products into tensors that are there."""

from __future__ import annotations

from math import gcd
from typing import Any

import pytest
import torch
from torch.library import opcheck

from oomproof.errors import InputError
from oomproof.formats import FORMATS, ceil_div
from oomproof.quantization import operators
from oomproof.quantization.handlers import HANDLERS, handler
from oomproof.quantization.scratch import least_scratch_bytes
from tests.quantization.weights import (
    PRODUCT_ERRORS,
    SHAPES,
    empty_parts,
    encode_in_slices,
    product_error,
    random_input,
    random_weight,
    same_bits,
)

SCRATCH_BYTES = 1 << 20
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
@pytest.mark.parametrize("shape", [*SHAPES, (130, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_in_slices_is_the_weight_at_once(
    format_name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(shape, dtype, seed=sum(shape))
    unit = 128 // gcd(128, shape[1])
    whole = handler(format_name).encode(weight)
    for rows_of_slice in {unit, 3 * unit, shape[0]}:
        parts = encode_in_slices(format_name, weight, rows_of_slice)
        assert parts.keys() == whole.keys()
        for name, part in parts.items():
            assert same_bits(part, whole[name]), (name, rows_of_slice)


@pytest.mark.parametrize("format_name", ["int4", "int8", "fp8", "bf16"])
@pytest.mark.parametrize("columns", [21, 63, 64, 65])
def test_formats_without_a_table_take_slices_of_any_rows(format_name: str, columns: int) -> None:
    # A row of int4 then begins in the middle of a byte.
    weight = random_weight((7, columns), seed=columns)
    whole = handler(format_name).encode(weight)
    for rows_of_slice in (1, 2, 3):
        parts = encode_in_slices(format_name, weight, rows_of_slice)
        assert all(same_bits(part, whole[name]) for name, part in parts.items())


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
@pytest.mark.parametrize("tokens", [1, 7, 33, 65, 130])
def test_a_product_is_exact_to_rounding(format_name: str, tokens: int) -> None:
    for shape in ((33, 21), (70, 192)):
        parts = handler(format_name).encode(random_weight(shape))
        for dtype in (torch.float32, torch.bfloat16):
            x = random_input(tokens, shape[1], dtype)
            error = product_error(format_name, x, parts, shape, SCRATCH_BYTES)
            assert error < PRODUCT_ERRORS[dtype], (shape, dtype)


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
def test_flat_parts_in_an_arena_multiply_too(format_name: str) -> None:
    shape = (70, 192)
    parts = encode_in_slices(format_name, random_weight(shape), shape[0])
    x = random_input(3, shape[1])
    assert product_error(format_name, x, parts, shape, SCRATCH_BYTES) < 2e-6
    assert FORMATS[format_name].stored_bytes(*shape) == sum(p.nbytes for p in parts.values())


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
def test_the_least_scratch_is_enough(format_name: str) -> None:
    shape = (70, 192)
    parts = handler(format_name).encode(random_weight(shape))
    for dtype in (torch.float32, torch.float16):
        x = random_input(5, shape[1], dtype)
        least = least_scratch_bytes(format_name, 5, *shape, itemsize=dtype.itemsize)
        assert product_error(format_name, x, parts, shape, least) < PRODUCT_ERRORS[dtype]


@pytest.mark.parametrize("format_name", sorted(PLAIN))
def test_plain_weights_are_torchs_own_product(format_name: str) -> None:
    weight = random_weight((70, 96), PLAIN[format_name])
    parts = handler(format_name).encode(weight)
    x = random_input(5, 96, PLAIN[format_name])
    out = torch.empty(5, 70, dtype=x.dtype)
    handler(format_name).multiply(x, parts, (70, 96), out, torch.empty(0, dtype=torch.uint8))
    assert torch.equal(out, torch.mm(x, weight.t()))


@pytest.mark.parametrize("format_name", sorted(HANDLERS))
def test_only_double_quantization_needs_a_workspace(format_name: str) -> None:
    found = FORMATS[format_name]
    expected = 70 * 192 // found.block_size if found.double_quantized else 0
    assert handler(format_name).workspace_numel((70, 192)) == expected


@pytest.mark.parametrize("format_name", ["int8", "fp8", "int4"])
def test_a_nan_among_the_weights_reaches_the_product(format_name: str) -> None:
    weight = random_weight((4, 128))
    weight[2, 5] = float("nan")
    parts = encode_in_slices(format_name, weight, 4)
    out = torch.empty(1, 4)
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
    handler(format_name).multiply(torch.ones(1, 128), parts, (4, 128), out, scratch)
    assert out.isnan().tolist() == [[False, False, True, False]]


def operator_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """Each operator with arguments."""
    shape = (64, 128)
    weight, x = random_weight(shape), random_input(3, 128, torch.bfloat16)
    out = torch.zeros(3, 64, dtype=torch.bfloat16)
    scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8)
    absmax = operators.quantize_4bit(weight, "nf4")[1]
    full = {name: handler(name).encode(weight) for name in HANDLERS}
    empty = {name: empty_parts(name, shape) for name in HANDLERS}
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.quantize_4bit, (weight, "nf4")),
        (operators.quantize_absmax, (absmax,)),
        (operators.quantize_rows_int8, (weight,)),
        (operators.quantize_rows_fp8, (weight,)),
        (operators.quantize_groups_int4, (weight,)),
    ]
    for name in ("nf4", "fp4"):
        new, old = empty[name], full[name]
        codes = (new["weight"], new["absmax"])
        calls.append((operators.quantize_4bit_out, (weight, *codes, name)))
        stored = (old["weight"], old["absmax"], old["quant_map"])
        calls.append((operators.linear_4bit, (x, *stored, out, scratch)))
    new, old = empty["nf4-dq"], full["nf4-dq"]
    nested = (old["nested_absmax"], old["nested_quant_map"], old["nested_offset"])
    doubly = (old["weight"], old["absmax"], *nested, old["quant_map"])
    calls.append((operators.linear_4bit_dq, (x, *doubly, out, scratch)))
    into = (new["absmax"], new["nested_absmax"], new["nested_offset"].view(()))
    calls.append((operators.quantize_absmax_out, (absmax, *into, old["nested_quant_map"])))
    for name, linear in (("int8", operators.linear_int8), ("fp8", operators.linear_fp8)):
        new, old = empty[name], full[name]
        codes = (new["weight"].view(shape), new["scale"])
        calls.append((operators.quantize_rows_out, (weight, *codes)))
        calls.append((linear, (x, old["weight"], old["scale"], out, scratch)))
    new, old = empty["int4"], full["int4"]
    codes = (new["weight"], new["scale"].view(64, 2))
    calls.append((operators.quantize_groups_int4_out, (weight, *codes, False)))
    calls.append((operators.linear_int4, (x, old["weight"], old["scale"], out, scratch)))
    return calls


def test_operators_pass_torchs_own_checks() -> None:
    for operator, arguments in operator_calls():
        # Of e4m3 tensors torch compares sizes only: it cannot subtract them.
        float8 = "fp8" in str(operator._call) or any(
            isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in arguments
        )
        if float8:
            opcheck(operator._call, arguments, test_utils="test_faketensor")
        else:
            opcheck(operator._call, arguments)


@pytest.mark.parametrize("shape", [(9, 21), (300, 200), (256, 384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_squares_are_multiplied_by_their_scales(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    codes = random_weight(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(ceil_div(rows, 128), ceil_div(columns, 128)) + 0.01
    parts = {"weight": codes.view(-1), "block_scale": scale.view(-1)}
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    expected = (codes.float() * wide).to(dtype)
    assert torch.equal(handler("fp8-block").decode(parts, shape, dtype), expected)
    x, out = random_input(7, columns, dtype), torch.empty(7, rows, dtype=dtype)
    handler("fp8-block").multiply(x, parts, shape, out, torch.empty(0, dtype=torch.uint8))
    product = x.double() @ expected.double().t()
    error = (out.double() - product).norm() / product.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_nothing_is_quantized_into_squares() -> None:
    with pytest.raises(InputError, match="nothing is quantized into fp8-block here"):
        handler("fp8-block").encode(torch.zeros(128, 128))
