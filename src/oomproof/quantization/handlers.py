"""HANDLERS: what the native engine does with a weight in a format, one entry a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from oomproof.errors import InputError
from oomproof.formats import (
    BLOCK_SIZE,
    FINE_BLOCK_SIZE,
    FP8_BLOCK,
    NESTED_BLOCK_SIZE,
    ceil_div,
    get_format,
)
from oomproof.quantization import operators, reference
from oomproof.quantization.tables import table_4bit, table_dynamic

Parts = Mapping[str, torch.Tensor]
"""Component name (formats.Component) → tensor, of any shape with that many elements."""


class Handler(ABC):
    """A format. A weight is [rows, columns] = `shape`; its tensors are contiguous."""

    __slots__ = ()

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """A weight → the tensors that hold it, under the names of formats.Format.components."""

    @abstractmethod
    def encode_slice(
        self,
        source: torch.Tensor,
        parts: Parts,
        first_row: int,
        shape: tuple[int, int],
        workspace: torch.Tensor,
    ) -> None:
        """Writes what a slice of rows becomes to its place in the parts of the whole weight.

        Args:
            source: [any number of rows, columns], contiguous, bfloat16, float16 or float32.
            parts: Where the weight will be.
            first_row: Row of the weight at which the slice begins. In the formats with a 4-bit
                table first_row * columns must be a multiple of 128 (whole blocks, whole bytes).
                Slices come in order.
            shape: Of the whole weight.
            workspace: float32, at least `workspace_numel(shape)` elements, the same from the first
                slice to `finish`.
        """

    def finish(  # noqa: B027 - most formats are finished with their last slice
        self, parts: Parts, shape: tuple[int, int], workspace: torch.Tensor
    ) -> None:
        """Writes, after the last slice, what depends on the whole weight, and the codebooks."""

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """The weight [rows, columns] that the parts stand for."""

    @abstractmethod
    def multiply(
        self,
        x: torch.Tensor,
        parts: Parts,
        shape: tuple[int, int],
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        """Writes the product of x with the weight to `out`.

        Args:
            x: [tokens, columns], x.stride(1) == 1.
            parts: The weight.
            shape: Of the weight.
            out: [tokens, rows] in the type of x, out.stride(1) == 1; it may be a part of the
                columns of a wider tensor.
            scratch: uint8, at least scratch.least_scratch_bytes; what was in it is lost.
        """

    def workspace_numel(self, shape: tuple[int, int]) -> int:  # noqa: ARG002
        """float32 elements that quantizing slice by slice needs beside the parts."""
        return 0

    def searched(self) -> Handler:
        """The same format with searched block scales; itself, where it has none to search."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain(Handler):
    """Weights in a floating type of torch."""

    dtype: torch.dtype

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See Handler."""
        return {"weight": weight.to(self.dtype)}

    def encode_slice(
        self,
        source: torch.Tensor,
        parts: Parts,
        first_row: int,
        shape: tuple[int, int],
        workspace: torch.Tensor,  # noqa: ARG002
    ) -> None:
        """See Handler."""
        parts["weight"].view(shape)[first_row : first_row + len(source)].copy_(source)

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """See Handler."""
        return parts["weight"].view(shape).to(dtype)

    def multiply(
        self,
        x: torch.Tensor,
        parts: Parts,
        shape: tuple[int, int],
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        """See Handler."""
        weight = parts["weight"].view(shape)
        if weight.dtype == x.dtype:
            torch.mm(x, weight.t(), out=out)
            return
        rows, columns = shape
        step = min(rows, scratch.numel() // (columns * x.itemsize))
        converted = scratch[: step * columns * x.itemsize].view(x.dtype).view(step, columns)
        for first in range(0, rows, step):
            end = min(first + step, rows)
            part = converted[: end - first].copy_(weight[first:end])
            torch.mm(x, part.t(), out=out[:, first:end])


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScaled(Handler):
    """A scale a row: int8 or fp8, by the type of the codes."""

    dtype: torch.dtype

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See Handler."""
        int8 = self.dtype == torch.int8
        quantize = operators.quantize_rows_int8 if int8 else operators.quantize_rows_fp8
        codes, scale = quantize(weight)
        return {"weight": codes, "scale": scale}

    def encode_slice(
        self,
        source: torch.Tensor,
        parts: Parts,
        first_row: int,
        shape: tuple[int, int],
        workspace: torch.Tensor,  # noqa: ARG002
    ) -> None:
        """See Handler."""
        rows = slice(first_row, first_row + len(source))
        codes = parts["weight"].view(shape)[rows]
        operators.quantize_rows_out(source, codes, parts["scale"][rows])

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """See Handler."""
        codes = parts["weight"].view(shape).float()
        return (codes * parts["scale"].unsqueeze(1)).to(dtype)

    def multiply(
        self,
        x: torch.Tensor,
        parts: Parts,
        shape: tuple[int, int],
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        """See Handler."""
        linear = operators.linear_int8 if self.dtype == torch.int8 else operators.linear_fp8
        linear(x, parts["weight"].view(shape), parts["scale"], out, scratch)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScaled(Handler):
    """e4m3 with a scale for each 128 × 128, as checkpoints come; inputs stay in 16 bits."""

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """See Handler.

        Raises:
            InputError: Always.
        """
        raise _only_read()

    def encode_slice(
        self,
        source: torch.Tensor,  # noqa: ARG002
        parts: Parts,  # noqa: ARG002
        first_row: int,  # noqa: ARG002
        shape: tuple[int, int],  # noqa: ARG002
        workspace: torch.Tensor,  # noqa: ARG002
    ) -> None:
        """See Handler.

        Raises:
            InputError: Always.
        """
        raise _only_read()

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """See Handler."""
        weight, scale = self._views(parts, shape)
        return reference.dequantize_blocks(weight, scale, 0, shape[0], dtype)

    def multiply(
        self,
        x: torch.Tensor,
        parts: Parts,
        shape: tuple[int, int],
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        """See Handler."""
        operators.linear_fp8_block(x, *self._views(parts, shape), out, scratch)

    @staticmethod
    def _views(parts: Parts, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        scale = parts["block_scale"].view(ceil_div(shape[0], FP8_BLOCK), -1)
        return parts["weight"].view(shape), scale


def _only_read() -> InputError:
    return InputError(
        "nothing is quantized into fp8-block here: checkpoints come in it", remedy="use fp8 or int8"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4(Handler):
    """4-bit integers with a scale for each 64 weights of a row."""

    search: bool = False
    """Whether scales are searched; see search.py."""

    def searched(self) -> Int4:
        """See Handler."""
        return replace(self, search=True)

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See Handler."""
        codes, scale = operators.quantize_groups_int4(weight, self.search)
        return {"weight": codes, "scale": scale}

    def encode_slice(
        self,
        source: torch.Tensor,
        parts: Parts,
        first_row: int,
        shape: tuple[int, int],
        workspace: torch.Tensor,  # noqa: ARG002
    ) -> None:
        """See Handler."""
        end_row = first_row + len(source)
        start = first_row * shape[1]
        codes = parts["weight"].view(-1)[start // 2 : ceil_div(end_row * shape[1], 2)]
        scale = _scale_int4(parts, shape)[first_row:end_row]
        starts_low = start % 2 == 1
        operators.quantize_groups_int4_out(source, codes, scale, starts_low, self.search)

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """See Handler."""
        codes = parts["weight"].view(-1)
        return reference.dequantize_int4(codes, _scale_int4(parts, shape), shape, dtype)

    def multiply(
        self,
        x: torch.Tensor,
        parts: Parts,
        shape: tuple[int, int],
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        """See Handler."""
        scale = _scale_int4(parts, shape)
        operators.linear_int4(x, parts["weight"].view(-1), scale, out, scratch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table4bit(Handler):
    """bitsandbytes' 4-bit tables, with float32 or doubly quantized absmax values."""

    quant_type: str
    nested: bool
    search: bool = False
    """Whether scales are searched, in the place of absmax; see search.py."""
    block_size: int = BLOCK_SIZE
    """Weights that share an absmax; where it is not 64, one scale is for all absmax values."""

    @property
    def _nested_block_size(self) -> int:
        return NESTED_BLOCK_SIZE if self.block_size == BLOCK_SIZE else 0

    def searched(self) -> Table4bit:
        """See Handler."""
        return replace(self, search=True)

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """See Handler."""
        codes, absmax = operators.quantize_4bit(
            weight, self.quant_type, self.search, self.block_size
        )
        table = table_4bit(self.quant_type).to(weight.device, copy=True)
        if not self.nested:
            return {"weight": codes, "absmax": absmax, "quant_map": table}
        codes_of_absmax, nested_absmax, offset = operators.quantize_absmax(
            absmax, self._nested_block_size
        )
        return {
            "weight": codes,
            "absmax": codes_of_absmax,
            "quant_map": table,
            "nested_absmax": nested_absmax,
            "nested_quant_map": table_dynamic().to(weight.device, copy=True),
            "nested_offset": offset,
        }

    def encode_slice(
        self,
        source: torch.Tensor,
        parts: Parts,
        first_row: int,
        shape: tuple[int, int],
        workspace: torch.Tensor,
    ) -> None:
        """See Handler."""
        start = first_row * shape[1]
        end = start + source.numel()
        absmax = workspace if self.nested else parts["absmax"]
        operators.quantize_4bit_out(
            source,
            parts["weight"].view(-1)[start // 2 : ceil_div(end, 2)],
            absmax[start // self.block_size : ceil_div(end, self.block_size)],
            self.quant_type,
            self.search,
            self.block_size,
        )

    def finish(self, parts: Parts, shape: tuple[int, int], workspace: torch.Tensor) -> None:
        """See Handler."""
        parts["quant_map"].copy_(table_4bit(self.quant_type))
        if not self.nested:
            return
        parts["nested_quant_map"].copy_(table_dynamic())
        operators.quantize_absmax_out(
            workspace[: self.workspace_numel(shape)],
            parts["absmax"],
            parts["nested_absmax"],
            parts["nested_offset"].view(()),
            parts["nested_quant_map"],
            self._nested_block_size,
        )

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """See Handler."""
        absmax = parts["absmax"]
        if self.nested:
            absmax = reference.dequantize_absmax(absmax, *self._nested(parts))
        codes = parts["weight"].view(-1)
        table = parts["quant_map"]
        return reference.dequantize_4bit(codes, absmax, table, shape, dtype, self.block_size)

    def multiply(
        self,
        x: torch.Tensor,
        parts: Parts,
        shape: tuple[int, int],  # noqa: ARG002
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        """See Handler."""
        codes, absmax, table = parts["weight"].view(-1), parts["absmax"], parts["quant_map"]
        if self.nested:
            nested = self._nested(parts)
            size = self.block_size
            operators.linear_4bit_dq(x, codes, absmax, *nested, table, out, scratch, size)
        else:
            operators.linear_4bit(x, codes, absmax, table, out, scratch)

    def workspace_numel(self, shape: tuple[int, int]) -> int:
        """See Handler."""
        return ceil_div(shape[0] * shape[1], self.block_size) if self.nested else 0

    def _nested(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        offset = parts["nested_offset"].view(())
        return parts["nested_absmax"], parts["nested_quant_map"], offset


def _scale_int4(parts: Parts, shape: tuple[int, int]) -> torch.Tensor:
    return parts["scale"].view(shape[0], ceil_div(shape[1], BLOCK_SIZE))


HANDLERS: dict[str, Handler] = {
    "fp32": Plain(dtype=torch.float32),
    "bf16": Plain(dtype=torch.bfloat16),
    "fp16": Plain(dtype=torch.float16),
    "int8": RowScaled(dtype=torch.int8),
    "fp8": RowScaled(dtype=torch.float8_e4m3fn),
    "int4": Int4(),
    "nf4": Table4bit(quant_type="nf4", nested=False),
    "nf4-dq": Table4bit(quant_type="nf4", nested=True),
    "nf4-g16": Table4bit(quant_type="nf4", nested=True, block_size=FINE_BLOCK_SIZE),
    "fp4": Table4bit(quant_type="fp4", nested=False),
    "fp4-dq": Table4bit(quant_type="fp4", nested=True),
}
"""Format → what the native engine does with it."""

_READ_HANDLERS: dict[str, Handler] = {"fp8-block": BlockScaled()}
"""The same for what only checkpoints come in (formats.READ_FORMATS)."""


def handler(format_name: str, *, search: bool = False) -> Handler:
    """What the native engine does with a format.

    Args:
        format_name: A key of HANDLERS, or of formats.READ_FORMATS.
        search: Whether it searches block scales when it quantizes, where the format has them.

    Raises:
        InputError: It does nothing with it, or there is no such format.
    """
    found = HANDLERS.get(format_name) or _READ_HANDLERS.get(format_name)
    if found is None:
        get_format(format_name)
        raise InputError(
            f"{format_name} weights are not held here", remedy=f"use one of {', '.join(HANDLERS)}"
        )
    return found.searched() if search else found
