"""Some rows of a weight as a weight of their own: views of its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from oomproof.formats import BLOCK_SIZE, NESTED_BLOCK_SIZE, ceil_div

_WEIGHTS = {"absmax": BLOCK_SIZE, "nested_absmax": BLOCK_SIZE * NESTED_BLOCK_SIZE}
"""Component → weights that one element stands for, whatever their rows."""
_SHARED = {"quant_map", "nested_quant_map", "nested_offset"}


def parts_of_rows(
    parts: Mapping[str, torch.Tensor], shape: tuple[int, int], first: int, end: int
) -> dict[str, torch.Tensor]:
    """The parts of rows first … end - 1.

    Args:
        parts: Of a weight in any format, row-major, as a Handler takes them.
        shape: Of the whole weight.
        first: The rows before it are whole elements of every component.
        end: One row further than the last.

    Raises:
        ValueError: `first` lies within an element.
    """
    rows, columns = shape
    found: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        if name in _SHARED:
            found[name] = part
        elif name == "scale" or (name == "weight" and part.numel() == rows * columns):
            found[name] = part.view(rows, -1)[first:end].view(-1)
        else:
            each = _WEIGHTS.get(name, 2)
            start, rest = divmod(first * columns, each)
            if rest:
                raise ValueError(f"row {first} of {columns} columns begins within its {name}")
            found[name] = part.view(-1)[start : ceil_div(end * columns, each)]
    return found
