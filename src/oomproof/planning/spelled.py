"""Options as people write them, for both the command line and Python: numbers, or words for them.

Each raises InputError for what cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from oomproof.errors import InputError
from oomproof.units import parse_bytes, parse_tokens


def read_tokens(context: int | str | None) -> int | Literal["auto"] | None:
    """A context: 8192, "8k", "auto", or None for the default."""
    if context is None or isinstance(context, int):
        return context
    return "auto" if context == "auto" else parse_tokens(context)


def read_limits(
    max_memory: Mapping[int | Literal["cpu"], int | str] | None,
) -> dict[int | Literal["cpu"], int]:
    """Device index, or "cpu" for the host → bytes."""
    return {
        index: read_bytes(size, "max-memory") or 0 for index, size in (max_memory or {}).items()
    }


def read_count(concurrency: int | str) -> int | Literal["auto"]:
    """Requests at once: 4, "4" or "auto"."""
    if isinstance(concurrency, int):
        return concurrency
    if concurrency == "auto":
        return "auto"
    if not re.fullmatch(r"-?[0-9]+", concurrency):
        raise InputError(
            f"concurrency {concurrency[:40]!r} is no whole number", remedy='write "4" or "auto"'
        )
    # PlanRequest refuses what is out of bounds; a number of a thousand digits need not be read.
    return int(concurrency[:40])


def read_bytes(size: int | str | None, what: str) -> int | None:
    """A size: bytes, "24GiB", or None."""
    return parse_bytes(size, what=what) if isinstance(size, str) else size


def read_reserve(size: int | str) -> int:
    """Memory to leave alone: bytes or "2GiB"; 0 for none."""
    return parse_bytes(size, what="reserve", allow_zero=True) if isinstance(size, str) else size
