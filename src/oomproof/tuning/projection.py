"""One product of a layer and its gradient: frozen weights, and adapters beside them.

What adapters add is written first, and the frozen weights' product is added to it in the same sum
that is rounded once: added the other way round, most of what a young adapter does is less than half
a unit in the last place of what it is added to, and lost.
"""

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


class Product:
    """multiplier × (x Wᵀ + scale × x Aᵀ Bᵀ), with what it writes to besides its result.

    Args:
        weight: W.
        low: A and B; None where no linear of it has an adapter.
        low_grads: Where gradients of the adapters go.
        scratch: Where W becomes 16 bits.
        scale: Of the adapters.
        multiplier: Of the whole product.
        low_rows: x Aᵀ, [tokens, linears × rank], kept from the forward to the backward pass.
        dropout: Of the adapters' input.
    """

    __slots__ = (
        "_a_t",
        "_alpha",
        "_b",
        "_b_t",
        "_bare",
        "_dropout",
        "_low",
        "_low_grads",
        "_low_rows",
        "_multiplier",
        "_parts",
        "_scratch",
        "_weight",
    )

    def __init__(
        self,
        *,
        weight: FrozenWeight,
        low: Low | None,
        low_grads: Low | None,
        scratch: Scratch,
        scale: float,
        multiplier: float,
        low_rows: torch.Tensor | None,
        dropout: Dropout | None,
    ) -> None:
        self._weight, self._scratch, self._multiplier = weight, scratch, multiplier
        self._low, self._low_grads, self._low_rows = low, low_grads, low_rows
        self._alpha, self._dropout = scale * multiplier, dropout
        self._a_t = None if low is None else low.a.t()
        if low is None or low_rows is None:
            self._parts: tuple[torch.Tensor, ...] = ()
            self._b: tuple[tuple[int, int, torch.Tensor], ...] = ()
        else:
            self._parts, self._b = low_rows.chunk(len(low.b), dim=1), low.b
        self._b_t = tuple(b.t() for _, _, b in self._b)
        # Rows that no adapter writes.
        ends = (0, *(row for first, end, _ in self._b for row in (first, end)), weight.rows)
        self._bare = tuple(
            (first, end) for first, end in zip(ends[::2], ends[1::2], strict=True) if first < end
        )

    @property
    def low_rows(self) -> torch.Tensor | None:
        """See above."""
        return self._low_rows

    def forward(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        *,
        again: bool = False,
        adds_low: bool = True,
    ) -> None:
        """Writes the product to out [tokens, rows].

        Args:
            x: [tokens, columns].
            out: Not x.
            again: Whether the same was computed before, and `low_rows` is known.
            adds_low: Whether adapters' part is added, or is left to what follows.
        """
        adds = bool(self._b) and adds_low
        if self._a_t is not None and not again:
            assert self._low_rows is not None
            torch.mm(self._dropped(x), self._a_t, out=self._low_rows)
        if adds:
            for (first, end, _), b_t, part in zip(self._b, self._b_t, self._parts, strict=True):
                _mm(part, b_t, _columns(out, first, end), self._alpha)
            for first, end in self._bare:
                out[:, first:end].zero_()
        for first, end, part in self._scratch.slices(self._weight):
            into = _columns(out, first, end)
            if adds:
                torch.addmm(into, x, part.t(), alpha=self._multiplier, out=into)
            else:
                _mm(x, part.t(), into, self._multiplier)
        self._weight.add_biases(out, self._multiplier)

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
        low = self._low
        if low is not None:
            found = _columns(grad_low, 0, low.a.shape[0])
            parts = found.chunk(len(self._b), dim=1) if len(self._b) > 1 else (found,)
            for (first, end, b), part in zip(self._b, parts, strict=True):
                _mm(_columns(grad, first, end), b, part, self._alpha)
            if grad_x is not None:
                self._begin_grad(found, low.a, grad_x)
        if grad_x is None:
            return
        begun = low is not None
        for first, end, part in self._scratch.slices(self._weight):
            above = _columns(grad, first, end)
            if begun:
                torch.addmm(grad_x, above, part, alpha=self._multiplier, out=grad_x)
            else:
                _mm(above, part, grad_x, self._multiplier)
            begun = True

    def _begin_grad(self, found: torch.Tensor, a: torch.Tensor, grad_x: torch.Tensor) -> None:
        """Adapters' part of the input's gradient."""
        if self._dropout is None:
            torch.mm(found, a, out=grad_x)
            return
        mask = self._dropout
        whole = mask.dropped.view(-1)[: grad_x.numel()].view(grad_x.shape)
        torch.mm(found, a, out=whole)
        drop(whole, mask.seed, mask.probability, grad_x, False)

    def grad_of_adapters(self, grad: torch.Tensor, x: torch.Tensor, grad_low: torch.Tensor) -> None:
        """The second half of `backward`."""
        low_grads = self._low_grads
        if low_grads is None:
            return
        found = _columns(grad_low, 0, low_grads.a.shape[0])
        torch.mm(found.t(), self._dropped(x), out=low_grads.a)
        for (first, end, into), part in zip(low_grads.b, self._parts, strict=True):
            _mm(_columns(grad, first, end).t(), part, into, self._alpha)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if self._dropout is None:
            return x
        mask = self._dropout
        whole = mask.dropped.view(-1)[: x.numel()].view(x.shape)
        drop(x, mask.seed, mask.probability, whole, False)
        return whole


def _columns(matrix: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Some columns: the matrix itself where they are all, for a view takes its time."""
    return matrix if end - first == matrix.shape[1] else matrix[:, first:end]


def _mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
    if alpha == 1:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(out, left, right, beta=0, alpha=alpha, out=out)
