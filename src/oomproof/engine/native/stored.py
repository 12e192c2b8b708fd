"""Weights that a checkpoint holds in 4 bits already: read to their places, never quantized again.

bitsandbytes' codes and scales are what the engine holds (formats.py); only the place differs. On a
GPU they go into tiles slice by slice; the offset of double quantization is a number in JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import isfinite
from pathlib import Path
from typing import NoReturn

import torch

from oomproof.engine.native.weights import Parameter, copy_part
from oomproof.errors import CheckpointError
from oomproof.formats import BLOCK_SIZE, FORMATS, NESTED_BLOCK_SIZE
from oomproof.loading.targets import Target
from oomproof.models.headers import parse_json_object, shorten
from oomproof.models.quantization import StoredPart, bitsandbytes_parts
from oomproof.models.spec import CheckpointSpec
from oomproof.quantization.tables import table_4bit, table_dynamic
from oomproof.quantization.tiled_writer import CODES, TILED_COMPONENTS
from oomproof.quantization.tiles import TILE_ROWS, tile_codes, tile_scale_rows

_CPU = torch.device("cpu")

Home = Mapping[str, torch.Tensor]
"""Host memory that a streamed layer's parts are copied to."""


class StoredWeights:
    """Makes the targets of weights in 4 bits.

    Args:
        folder: Where the checkpoint's files are.
        checkpoint: Their headers.
    """

    def __init__(self, folder: Path, checkpoint: CheckpointSpec) -> None:
        self._files = {one.name: folder / one.file for one in checkpoint.tensors}
        self._shapes = {one.name: one.shape for one in checkpoint.tensors}

    def targets(self, parameter: Parameter, copy_to: Home | None = None) -> list[Target]:
        """Where the loader brings each of the tensors that a checkpoint has for a weight.

        Args:
            parameter: Its final place, or a buffer for it.
            copy_to: Its home, where it does not stay.
        """
        placed = parameter.placed
        found = []
        for part in bitsandbytes_parts(placed.spec.name, placed.spec.shape, FORMATS[placed.format]):
            if part.component == "quant_state":
                found.append(self._state(parameter, part, copy_to))
            elif part.component in ("quant_map", "nested_quant_map"):
                found.append(self._table(parameter, part, copy_to))
            elif placed.tiling is not None and part.component in TILED_COMPONENTS:
                found.append(_tiled(parameter, part, copy_to))
            else:
                found.append(_placed(parameter, part, copy_to))
        return found

    def _table(self, parameter: Parameter, part: StoredPart, copy_to: Home | None) -> Target:
        own = (
            table_dynamic()
            if part.component == "nested_quant_map"
            else table_4bit(parameter.placed.format.removesuffix("-dq"))
        )
        final = (copy_to or parameter.parts)[part.component]

        def check(values: torch.Tensor) -> None:
            if not torch.equal(values, own):
                self._refuse(
                    part.name, f"is another table than {parameter.placed.format} is defined by"
                )
            final.copy_(own)

        return _collected(part, own.shape, check)

    def _state(self, parameter: Parameter, part: StoredPart, copy_to: Home | None) -> Target:
        def read(values: torch.Tensor) -> None:
            offset = self._read_state(bytes(values.tolist()), parameter, part)
            if offset is not None:
                (copy_to or parameter.parts)["nested_offset"].fill_(offset)

        return _collected(part, self._shapes.get(part.name, ()), read)

    def _read_state(self, raw: bytes, parameter: Parameter, part: StoredPart) -> float | None:
        """The offset of double quantization, after comparing the rest with what is read here."""
        location = f"{self._files[part.name]}, tensor {part.name!r}"
        state = parse_json_object(raw, what="content", location=location)
        weight_format = FORMATS[parameter.placed.format]
        expected: dict[str, object] = {
            "quant_type": weight_format.quant_type,
            "blocksize": BLOCK_SIZE,
            "shape": list(parameter.shape),
        }
        if weight_format.double_quantized:
            expected |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
        for name, value in expected.items():
            if state.get(name) != value:
                self._refuse(part.name, f"has {name} {shorten(state.get(name))}, not {value!r}")
        if not weight_format.double_quantized:
            return None
        offset = state.get("nested_offset")
        if not isinstance(offset, (int, float)) or not isfinite(offset) or abs(offset) > 3e38:
            self._refuse(part.name, f"has nested_offset {shorten(offset)}, which is no number")
        return float(offset)

    def _refuse(self, name: str, problem: str) -> NoReturn:
        raise CheckpointError(
            str(self._files[name]),
            f"tensor {name!r} {problem}",
            remedy="load it with --engine transformers, or quantize the 16-bit model again",
        )


def _collected(
    part: StoredPart, shape: tuple[int, ...], read: Callable[[torch.Tensor], None]
) -> Target:
    """A few bytes that are looked at on the processor."""
    slices: list[torch.Tensor] = []

    def finish() -> None:
        read(torch.cat(slices))
        slices.clear()

    return Target(
        name=part.name,
        shape=shape,
        device=_CPU,
        store=lambda values, _row: slices.append(values.clone()),
        finish=finish,
        dtype=getattr(torch, part.dtype.value),
    )


def _placed(parameter: Parameter, part: StoredPart, copy_to: Home | None) -> Target:
    """Bytes that go where they stay as they are."""
    assert part.shape is not None
    final = (copy_to or parameter.parts)[part.component].view(part.shape)
    return Target(
        name=part.name,
        shape=part.shape,
        device=final.device,
        store=_never,
        place=final,
        dtype=final.dtype,
    )


def _never(_values: torch.Tensor, _first_row: int) -> None:
    raise ValueError("a part with a place of its type is not stored")


def _tiled(parameter: Parameter, part: StoredPart, copy_to: Home | None) -> Target:
    """Whole tiles at a time, from row-major codes or scales."""
    assert part.shape is not None
    _, columns = parameter.placed.matrix_shape
    codes = part.component == CODES
    row_elements = columns // 2 if codes else columns // BLOCK_SIZE
    tiles = parameter.parts[part.component]
    arrange = tile_codes if codes else tile_scale_rows

    def store(values: torch.Tensor, first: int) -> None:
        begin = first // (row_elements * TILE_ROWS)
        count = values.numel() // (row_elements * TILE_ROWS)
        arrange(values.view(-1, row_elements), tiles[begin : begin + count])

    return Target(
        name=part.name,
        shape=part.shape,
        device=tiles.device,
        store=store,
        finish=None if copy_to is None else partial(copy_part, tiles, copy_to[part.component]),
        rows_multiple=TILE_ROWS * row_elements,
        dtype=tiles.dtype,
    )
