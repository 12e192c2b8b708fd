"""The forms of failures in data/, read."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """One text with what must be said of it."""

    name: str
    text: str
    fault_class: str
    cause: str
    code: int | None = None
    device: int | None = None
    figures: dict[str, str] = field(default_factory=dict)
    more: dict[str, int] = field(default_factory=dict)
    last: bool = False
    """Whether the last line tells it, and those before it are a traceback."""


def read_forms(file: str) -> list[Form]:
    """Every form of a file in data/."""
    entries = tomllib.loads((_DATA / file).read_text(encoding="utf-8"))["form"]
    return [
        Form(**{("fault_class" if k == "class" else k): v for k, v in e.items()}) for e in entries
    ]


def near_misses() -> list[str]:
    """Texts that are no failure."""
    texts: list[str] = tomllib.loads((_DATA / "near_misses.toml").read_text(encoding="utf-8"))[
        "texts"
    ]
    return texts
