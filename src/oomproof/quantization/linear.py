"""A linear layer whose weight stays in its format; HANDLERS says how, one entry a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from oomproof.errors import InputError
from oomproof.formats import get_format
from oomproof.quantization import operators
from oomproof.quantization.tables import table_4bit, table_dynamic

Parts = dict[str, torch.Tensor]
"""Component name (formats.Component) → tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Handler:
    """What a format does with a weight [rows, columns]."""

    encode: Callable[[torch.Tensor], Parts]
    """The weight → the tensors that hold it, under the names of formats.Format.components."""
    decode: Callable[[Mapping[str, torch.Tensor], tuple[int, int], torch.dtype], torch.Tensor]
    """Those tensors, the shape and a dtype → the weight."""
    multiply: Callable[[torch.Tensor, Mapping[str, torch.Tensor], tuple[int, int]], torch.Tensor]
    """An input [tokens, columns], the tensors and the shape → [tokens, rows]."""


class QuantizedLinear(torch.nn.Module):
    """A linear layer in a format; its tensors are buffers of exactly the bytes of the plan.

    Args:
        format_name: A key of HANDLERS.
        parts: What `encode` returned.
        shape: [rows, columns] of the weight.
        bias: [rows], or None.

    Raises:
        InputError: No handler for the format.
    """

    def __init__(
        self,
        format_name: str,
        parts: Parts,
        shape: tuple[int, int],
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.format_name = format_name
        self.shape = shape
        self._handler = handler(format_name)
        self._names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(f"weight_{name}", part)
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias)

    @classmethod
    def from_weight(
        cls, weight: torch.Tensor, format_name: str, bias: torch.Tensor | None = None
    ) -> QuantizedLinear:
        """Quantizes a weight [rows, columns]."""
        rows, columns = weight.shape
        return cls(format_name, handler(format_name).encode(weight), (rows, columns), bias)

    @property
    def parts(self) -> Parts:
        """The tensors that hold the weight."""
        return {name: self.get_buffer(f"weight_{name}") for name in self._names}

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight, bias aside."""
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [rows, columns] that the parts stand for."""
        return self._handler.decode(self.parts, self.shape, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, columns] → […, rows], in the input's dtype."""
        product = self._handler.multiply(x, self.parts, self.shape)
        bias = self.bias
        return product if bias is None else product + bias.to(product.dtype)


def handler(format_name: str) -> Handler:
    """What the native engine does with a format.

    Raises:
        InputError: It does nothing with it, or there is no such format.
    """
    get_format(format_name)
    found = HANDLERS.get(format_name)
    if found is None:
        raise InputError(
            f"{format_name} weights are not held here", remedy=f"use one of {', '.join(HANDLERS)}"
        )
    return found


def _table_4bit(quant_type: str, *, nested: bool) -> Handler:
    return Handler(
        encode=partial(_encode_4bit, quant_type, nested=nested),
        decode=partial(_decode_4bit, quant_type),
        multiply=partial(_multiply_4bit, quant_type),
    )


def _encode_4bit(quant_type: str, weight: torch.Tensor, *, nested: bool) -> Parts:
    codes, absmax = operators.quantize_4bit(weight, quant_type)
    table = table_4bit(quant_type).to(weight.device, copy=True)
    if not nested:
        return {"weight": codes, "absmax": absmax, "quant_map": table}
    codes_of_absmax, nested_absmax, offset = operators.quantize_absmax(absmax)
    return {
        "weight": codes,
        "absmax": codes_of_absmax,
        "quant_map": table,
        "nested_absmax": nested_absmax,
        "nested_quant_map": table_dynamic().to(weight.device, copy=True),
        "nested_offset": offset,
    }


def _decode_4bit(
    quant_type: str,
    parts: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        absmax = operators.dequantize_absmax(absmax, parts["nested_absmax"], parts["nested_offset"])
    return operators.dequantize_4bit(parts["weight"], absmax, shape, quant_type, dtype)


def _multiply_4bit(
    quant_type: str, x: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> torch.Tensor:
    rows, _ = shape
    codes, absmax = parts["weight"], parts["absmax"]
    product: torch.Tensor
    if "nested_absmax" in parts:
        nested = (parts["nested_absmax"], parts["nested_offset"])
        product = operators.linear_4bit_dq(x, codes, absmax, *nested, rows, quant_type)
    else:
        product = operators.linear_4bit(x, codes, absmax, rows, quant_type)
    return product


def _rows(
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Handler:
    def encode(weight: torch.Tensor) -> Parts:
        codes, scale = quantize(weight)
        return {"weight": codes, "scale": scale}

    def decode(
        parts: Mapping[str, torch.Tensor], _shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        return (parts["weight"].float() * parts["scale"].unsqueeze(1)).to(dtype)

    def multiply(
        x: torch.Tensor, parts: Mapping[str, torch.Tensor], _shape: tuple[int, int]
    ) -> torch.Tensor:
        return product(x, parts["weight"], parts["scale"])

    return Handler(encode=encode, decode=decode, multiply=multiply)


def _encode_int4(weight: torch.Tensor) -> Parts:
    codes, scale = operators.quantize_groups_int4(weight)
    return {"weight": codes, "scale": scale}


def _decode_int4(
    parts: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    return operators.dequantize_int4(parts["weight"], parts["scale"], shape, dtype)


def _multiply_int4(
    x: torch.Tensor, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> torch.Tensor:
    product: torch.Tensor = operators.linear_int4(x, parts["weight"], parts["scale"], shape[0])
    return product


def _plain(dtype: torch.dtype) -> Handler:
    return Handler(
        encode=lambda weight: {"weight": weight.to(dtype)},
        decode=lambda parts, _shape, wanted: parts["weight"].to(wanted),
        multiply=lambda x, parts, _shape: torch.nn.functional.linear(
            x, parts["weight"].to(x.dtype)
        ),
    )


HANDLERS: dict[str, Handler] = {
    "bf16": _plain(torch.bfloat16),
    "fp16": _plain(torch.float16),
    "int8": _rows(operators.quantize_rows_int8, operators.linear_int8),
    "fp8": _rows(operators.quantize_rows_fp8, operators.linear_fp8),
    "int4": Handler(encode=_encode_int4, decode=_decode_int4, multiply=_multiply_int4),
    "nf4": _table_4bit("nf4", nested=False),
    "nf4-dq": _table_4bit("nf4", nested=True),
    "fp4": _table_4bit("fp4", nested=False),
    "fp4-dq": _table_4bit("fp4", nested=True),
}
"""Format → what the native engine does with it."""
