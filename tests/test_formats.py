"""Stored bytes of every format, against arithmetic and against bitsandbytes itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import InputError
from oomproof.formats import FORMATS, QUALITY_ORDER, DType, Format, ceil_div, get_format

law = settings(derandomize=True, deadline=None, max_examples=150)
TABLES_4BIT = ["nf4", "nf4-dq", "fp4", "fp4-dq"]
SIDES = st.integers(1, 3000)


def component_bytes(chosen: Format, rows: int, columns: int) -> dict[str, int]:
    return {part.name: part.size_bytes for part in chosen.components(rows, columns)}


def test_every_format_of_the_design_is_there_with_its_bits() -> None:
    bits = {name: chosen.bits_per_weight for name, chosen in FORMATS.items()}
    assert bits == {
        "fp32": 32,
        "bf16": 16,
        "fp16": 16,
        "fp8": 8,
        "int8": 8,
        "llm-int8": 8,
        "nf4": 4.5,
        "nf4-g16": 4.5,
        "fp4": 4.5,
        "nf4-dq": 4 + 8 / 64 + 32 / (64 * 256),
        "fp4-dq": 4 + 8 / 64 + 32 / (64 * 256),
        "int4": 4.25,
    }
    plain = {name for name, chosen in FORMATS.items() if not chosen.is_quantized}
    assert plain == {"fp32", "bf16", "fp16"}


@pytest.mark.parametrize("name", FORMATS)
def test_large_tensors_take_the_bits_that_the_format_states(name: str) -> None:
    stored_bits = FORMATS[name].stored_bytes(16_384, 16_384) * 8 / 16_384**2
    # One float32 scale a row adds 32 / 16,384 bits to the 8-bit formats.
    assert stored_bits == pytest.approx(FORMATS[name].bits_per_weight, abs=0.003)


@pytest.mark.parametrize("name", FORMATS)
@law
@given(rows=SIDES, columns=SIDES)
def test_no_tensor_takes_less_than_the_bits_that_the_format_states(
    name: str, rows: int, columns: int
) -> None:
    chosen = FORMATS[name]
    assert chosen.stored_bytes(rows, columns) >= chosen.bits_per_weight * rows * columns / 8
    assert chosen.stored_bytes(rows, columns) == sum(
        component_bytes(chosen, rows, columns).values()
    )


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (4096, 4096, {"weight": 8_388_608, "absmax": 1_048_576, "quant_map": 64}),
        (14336, 4096, {"weight": 29_360_128, "absmax": 3_670_016, "quant_map": 64}),
        # 33 × 7 = 231 weights: the last byte is half used, the last of 4 blocks is short.
        (33, 7, {"weight": 116, "absmax": 16, "quant_map": 64}),
        (1, 1, {"weight": 1, "absmax": 4, "quant_map": 64}),
        (1, 64, {"weight": 32, "absmax": 4, "quant_map": 64}),
        (1, 65, {"weight": 33, "absmax": 8, "quant_map": 64}),
    ],
)
def test_plain_4_bit_components_are_those_computed_by_hand(
    rows: int, columns: int, expected: dict[str, int]
) -> None:
    for name in ("nf4", "fp4"):
        assert component_bytes(FORMATS[name], rows, columns) == expected


@pytest.mark.parametrize(
    ("rows", "columns", "codes", "absmax", "nested"),
    [
        (4096, 4096, 8_388_608, 262_144, 4 * 1024),
        (33, 7, 116, 4, 4),
        # 64 × 256 weights fill exactly one second-level block; one weight more opens another.
        (64, 256, 8192, 256, 4),
        (1, 64 * 256 + 1, 8193, 257, 8),
    ],
)
def test_double_quantized_components_are_those_computed_by_hand(
    rows: int, columns: int, codes: int, absmax: int, nested: int
) -> None:
    for name in ("nf4-dq", "fp4-dq"):
        assert component_bytes(FORMATS[name], rows, columns) == {
            "weight": codes,
            "absmax": absmax,
            "quant_map": 16 * 4,
            "nested_absmax": nested,
            "nested_quant_map": 256 * 4,
            "nested_offset": 4,
        }


def test_8_bit_formats_keep_one_float32_scale_a_row() -> None:
    for name, scale in (("int8", "scale"), ("fp8", "scale"), ("llm-int8", "SCB")):
        assert component_bytes(FORMATS[name], 48, 96) == {"weight": 48 * 96, scale: 48 * 4}


def test_int4_blocks_do_not_cross_rows() -> None:
    # 65 columns are two blocks in each of 10 rows, not 11 blocks over all of them.
    assert component_bytes(FORMATS["int4"], 10, 65) == {"weight": 325, "scale": 10 * 2 * 2}


@pytest.mark.parametrize("name", TABLES_4BIT)
@pytest.mark.parametrize(
    "shape", [(64, 64), (1, 1), (3, 5), (33, 7), (127, 129), (129, 128), (257, 320)]
)
def test_4_bit_components_equal_what_bitsandbytes_quantizes_to(
    name: str, shape: tuple[int, int]
) -> None:
    functional: Any = pytest.importorskip("bitsandbytes").functional
    torch: Any = pytest.importorskip("torch")
    chosen = FORMATS[name]
    weight = torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape).to(torch.bfloat16)
    codes, state = functional.quantize_4bit(
        weight,
        blocksize=64,
        compress_statistics=chosen.double_quantized,
        quant_type=chosen.quant_type,
    )
    found = {"weight": codes, "absmax": state.absmax, "quant_map": state.code}
    if chosen.double_quantized:
        found["nested_absmax"] = state.state2.absmax
        found["nested_quant_map"] = state.state2.code
        found["nested_offset"] = state.offset
    assert {part: (t.numel(), t.nbytes, str(t.dtype)) for part, t in found.items()} == {
        part.name: (part.numel, part.size_bytes, f"torch.{part.dtype}")
        for part in chosen.components(*shape)
    }


@pytest.mark.parametrize("name", TABLES_4BIT)
@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (1, 64), (33, 7), (257, 320), (3, 1)])
def test_4_bit_bytes_equal_those_of_bitsandbytes_parameters(
    name: str, shape: tuple[int, int]
) -> None:
    modules: Any = pytest.importorskip("bitsandbytes").nn
    torch: Any = pytest.importorskip("torch")
    from oomproof.compat.verify import parameter_tensors

    chosen = FORMATS[name]
    parameter = modules.Params4bit(
        torch.ones(shape),
        quant_type=chosen.quant_type,
        compress_statistics=chosen.double_quantized,
    ).to("cpu")
    found = [(part.nbytes, str(part.dtype)) for part in parameter_tensors(parameter)]
    planned = [(p.size_bytes, f"torch.{p.dtype}") for p in chosen.components(*shape)]
    assert sorted(found) == sorted(planned)


def test_llm_int8_bytes_equal_those_of_bitsandbytes() -> None:
    modules: Any = pytest.importorskip("bitsandbytes").nn
    torch: Any = pytest.importorskip("torch")
    from oomproof.compat.verify import parameter_tensors

    parameter = modules.Int8Params(torch.ones(48, 96), requires_grad=False).to("cpu")
    found = sum(part.nbytes for part in parameter_tensors(parameter))
    assert found == FORMATS["llm-int8"].stored_bytes(48, 96)


@law
@given(SIDES, SIDES)
def test_a_format_of_fewer_bits_never_takes_more_bytes_beyond_its_tables(
    rows: int, columns: int
) -> None:
    tables = 4 * (16 + 256 + 2)
    bytes_of = {name: FORMATS[name].stored_bytes(rows, columns) for name in FORMATS}
    assert bytes_of["nf4-dq"] <= bytes_of["nf4"] + tables
    assert bytes_of["nf4"] <= bytes_of["int8"] + tables
    assert bytes_of["int8"] <= bytes_of["bf16"] + 4 * rows


@pytest.mark.parametrize("name", FORMATS)
@law
@given(rows=SIDES, columns=SIDES)
def test_more_rows_or_columns_never_take_fewer_bytes(name: str, rows: int, columns: int) -> None:
    size = FORMATS[name].stored_bytes
    assert size(rows, columns) <= min(size(rows + 1, columns), size(rows, columns + 1))


@pytest.mark.parametrize("dtype", DType)
def test_every_dtype_has_a_size_and_torchs_name(dtype: DType) -> None:
    torch: Any = pytest.importorskip("torch")
    assert getattr(torch, dtype.value).itemsize == dtype.itemsize


@law
@given(st.integers(0, 10**15), st.integers(1, 10**6))
def test_ceil_div_is_exact(numerator: int, denominator: int) -> None:
    quotient = ceil_div(numerator, denominator)
    assert (quotient - 1) * denominator < numerator <= quotient * denominator


def test_auto_tries_better_formats_first() -> None:
    assert set(QUALITY_ORDER) <= FORMATS.keys()
    bits = [FORMATS[name].bits_per_weight for name in QUALITY_ORDER]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("name", ["nf5", "", "NF4", "auto", "nf4 "])
def test_unknown_formats_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=rf"unknown format '{name}': use one of .*nf4-dq"):
        get_format(name)
