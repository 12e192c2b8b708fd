"""Stored bytes of every format, against arithmetic and against bitsandbytes itself."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oomproof.compat.verify import parameter_tensors
from oomproof.errors import InputError
from oomproof.formats import FORMATS, QUALITY_ORDER, get_format


@pytest.mark.parametrize("name", FORMATS)
def test_large_tensors_take_the_bits_that_the_format_states(name: str) -> None:
    stored_bits = FORMATS[name].stored_bytes(16_384, 16_384) * 8 / 16_384**2
    # One float32 scale a row adds 32 / 16,384 bits to the 8-bit formats.
    assert stored_bits == pytest.approx(FORMATS[name].bits_per_weight, abs=0.003)


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (1, 64), (33, 7), (257, 320), (3, 1)])
def test_4_bit_bytes_equal_those_of_bitsandbytes(name: str, shape: tuple[int, int]) -> None:
    chosen = FORMATS[name]
    parameter = bitsandbytes.nn.Params4bit(
        torch.randn(shape),
        quant_type=chosen.quant_type,
        compress_statistics=chosen.double_quantized,
    ).to("cpu")
    found = [(part.nbytes, str(part.dtype)) for part in parameter_tensors(parameter)]
    planned = [(p.size_bytes, f"torch.{p.dtype}") for p in chosen.components(*shape)]
    assert sorted(found) == sorted(planned)


def test_llm_int8_bytes_equal_those_of_bitsandbytes() -> None:
    parameter = bitsandbytes.nn.Int8Params(torch.randn(48, 96), requires_grad=False).to("cpu")
    found = sum(part.nbytes for part in parameter_tensors(parameter))
    assert found == FORMATS["llm-int8"].stored_bytes(48, 96)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_format_of_fewer_bits_never_takes_more_bytes_beyond_its_tables(
    rows: int, columns: int
) -> None:
    tables = 4 * (16 + 256 + 2)
    bytes_of = {name: FORMATS[name].stored_bytes(rows, columns) for name in FORMATS}
    assert bytes_of["nf4-dq"] <= bytes_of["nf4"] + tables
    assert bytes_of["nf4"] <= bytes_of["int8"] + tables
    assert bytes_of["int8"] <= bytes_of["bf16"] + 4 * rows


def test_unknown_formats_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown format 'nf5': use one of .*nf4-dq"):
        get_format("nf5")
    assert set(QUALITY_ORDER) <= FORMATS.keys()
