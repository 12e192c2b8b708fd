"""Products with a layer's weights: one linear, or several that share an input, at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch

from oomproof.quantization import operators
from oomproof.quantization.chained_operators import chained_linear_4bit
from oomproof.quantization.handlers import Handler
from oomproof.quantization.rows import parts_of_rows
from oomproof.quantization.step_operators import step_linear_4bit
from oomproof.quantization.tiled import TiledSet, set_of_rows


class Product(Protocol):
    """What an input is multiplied by."""

    @property
    def rows(self) -> int:
        """Columns of the result."""

    def multiply(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """[tokens, columns] → out [tokens, rows]."""

    def part(self, first: int, end: int) -> Product:
        """The product with rows first … end - 1, of one linear; see slices.up_rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A product with a weight in its format, row-major, or with several neighbours at once."""

    handler: Handler
    parts: Mapping[str, torch.Tensor]
    shape: tuple[int, int]
    """[rows, columns]."""
    bias: torch.Tensor | None

    @property
    def rows(self) -> int:
        """See Product."""
        return self.shape[0]

    def multiply(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """See Product."""
        self.handler.multiply(x, self.parts, self.shape, out, scratch)
        if self.bias is not None:
            out.add_(self.bias)

    def part(self, first: int, end: int) -> Linear:
        """See Product."""
        return replace(
            self,
            parts=parts_of_rows(self.parts, self.shape, first, end),
            shape=(end - first, self.shape[1]),
            bias=None if self.bias is None else self.bias[first:end],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepNorm:
    """What happens to the hidden states before a product: an update, and an RMSNorm."""

    update: torch.Tensor | None
    weight: torch.Tensor
    hidden_out: torch.Tensor
    """Where the updated hidden states go; not where they come from."""
    eps: float
    multiplier: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What a decode step's products hand each other beside results; see chained_operators."""

    squares: torch.Tensor
    counters: torch.Tensor
    scratch: torch.Tensor
    eps: float
    multiplier: float


class TiledLinears:
    """A product with one or several weights whose tiles are one stream.

    Args:
        weights: The stream.
        biases: Of each of its linears.
    """

    __slots__ = ("_arguments", "_given_biases", "_step_biases", "biases", "rows", "weights")

    def __init__(self, weights: TiledSet, biases: Sequence[torch.Tensor | None]) -> None:
        self.weights = weights
        self._arguments = weights.arguments()
        self._given_biases = tuple(biases)
        known = [bias for bias in biases if bias is not None]
        self._step_biases = known if len(known) in {0, len(biases)} else None
        self.rows = weights.rows
        self.biases = _placed_biases(weights, biases)
        """(First row, end, bias) of what is added to the product."""

    def multiply(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """See Product."""
        operators.linear_4bit_tiled(x, *self._arguments, out, scratch)
        for first, end, bias in self.biases:
            out[:, first:end].add_(bias)

    def part(self, first: int, end: int) -> TiledLinears:
        """See Product."""
        weights, number, place = set_of_rows(self.weights, first, end)
        bias = self._given_biases[number]
        return TiledLinears(weights, [None if bias is None else bias[place : place + end - first]])

    @property
    def gates(self) -> bool:
        """Whether `multiply_gated` computes it: two linears, with a bias each or without."""
        return len(self.weights.segments) == 2 and self._step_biases is not None

    def multiply_gated(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """Silu(first linear) times the second, [tokens, half of the rows], of any tokens."""
        assert self._step_biases is not None
        operators.gated_4bit_tiled(x, *self._arguments, self._step_biases, out, scratch)

    @property
    def has_step(self) -> bool:
        """Whether `step` computes it here: all of its linears have biases, or none."""
        device = self.weights.codes.device
        if self._step_biases is None or device.type != "cuda":
            return False
        from oomproof.quantization.products_tiled import computes

        return computes(self.weights, device)

    def normalises(self, tokens: int) -> bool:
        """Whether `step` takes a norm of so many tokens."""
        from oomproof.quantization.products_tiled import normalises

        return normalises(tokens, self.weights, self.weights.codes.device)

    def chains(self, tokens: int, chain: Chain) -> bool:
        """Whether `chained` computes it for so many tokens."""
        from oomproof.quantization.products_wide import chains

        return chains(tokens, self.weights, chain.scratch.device, chain.scratch.nbytes)

    def chained(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        chain: Chain,
        *,
        norm_weight: torch.Tensor | None = None,
        gated: bool = False,
        updates: bool = False,
        before_attention: bool = False,
    ) -> None:
        """The product of a decode step between others; see chained_linear_4bit."""
        assert self._step_biases is not None
        chained_linear_4bit(
            x,
            norm_weight,
            chain.eps,
            chain.multiplier,
            *self._arguments,
            biases=self._step_biases,
            gated=gated,
            updates=updates,
            out=out,
            squares=chain.squares,
            counters=None if before_attention else chain.counters,
            scratch=chain.scratch,
        )

    def step(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        scratch: torch.Tensor,
        *,
        norm: StepNorm | None = None,
        gated: bool = False,
    ) -> None:
        """The product of a decode step, with what is fused with it; see step_linear_4bit.

        Args:
            x: [tokens, columns]; hidden states where there is a norm.
            out: [tokens, rows], half of them where `gated`.
            scratch: uint8.
            norm: What is done to x first.
            gated: Whether silu(first linear) times the second is written.
        """
        assert self._step_biases is not None
        step_linear_4bit(
            x,
            None if norm is None else norm.update,
            None if norm is None else norm.weight,
            None if norm is None else norm.hidden_out,
            0.0 if norm is None else norm.eps,
            1.0 if norm is None else norm.multiplier,
            *self._arguments,
            biases=self._step_biases,
            gated=gated,
            out=out,
            scratch=scratch,
        )


class Projection:
    """Products that share an input; their results lie side by side."""

    __slots__ = ("products",)

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = tuple(products)

    @property
    def tiled(self) -> TiledLinears | None:
        """The one product that the whole projection is, where all of it is one stream of tiles."""
        first, *others = self.products
        return first if isinstance(first, TiledLinears) and not others else None

    def multiply(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """[tokens, columns] → out [tokens, sum of rows]."""
        first = 0
        for product in self.products:
            product.multiply(x, out[:, first : first + product.rows], scratch)
            first += product.rows

    def part(self, first: int, end: int) -> Product:
        """The product with rows first … end - 1, all of one linear."""
        for product in self.products:
            if first < product.rows:
                return product.part(first, end)
            first, end = first - product.rows, end - product.rows
        raise ValueError(f"row {first} is behind the last")


def fused(linears: Sequence[Linear]) -> tuple[Linear, ...]:
    """One linear in place of unquantized ones whose weights are neighbours in memory."""
    first, *rest = linears
    weights = [linear.parts["weight"] for linear in linears]
    biases = [linear.bias for linear in linears]
    if not rest or not weights[0].is_floating_point():
        return tuple(linears)
    if any(
        tuple(linear.parts) != ("weight",) or linear.handler != first.handler for linear in linears
    ):
        return tuple(linears)
    if any(linear.handler != first.handler for linear in rest):
        return tuple(linears)
    if any(bias is not None for bias in biases) and not _neighbours(biases):
        return tuple(linears)
    if not _neighbours(weights):
        return tuple(linears)
    rows, columns = sum(linear.rows for linear in linears), first.shape[1]
    whole = replace(
        first,
        parts={"weight": _extended(weights[0], rows * columns)},
        shape=(rows, columns),
        bias=None if biases[0] is None else _extended(biases[0], rows),
    )
    return (whole,)


def _placed_biases(
    weights: TiledSet, biases: Sequence[torch.Tensor | None]
) -> tuple[tuple[int, int, torch.Tensor], ...]:
    """Biases and where they go: one addition for all where they are neighbours in memory."""
    if biases[0] is not None and _neighbours(biases):
        return ((0, weights.rows, _extended(biases[0], weights.rows)),)
    first, found = 0, []
    for segment, bias in zip(weights.segments, biases, strict=True):
        if bias is not None:
            found.append((first, first + segment.rows, bias))
        first += segment.rows
    return tuple(found)


def _neighbours(tensors: Sequence[torch.Tensor | None]) -> bool:
    if any(tensor is None for tensor in tensors):
        return False
    known = [tensor for tensor in tensors if tensor is not None]
    return all(
        one.data_ptr() + one.nbytes == following.data_ptr() for one, following in pairwise(known)
    )


def _extended(tensor: torch.Tensor, numel: int) -> torch.Tensor:
    """A view of the same memory that goes on beyond the tensor's end."""
    return tensor.as_strided((numel,), (1,))
