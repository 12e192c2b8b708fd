"""Sizes and counts as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomproof.errors import InputError
from oomproof.units import format_bytes, format_parameters, parse_bytes, parse_tokens, round_up


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), (" 1.5 gib ", 3 * 2**29), ("512", 512)],
)
def test_sizes_are_read_in_both_kinds_of_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1e9", "5 apples", "9" * 400, "٣GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("32k", 32768), ("1m", 2**20)])
def test_token_counts_are_read(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "lots", "9" * 30])
def test_what_is_no_token_count_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="context"):
        parse_tokens(text)


@given(st.integers(0, 2**50))
def test_printed_sizes_are_near_what_they_print(size: int) -> None:
    printed = format_bytes(size).replace(",", "").replace(" ", "").removesuffix("B")
    if printed and printed[-1] == "i":
        value, scale = float(printed[:-2]), {"G": 2**30, "M": 2**20, "K": 2**10}[printed[-2]]
        assert value * scale == pytest.approx(size, rel=0.06)


def test_parameters_are_printed_as_the_field_does() -> None:
    assert format_parameters(8_030_261_248) == "8.03 B"
    assert format_parameters(405_853_388_800) == "406 B"
    assert format_parameters(3_836_672) == "3.84 M"


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_rounding_up_is_the_next_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple
