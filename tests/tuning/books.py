"""Data for tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LEVITICUS = Path(__file__).parents[2] / "examples" / "leviticus.txt"


def write_lines(path: Path, *lines: Any) -> Path:
    """A .jsonl of objects, or of raw text where a line is text."""
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def small_book(folder: Path, characters: int = 4000) -> Path:
    """The beginning of a book."""
    path = folder / "book.txt"
    path.write_text(LEVITICUS.read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return path
