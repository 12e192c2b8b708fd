"""Weights that a checkpoint holds quantized already: read to their places, never quantized again.

Codes are what the engine holds (formats.py); only the place differs. bitsandbytes' codes and scales
of 4 bits go into tiles on a GPU, slice by slice; the offset of double quantization is a number in
JSON. Scales of 8 bits are float32 numbers here, one a row or a square: what a checkpoint has in 16
bits, or once for all rows, is the same number; bitsandbytes' SCB / 127 is rounded once, to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import NoReturn

import torch

from oomproof.engine.native.weights import Parameter, copy_part
from oomproof.errors import CheckpointError
from oomproof.formats import BLOCK_SIZE, FORMATS, FP8_BLOCK, NESTED_BLOCK_SIZE, ceil_div
from oomproof.loading.targets import Target
from oomproof.models.headers import parse_json_object, shorten
from oomproof.models.quantized import CheckpointQuantization
from oomproof.models.spec import CheckpointSpec
from oomproof.models.stored_parts import StoredPart
from oomproof.quantization.reference import INT8_MAX
from oomproof.quantization.tables import table_4bit, table_dynamic
from oomproof.quantization.tiled_writer import CODES, TILED_COMPONENTS
from oomproof.quantization.tiles import TILE_ROWS, tile_codes, tile_scale_rows

_CPU = torch.device("cpu")
_SCALES = ("SCB", "scale", "tensor_scale", "block_scale")
"""Components of stored_parts.py that are scales of 8-bit weights."""

Home = Mapping[str, torch.Tensor]
"""Host memory that a streamed layer's parts are copied to."""


class StoredWeights:
    """Makes the targets of weights that are quantized already.

    Args:
        folder: Where the checkpoint's files are.
        checkpoint: Their headers.
        quantization: How it is quantized; the native engine reads it.
    """

    def __init__(
        self, folder: Path, checkpoint: CheckpointSpec, quantization: CheckpointQuantization
    ) -> None:
        assert quantization.parts is not None
        self._parts_of, self._method = quantization.parts, quantization.method
        self._files = {one.name: folder / one.file for one in checkpoint.tensors}
        self._held = {one.name: one for one in checkpoint.tensors}
        self._zeros: list[_Zeros] = []

    def targets(self, parameter: Parameter, copy_to: Home | None = None) -> list[Target]:
        """Where the loader brings each of the tensors that a checkpoint has for a weight.

        Args:
            parameter: Its final place, or a buffer for it.
            copy_to: Its home, where it does not stay.
        """
        placed = parameter.placed
        found = []
        for listed in self._parts_of(placed.spec.name, placed.spec.shape):
            part = self._as_held(listed)
            if part is None:
                continue
            if part.component in _SCALES:
                found.append(self._scale(parameter, part, copy_to))
            elif part.component == "weight_format":
                found.append(self._row_major(part))
            elif part.component == "input_scale":
                found.append(self._unused(part))
            elif part.component == "quant_state":
                found.append(self._state(parameter, part, copy_to))
            elif part.component in ("quant_map", "nested_quant_map"):
                found.append(self._table(parameter, part, copy_to))
            elif placed.tiling is not None and part.component in TILED_COMPONENTS:
                found.append(_tiled(parameter, part, copy_to))
            else:
                found.append(_placed(parameter, part, copy_to))
        return found

    def check_zeros(self) -> None:
        """After loading: a scale of 0 belongs to codes that are all 0, else it is damage.

        Raises:
            CheckpointError: It is not so.
        """
        for zeros in self._zeros:
            for rows, columns in zeros.squares:
                if bool(zeros.codes[rows, columns].float().any()):
                    self._refuse(zeros.name, "has a scale of 0 for codes that are not 0")

    def _as_held(self, part: StoredPart) -> StoredPart | None:
        """The part with the type and shape that the file has; None where it may be missing."""
        held = self._held.get(part.name)
        if held is None:
            return part if part.required else None
        shape = None if part.shape is None else held.shape
        return replace(part, dtype=held.dtype, shape=shape)

    def _scale(self, parameter: Parameter, part: StoredPart, copy_to: Home | None) -> Target:
        home = copy_to or parameter.parts
        in_blocks = part.component == "block_scale"
        final = home["block_scale" if in_blocks else "scale"]
        codes = home[CODES].view(parameter.shape)

        def read(values: torch.Tensor) -> None:
            scales = values.float()
            if bool((scales < 0).any()):
                self._refuse(part.name, "has a scale below 0")
            if part.component == "SCB":
                scales = scales / INT8_MAX
            zeros = (scales == 0).nonzero().flatten().tolist()
            if zeros:
                squares = _squares(zeros, parameter.placed.matrix_shape, len(scales), in_blocks)
                self._zeros.append(_Zeros(name=part.name, codes=codes, squares=squares))
            final.copy_(scales.expand(final.shape) if part.component == "tensor_scale" else scales)

        return _collected(part, part.shape or (), read)

    def _row_major(self, part: StoredPart) -> Target:
        def check(values: torch.Tensor) -> None:
            if values.tolist() != [0]:
                self._refuse(
                    part.name, f"is {values.tolist()[0]}: rows are not one after the other"
                )

        return _collected(part, part.shape or (), check)

    def _unused(self, part: StoredPart) -> Target:
        def check(values: torch.Tensor) -> None:
            if bool((values <= 0).any()):
                self._refuse(part.name, "has a scale that is not above 0")

        return _collected(part, part.shape or (), check)

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

        held = self._held.get(part.name)
        return _collected(part, () if held is None else held.shape, read)

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
            remedy=(
                "load it with --engine transformers, or quantize the 16-bit model again"
                if self._method == "bitsandbytes"
                else "download it again, or quantize the 16-bit model"
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Zeros:
    """Where a weight's scales are 0."""

    name: str
    """Of the scales, in the file."""
    codes: torch.Tensor
    """[rows, columns], where they stay."""
    squares: tuple[tuple[slice, slice], ...]
    """Rows and columns of each."""


def _squares(
    scales: Sequence[int], shape: tuple[int, int], count: int, in_blocks: bool
) -> tuple[tuple[slice, slice], ...]:
    """Rows and columns that some of a weight's `count` scales are for."""
    whole = slice(0, shape[1])
    if not in_blocks:
        return tuple((slice(0, shape[0]) if count == 1 else slice(n, n + 1), whole) for n in scales)
    blocks = ceil_div(shape[1], FP8_BLOCK)
    return tuple(
        (
            slice(n // blocks * FP8_BLOCK, (n // blocks + 1) * FP8_BLOCK),
            slice(n % blocks * FP8_BLOCK, (n % blocks + 1) * FP8_BLOCK),
        )
        for n in scales
    )


def _collected(
    part: StoredPart, shape: tuple[int, ...], read: Callable[[torch.Tensor], None]
) -> Target:
    """A few bytes that are looked at on the processor, flat."""
    slices: list[torch.Tensor] = []

    def finish() -> None:
        read(torch.cat(slices))
        slices.clear()

    return Target(
        name=part.name,
        shape=shape,
        device=_CPU,
        store=lambda values, _row: slices.append(values.reshape(-1).clone()),
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
