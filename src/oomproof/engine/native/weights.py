"""A device's weights: views of one arena, in the plan's formats, and the targets that fill them.

What a layer holds is laid out once, as offsets; a view of them on any memory is a layer. So a layer
that is streamed from host memory is the same offsets on a buffer that its bytes travel to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import gcd

import torch

from oomproof.formats import DType
from oomproof.loading.targets import Target
from oomproof.memory.arena import ALIGNMENT_BYTES
from oomproof.memory.weights import StoredTensor
from oomproof.models.spec import Role, TensorSpec
from oomproof.quantization.handlers import Handler, handler
from oomproof.units import round_up

_BLOCK_ELEMENTS = 128
"""Slices of a 4-bit weight begin at whole blocks and whole bytes: multiples of this."""
_PLAIN = {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16", DType.FLOAT32: "fp32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A parameter and where its tensors lie, in bytes from the beginning of its block."""

    spec: TensorSpec
    held: StoredTensor
    format: str
    """Of its weight: the plan's format, or the compute dtype's where it is not quantized."""
    offsets: tuple[int, ...]
    """One for each of held.components."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Parameters that lie together: a layer, or the embedding, or norm and head."""

    placed: tuple[Placed, ...]
    size_bytes: int


def lay_out_block(tensors: Iterable[tuple[TensorSpec, StoredTensor]], format_name: str) -> Block:
    """Weights one after the other, then what is small: neighbours can be multiplied as one."""
    ordered = sorted(tensors, key=lambda pair: pair[0].role is not Role.LINEAR)
    placed, offset = [], 0
    for spec, held in ordered:
        offsets = []
        for component in held.components:
            offsets.append(offset)
            offset += round_up(component.size_bytes, ALIGNMENT_BYTES)
        own_format = format_name if held.quantized else _PLAIN[held.dtype]
        placed.append(Placed(spec=spec, held=held, format=own_format, offsets=tuple(offsets)))
    return Block(placed=tuple(placed), size_bytes=offset)


class Parameter:
    """One parameter in its final place."""

    __slots__ = ("handler", "parts", "placed", "shape")

    def __init__(self, placed: Placed, memory: torch.Tensor) -> None:
        self.placed = placed
        self.handler: Handler = handler(placed.format)
        self.shape = placed.spec.shape
        self.parts: dict[str, torch.Tensor] = {}
        for component, offset in zip(placed.held.components, placed.offsets, strict=True):
            dtype: torch.dtype = getattr(torch, component.dtype)
            raw = memory[offset : offset + component.size_bytes]
            self.parts[component.name] = raw.view(dtype)

    @property
    def tensor(self) -> torch.Tensor:
        """The parameter itself, where it is not quantized."""
        return self.parts["weight"].view(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[rows, columns]."""
        rows, columns = self.shape
        return rows, columns

    def target(
        self,
        workspace: torch.Tensor,
        copy_to: Mapping[str, torch.Tensor] | None = None,
        *,
        made_up: bool = False,
    ) -> Target:
        """Where the loader brings it.

        Args:
            workspace: float32, what quantizing needs beside the parts, shared by all parameters.
            copy_to: Host memory that the finished parts are copied to; None where they stay.
            made_up: Whether no file has it: then it is made on the device, wherever it goes.
        """
        spec = self.placed.spec
        if not self.placed.held.quantized:
            final = self.tensor
            if copy_to is not None:
                final = copy_to["weight"].view(self.shape)
            return Target(
                name=spec.name,
                shape=self.shape,
                device=self.parts["weight"].device,
                store=partial(_store_plain, final),
                place=None if made_up and copy_to is not None else final,
            )
        shape = self.matrix_shape
        rows_multiple = (
            _BLOCK_ELEMENTS // gcd(_BLOCK_ELEMENTS, shape[1])
            if self.placed.held.dtype is DType.UINT8
            else 1
        )

        def store(source: torch.Tensor, first_row: int) -> None:
            self.handler.encode_slice(source, self.parts, first_row, shape, workspace)

        def finish() -> None:
            self.handler.finish(self.parts, shape, workspace)
            for name, part in self.parts.items() if copy_to is not None else ():
                copy_to[name].copy_(part, non_blocking=True)  # type: ignore[index]

        return Target(
            name=spec.name,
            shape=self.shape,
            device=self.parts["weight"].device,
            store=store,
            finish=finish,
            rows_multiple=rows_multiple,
        )


def _store_plain(final: torch.Tensor, values: torch.Tensor, first_row: int) -> None:
    if not final.dim():
        final.copy_(values)
        return
    final[first_row : first_row + len(values)].copy_(values, non_blocking=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A product with a weight in its format, or with several neighbours at once."""

    handler: Handler
    parts: Mapping[str, torch.Tensor]
    shape: tuple[int, int]
    """[rows, columns]."""
    bias: torch.Tensor | None

    @classmethod
    def of(cls, weight: Parameter, bias: Parameter | None) -> Linear:
        """The product with a parameter."""
        return cls(
            handler=weight.handler,
            parts=weight.parts,
            shape=weight.matrix_shape,
            bias=None if bias is None else bias.tensor,
        )

    def multiply(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """[tokens, columns] → out [tokens, rows]."""
        self.handler.multiply(x, self.parts, self.shape, out, scratch)
        if self.bias is not None:
            out.add_(self.bias)


class Projection:
    """Linears that share an input; their results lie side by side."""

    __slots__ = ("linears",)

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = _fused(linears)

    def multiply(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """[tokens, columns] → out [tokens, sum of rows]."""
        first = 0
        for linear in self.linears:
            rows, _ = linear.shape
            linear.multiply(x, out[:, first : first + rows], scratch)
            first += rows


def _fused(linears: Sequence[Linear]) -> tuple[Linear, ...]:
    """One linear in place of unquantized ones whose weights are neighbours in memory."""
    first, *rest = linears
    weights = [linear.parts["weight"] for linear in linears]
    biases = [linear.bias for linear in linears]
    if not rest or tuple(first.parts) != ("weight",) or not weights[0].is_floating_point():
        return tuple(linears)
    if any(bias is not None for bias in biases) and not _neighbours(biases):
        return tuple(linears)
    if not _neighbours(weights):
        return tuple(linears)
    rows, columns = sum(linear.shape[0] for linear in linears), first.shape[1]
    whole = replace(
        first,
        parts={"weight": _extended(weights[0], rows * columns)},
        shape=(rows, columns),
        bias=None if biases[0] is None else _extended(biases[0], rows),
    )
    return (whole,)


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


class LayerWeights:
    """The parameters of one decoder layer, by what they are for."""

    __slots__ = ("down", "gate_up", "input_norm", "k_norm", "o", "post_norm", "q_norm", "qkv")

    def __init__(self, block: Block, memory: torch.Tensor) -> None:
        found = {
            placed.spec.name.split(".layers.", 1)[1].split(".", 1)[1]: Parameter(placed, memory)
            for placed in block.placed
        }

        def linear(name: str) -> Linear:
            return Linear.of(found[f"{name}.weight"], found.get(f"{name}.bias"))

        def norm(name: str) -> torch.Tensor | None:
            return found[name].tensor if name in found else None

        self.qkv = Projection([linear(f"self_attn.{name}_proj") for name in "qkv"])
        self.o = linear("self_attn.o_proj")
        self.gate_up = Projection([linear("mlp.gate_proj"), linear("mlp.up_proj")])
        self.down = linear("mlp.down_proj")
        self.input_norm = found["input_layernorm.weight"].tensor
        self.post_norm = found["post_attention_layernorm.weight"].tensor
        self.q_norm = norm("self_attn.q_norm.weight")
        self.k_norm = norm("self_attn.k_norm.weight")
