"""How a checkpoint is quantized: the value that every method's reader makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from oomproof.formats import Component, Format
from oomproof.models.config import ConfigReader
from oomproof.models.stored_parts import PartsOf

FP8_CAPABILITY = (8, 9)
INT32_BITS = 32
_DEFAULT_KEPT = ("lm_head",)

Layout = Callable[[int, int], tuple[Component, ...]]
"""[rows, columns] of a weight → what files hold for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointQuantization:
    """How a checkpoint is quantized."""

    method: str
    """quant_method of its quantization_config."""
    format: Format | None
    """What its linear layers are stored in; None for a method that is not planned."""
    kept_modules: tuple[str, ...] = ()
    """Modules that stay in 16 bits, as the config names them."""
    runs_with: str = ""
    """What runs such a checkpoint, where no engine of ours does."""
    held_as: str | None = None
    """The format in which the native engine holds its weights, code for code; None where it does
    not read them."""
    parts: PartsOf | None = None
    """What it reads for each, where it does."""
    note: str = ""
    """What else it computes otherwise then; or why it does not read them."""

    def keeps(self, module: str) -> bool:
        """Whether a module stays in 16 bits.

        A name of the config means the module, everything below it, and every module whose path it
        ends or stands in whole; "re:…" is a regular expression (compressed-tensors' `ignore`).
        """
        return any(_matches(name, module) for name in self.kept_modules)


def kept_modules(fields: ConfigReader, name: str) -> tuple[str, ...]:
    """What a config keeps in 16 bits by that field: the head, where it does not say."""
    return fields.texts(name) or _DEFAULT_KEPT


def layout_format(
    name: str,
    bits: int,
    layout: Layout,
    summary: str,
    capability: tuple[int, int] | None = None,
) -> Format:
    """The layout as a format; its bits a weight are those of a large tensor, scales included."""
    rows = columns = 8192
    stored = sum(part.size_bytes for part in layout(rows, columns))
    return Format(
        name=name,
        bits_per_weight=max(bits, 8 * stored / (rows * columns)),
        weight_dtype=layout(rows, columns)[0].dtype,
        components=layout,
        min_compute_capability=capability,
        quantizes_experts=True,
        summary=f"{summary}; as the checkpoint holds it",
        foreign=True,
    )


def _matches(name: str, module: str) -> bool:
    if name.startswith("re:"):
        try:
            return re.match(name.removeprefix("re:"), module) is not None
        except re.error:
            return False
    return f".{name}." in f".{module}."
