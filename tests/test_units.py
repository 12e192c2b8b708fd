"""Sizes and counts as people write them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import InputError
from oomproof.units import (
    GIB,
    KIB,
    MIB,
    format_bytes,
    format_parameters,
    parse_bytes,
    parse_tokens,
    round_up,
)

law = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("512", 512),
        ("512b", 512),
        ("1kb", 1000),
        ("1KiB", 1024),
        ("3Mb", 3_000_000),
        ("3mib", 3 * 2**20),
        ("0.5tib", 2**39),
        ("1TB", 10**12),
        ("1024TiB", 2**50),
        ("\t8 GB\n", 8 * 10**9),
        ("007GB", 7 * 10**9),
        ("1", 1),
    ],
)
def test_sizes_are_read_in_both_kinds_of_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GiB",
        "-1GiB",
        "+1GiB",
        "0",
        "0.0GiB",
        "1e9",
        "5 apples",
        "24G",
        "24g i b",
        "1,5GiB",
        "1_000",
        ".5GiB",
        "5.GiB",
        "1.5.2GiB",
        "0x10",
        "24GiB 12GiB",
        "nan",
        "inf",
        "9" * 400,
        "1025TiB",
        "0." + "1" * 400 + "GiB",
        "٣GiB",
        "24GiB\x00",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="size"):
        parse_bytes(text)


def test_a_refused_size_names_its_option_its_value_and_the_bound() -> None:
    with pytest.raises(InputError, match=r"reserve '5 apples' is not a size: write .*GiB"):
        parse_bytes("5 apples", what="reserve")
    with pytest.raises(InputError, match=r"cap '0' must be more than 0 and at most 1 PiB"):
        parse_bytes("0", what="cap")


def test_no_byte_is_a_size_where_it_is_allowed() -> None:
    assert parse_bytes("0", allow_zero=True) == parse_bytes("0GiB", allow_zero=True) == 0
    with pytest.raises(InputError, match=r"reserve '2000TiB' must be at most 1 PiB"):
        parse_bytes("2000TiB", what="reserve", allow_zero=True)


@law
@given(st.integers(1, 10**5), st.sampled_from([("GB", 10**9), ("GiB", GIB), ("TB", 10**12)]))
def test_a_decimal_size_means_the_whole_bytes_it_spells(
    hundredths: int, unit: tuple[str, int]
) -> None:
    name, scale = unit
    text = f"{hundredths // 100}.{hundredths % 100:02}"
    if (expected := int(Fraction(text) * scale)) <= 2**50:
        assert parse_bytes(text + name) == expected


@law
@given(st.text(max_size=30))
def test_any_text_is_a_size_in_bounds_or_an_input_error(text: str) -> None:
    for parse, most in ((parse_bytes, 2**50), (parse_tokens, 10**9)):
        try:
            value = parse(text)
        except InputError:
            continue
        assert isinstance(value, int)
        assert 0 < value <= most


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("8192", 8192),
        ("32k", 32768),
        ("32K", 32768),
        ("128 k", 131_072),
        ("1m", 2**20),
        ("1.5k", 1536),
        ("0.5K", 512),
        (" 1 ", 1),
        ("8192.0", 8192),
        ("1000000000", 10**9),
    ],
)
def test_token_counts_are_read(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0k",
        "-5",
        "1.5",
        "1.1k",
        "lots",
        "auto",
        "1e3",
        "8kb",
        "2,048",
        "1000000001",
        "9" * 30,
        "99999m",
        "k",
        "٣",
        "nan",
        "1_000",
    ],
)
def test_what_is_no_token_count_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="context"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("size", "printed"),
    [
        (0, "0 B"),
        (102, "102 B"),
        (KIB, "1.00 KiB"),
        (512 * KIB, "0.50 MiB"),
        (64 * MIB, "64.0 MiB"),
        (512 * MIB, "0.50 GiB"),
        (GIB, "1.00 GiB"),
        (24 * GIB, "24.0 GiB"),
        (2000 * GIB, "2,000.0 GiB"),
        (-3 * GIB, "-3.00 GiB"),
    ],
)
def test_sizes_are_printed_in_gib_unless_that_rounds_to_nothing(size: int, printed: str) -> None:
    assert format_bytes(size) == printed


@law
@given(st.integers(0, 2**50))
def test_printed_sizes_are_near_what_they_print(size: int) -> None:
    printed = format_bytes(size).replace(",", "").replace(" ", "").removesuffix("B")
    if printed and printed[-1] == "i":
        value, scale = float(printed[:-2]), {"G": 2**30, "M": 2**20, "K": 2**10}[printed[-2]]
        assert value * scale == pytest.approx(size, rel=0.06)


@law
@given(st.integers(103, 2**50))
def test_printed_sizes_are_read_back(size: int) -> None:
    assert parse_bytes(format_bytes(size).replace(",", "")) == pytest.approx(size, rel=0.06)


def test_parameters_are_printed_as_the_field_does() -> None:
    assert format_parameters(8_030_261_248) == "8.03 B"
    assert format_parameters(405_853_388_800) == "406 B"
    assert format_parameters(3_836_672) == "3.84 M"
    assert format_parameters(134_515_008) == "135 M"
    assert format_parameters(1_500) == "1.5 K"
    assert format_parameters(999) == "999"


@law
@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_rounding_up_is_the_next_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple
