"""Some rows of a weight as a weight of their own: views of its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from oomproof.formats import BLOCK_SIZE, FINE_BLOCK_SIZE, FP8_BLOCK, NESTED_BLOCK_SIZE, ceil_div

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
    numel = rows * columns
    fine = "absmax" in parts and parts["absmax"].numel() != ceil_div(numel, BLOCK_SIZE)
    # Component → weights that one element stands for, whatever their rows.
    weights = {
        "absmax": FINE_BLOCK_SIZE if fine else BLOCK_SIZE,
        "nested_absmax": BLOCK_SIZE * NESTED_BLOCK_SIZE,
    }
    found: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        if name in _SHARED or (name == "nested_absmax" and part.numel() == 1):
            found[name] = part
        elif name == "block_scale":
            if first % FP8_BLOCK:
                raise ValueError(f"row {first} begins within its {name}")
            squares = part.view(ceil_div(rows, FP8_BLOCK), -1)
            found[name] = squares[first // FP8_BLOCK : ceil_div(end, FP8_BLOCK)].reshape(-1)
        elif name == "scale" or (name == "weight" and part.numel() == numel):
            found[name] = part.view(rows, -1)[first:end].view(-1)
        else:
            each = weights.get(name, 2)
            start, rest = divmod(first * columns, each)
            if rest:
                raise ValueError(f"row {first} of {columns} columns begins within its {name}")
            found[name] = part.view(-1)[start : ceil_div(end * columns, each)]
    return found
