"""Sizes and counts as people write them, and as we print them.

Bytes are `int` everywhere inside; this is the only place where text becomes a number of bytes or
tokens. Both GB (10^9) and GiB (2^30) are read; GiB is printed.
"""

from __future__ import annotations

import re
from fractions import Fraction

from oomproof.errors import InputError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", re.ASCII)
_TOKENS = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kKmM]?)\s*", re.ASCII)
MAX_BYTES = 1024**5
MAX_TOKENS = 1_000_000_000


def parse_bytes(text: str, *, what: str = "size", allow_zero: bool = False) -> int:
    """Reads "80GiB", "24GB", "512MiB" or plain bytes.

    Args:
        text: The size; a number without a unit means bytes.
        what: Name of the value, for the error.
        allow_zero: Whether no byte at all is a size too.

    Raises:
        InputError: Not a size, zero, or more than 1 PiB.
    """
    match = _SIZE.fullmatch(text)
    scale = _BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise InputError(f"{what} {text!r} is not a size", remedy='write "24GiB" or "24GB"')
    size = int(Fraction(match[1]) * scale)
    if not (0 if allow_zero else 1) <= size <= MAX_BYTES:
        bound = "at most" if allow_zero else "more than 0 and at most"
        raise InputError(f"{what} {text!r} must be {bound} 1 PiB")
    return size


def parse_tokens(text: str, *, what: str = "context") -> int:
    """Reads a token count: "8192", "8k" (8 × 1024), "128k", "1m" (1024²).

    Raises:
        InputError: Not a whole number of tokens, zero, or absurdly large.
    """
    match = _TOKENS.fullmatch(text)
    if match is None:
        raise InputError(f"{what} {text!r} is not a token count", remedy='write "8192" or "8k"')
    tokens = Fraction(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]
    if tokens != int(tokens) or not 0 < tokens <= MAX_TOKENS:
        raise InputError(f"{what} {text!r} must be a whole number from 1 to {MAX_TOKENS:,}")
    return int(tokens)


def format_bytes(size_bytes: int) -> str:
    """Prints bytes in GiB, or in MiB and KiB where GiB would round to nothing."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= 0.1 * scale:
            value = size_bytes / scale
            digits = 2 if abs(value) < 10 else 1
            return f"{value:,.{digits}f} {unit}"
    return f"{size_bytes} B"


def format_parameters(count: int) -> str:
    """Prints a parameter count as the field does: 8.03 B, 124 M."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= scale:
            return (
                f"{count / scale:.3g} {unit}"
                if count < 100 * scale
                else f"{count / scale:.0f} {unit}"
            )
    return str(count)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
