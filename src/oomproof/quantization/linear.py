"""A linear layer whose weight stays in its format."""

from __future__ import annotations

import torch

from oomproof.quantization.handlers import HANDLERS, Handler, Parts, handler
from oomproof.quantization.scratch import least_scratch_bytes

__all__ = ["HANDLERS", "Handler", "Parts", "QuantizedLinear", "handler", "least_scratch_bytes"]

_SCRATCH_BYTES = 1 << 20


class QuantizedLinear(torch.nn.Module):
    """A linear layer in a format; its tensors are buffers of exactly the bytes of the plan.

    It allocates its product and scratch itself: for tests and single layers. An engine with static
    memory calls `handler(…).multiply`.

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
    def parts(self) -> dict[str, torch.Tensor]:
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
        rows, columns = self.shape
        tokens = x.reshape(-1, columns)
        least = least_scratch_bytes(
            self.format_name, len(tokens), rows, columns, itemsize=x.itemsize
        )
        scratch = x.new_empty(max(least, _SCRATCH_BYTES), dtype=torch.uint8)
        out = x.new_empty(len(tokens), rows)
        self._handler.multiply(tokens, self.parts, self.shape, out, scratch)
        product = out.reshape(*x.shape[:-1], rows)
        bias = self.bias
        return product if bias is None else product + bias.to(product.dtype)
