"""One product of a layer and its gradient: frozen weights, and adapters beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oomproof.tuning.adapters import Low
from oomproof.tuning.frozen import FrozenWeight, Scratch
from oomproof.tuning.operators import drop


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropout:
    """Of an adapter's input."""

    probability: float
    seed: int
    """Of the mask, the same in forward and backward pass."""
    dropped: torch.Tensor
    """Where the input goes: [tokens, columns or more]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """multiplier × (x Wᵀ + scale × x Aᵀ Bᵀ), with what it writes to besides its result."""

    weight: FrozenWeight
    low: Low | None
    """None where no linear of it has an adapter."""
    low_grads: Low | None
    """Where gradients of the adapters go."""
    scratch: Scratch
    scale: float
    """Of the adapters."""
    multiplier: float
    low_rows: torch.Tensor | None
    """x Aᵀ, [tokens, linears × rank], kept from the forward to the backward pass."""
    dropout: Dropout | None

    def forward(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        again: bool = False,
        adds_low: bool = True,
    ) -> None:
        """Writes the product, or its sum with a residual [tokens, rows], to out [tokens, rows].

        Args:
            x: [tokens, columns].
            out: Not the residual.
            residual: None for none.
            again: Whether the same was computed before, and `low_rows` is known.
            adds_low: Whether adapters' part is added, or is left to what follows.
        """
        for first, end, part in self.scratch.slices(self.weight):
            into = out[:, first:end]
            if residual is None:
                _mm(x, part.t(), into, self.multiplier)
            else:
                torch.addmm(residual[:, first:end], x, part.t(), alpha=self.multiplier, out=into)
        self.weight.add_biases(out, self.multiplier)
        if self.low is None or self.low_rows is None:
            return
        if not again:
            torch.mm(self._dropped(x), self.low.a.t(), out=self.low_rows)
        parts = self._parts(self.low_rows) if adds_low else ()
        for (first, end, b), part in zip(self.low.b, parts, strict=adds_low):
            out[:, first:end].addmm_(part, b.t(), alpha=self.scale * self.multiplier)

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        grad_low: torch.Tensor,
        grad_x: torch.Tensor | None,
    ) -> None:
        """Writes gradients of the input, and of the adapters.

        Args:
            grad: Of the product, [tokens, rows].
            x: [tokens, columns].
            grad_low: Room for the gradient of x Aᵀ, [tokens, linears × rank or more].
            grad_x: [tokens, columns]; None where nothing below is trained.
        """
        self.grad_of_input(grad, grad_low, grad_x)
        self.grad_of_adapters(grad, x, grad_low)

    def grad_of_input(
        self, grad: torch.Tensor, grad_low: torch.Tensor, grad_x: torch.Tensor | None
    ) -> None:
        """The first half of `backward`, without x; leaves what the second needs in grad_low."""
        if grad_x is not None:
            for first, end, part in self.scratch.slices(self.weight):
                if first == 0:
                    _mm(grad[:, :end], part, grad_x, self.multiplier)
                else:
                    grad_x.addmm_(grad[:, first:end], part, alpha=self.multiplier)
        if self.low is None:
            return
        columns = self.low.a.shape[0]
        for (first, end, b), part in zip(
            self.low.b, self._parts(grad_low[:, :columns]), strict=True
        ):
            _mm(grad[:, first:end], b, part, self.scale * self.multiplier)
        if grad_x is None:
            return
        if self.dropout is None:
            grad_x.addmm_(grad_low[:, :columns], self.low.a)
        else:
            mask = self.dropout
            whole = mask.dropped.view(-1)[: grad_x.numel()].view(grad_x.shape)
            torch.mm(grad_low[:, :columns], self.low.a, out=whole)
            drop(whole, mask.seed, mask.probability, grad_x, True)

    def grad_of_adapters(self, grad: torch.Tensor, x: torch.Tensor, grad_low: torch.Tensor) -> None:
        """The second half of `backward`."""
        if self.low is None or self.low_grads is None or self.low_rows is None:
            return
        columns = self.low.a.shape[0]
        torch.mm(grad_low[:, :columns].t(), self._dropped(x), out=self.low_grads.a)
        for (first, end, into), part in zip(
            self.low_grads.b, self._parts(self.low_rows), strict=True
        ):
            _mm(grad[:, first:end].t(), part, into, self.scale * self.multiplier)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if self.dropout is None:
            return x
        mask = self.dropout
        whole = mask.dropped.view(-1)[: x.numel()].view(x.shape)
        drop(x, mask.seed, mask.probability, whole, False)
        return whole

    def _parts(self, low_rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert self.low is not None
        return tuple(low_rows.chunk(len(self.low.b), dim=1))


def _mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
    if alpha == 1:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(out, left, right, beta=0, alpha=alpha, out=out)
