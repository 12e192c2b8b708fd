"""A device's weights: views of one arena, in the plan's formats, and the targets that fill them.

What a layer holds is laid out once (layout.py), as offsets; a view of them on any memory is a
layer. So a layer that is streamed from host memory is the same offsets on a buffer that its bytes
travel to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd

import torch

from oomproof.engine.native.layout import GATE_UP, QKV, Block, Placed, name_in_layer
from oomproof.engine.native.linears import Chain, Linear, Projection, TiledLinears, fused
from oomproof.formats import DType
from oomproof.loading.targets import Target
from oomproof.memory.slices import up_rows
from oomproof.quantization.handlers import Handler, handler
from oomproof.quantization.tiled import Nested, Segment, TiledSet
from oomproof.quantization.tiled_writer import CODES, SCALES, TILED_COMPONENTS, TiledWriter
from oomproof.quantization.tiles import TILE_ROWS, tiles_of

_BLOCK_ELEMENTS = 128
"""Slices of a 4-bit weight begin at whole blocks and whole bytes: multiples of this."""


class Parameter:
    """One parameter in its final place."""

    __slots__ = ("handler", "parts", "placed", "shape")

    def __init__(self, placed: Placed, memory: torch.Tensor) -> None:
        self.placed = placed
        self.handler: Handler = handler(placed.format)
        self.shape = placed.spec.shape
        self.parts: dict[str, torch.Tensor] = {}
        """Flat; what is in tiles is [tiles, elements of a tile], each tile contiguous."""
        tiling, tiles = placed.tiling, self.shape[0] // TILE_ROWS if placed.tiling else 1
        for component, offset in zip(placed.held.components, placed.offsets, strict=True):
            dtype: torch.dtype = getattr(torch, component.dtype)
            if tiling is None or component.name not in TILED_COMPONENTS:
                raw = memory[offset : offset + component.size_bytes]
                self.parts[component.name] = raw.view(dtype)
                continue
            tile_bytes = component.size_bytes // tiles
            turns = (tiles - 1) * tiling.tile_stride + 1
            raw = memory[offset : offset + turns * tile_bytes].view(dtype)
            self.parts[component.name] = tiles_of(
                raw, tile_bytes // dtype.itemsize, tiles, stride=tiling.tile_stride
            )

    @property
    def tensor(self) -> torch.Tensor:
        """The parameter itself, where it is not quantized."""
        return self.parts["weight"].view(self.shape)

    def target(
        self,
        workspace: torch.Tensor,
        copy_to: Mapping[str, torch.Tensor] | None = None,
        *,
        made_up: bool = False,
        search: bool = False,
    ) -> Target:
        """Where the loader brings it.

        Args:
            workspace: float32, what quantizing needs beside the parts, shared by all parameters.
            copy_to: Host memory that the finished parts are copied to; None where they stay.
            made_up: Whether no file has it: then it is made on the device, wherever it goes.
            search: Whether block scales are searched.
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
        shape = self.placed.matrix_shape
        writes = handler(self.placed.format, search=search)

        if self.placed.tiling is not None:
            writer = TiledWriter(writes, self.parts, shape, workspace)
            store, finish, rows_multiple = writer.encode_slice, writer.finish, TILE_ROWS
        else:
            store = partial(self._store, writes, workspace)
            finish = partial(writes.finish, self.parts, shape, workspace)
            is_4bit = self.placed.held.dtype is DType.UINT8
            rows_multiple = _BLOCK_ELEMENTS // gcd(_BLOCK_ELEMENTS, shape[1]) if is_4bit else 1

        def finish_and_copy() -> None:
            finish()
            for name, part in self.parts.items() if copy_to is not None else ():
                copy_part(part, copy_to[name])  # type: ignore[index]

        return Target(
            name=spec.name,
            shape=self.shape,
            device=self.parts["weight"].device,
            store=store,
            finish=finish_and_copy,
            rows_multiple=rows_multiple,
        )

    def _store(
        self, writes: Handler, workspace: torch.Tensor, source: torch.Tensor, first_row: int
    ) -> None:
        writes.encode_slice(source, self.parts, first_row, self.placed.matrix_shape, workspace)


def _store_plain(final: torch.Tensor, values: torch.Tensor, first_row: int) -> None:
    if not final.dim():
        final.copy_(values)
        return
    final[first_row : first_row + len(values)].copy_(values, non_blocking=True)


def copy_part(part: torch.Tensor, home: torch.Tensor) -> None:
    """To page-locked memory of the same shape and strides."""
    if part.is_contiguous() or not part.is_cuda:
        home.copy_(part, non_blocking=True)
        return
    from oomproof.quantization.tiles_triton import copy_tiles

    copy_tiles(part, home)


def projection(weights: Sequence[Parameter], biases: Sequence[Parameter | None]) -> Projection:
    """The product of an input with weights, with as few kernels as the places allow."""
    added = [None if bias is None else bias.tensor for bias in biases]
    first = weights[0].placed.tiling
    rows = sum(weight.shape[0] for weight in weights)
    if first is not None and first.tiles * TILE_ROWS == rows:
        return Projection([TiledLinears(tiled_set(weights), added)])
    if all(weight.placed.tiling is None for weight in weights):
        return Projection(fused(list(map(_linear, weights, added))))
    return Projection(
        [
            _linear(weight, bias)
            if weight.placed.tiling is None
            else TiledLinears(tiled_set([weight]), [bias])
            for weight, bias in zip(weights, added, strict=True)
        ]
    )


def tiled_set(weights: Sequence[Parameter]) -> TiledSet:
    """All linears of one stream, in its order."""
    scales = next(name for name in weights[0].parts if name in SCALES)
    return TiledSet(
        codes=_stream(weights[0], CODES),
        scales=_stream(weights[0], scales),
        quant_map=weights[0].parts.get("quant_map"),
        codebook=weights[0].placed.format.removesuffix("-dq"),
        segments=tuple(_segment(weight) for weight in weights),
    )


def _stream(first: Parameter, name: str) -> torch.Tensor:
    """The tiles of a stream whose first linear it is: [tiles, elements of a tile]."""
    tiling = first.placed.tiling
    assert tiling is not None
    assert tiling.first_tile == 0
    part = first.parts[name]
    return part.as_strided((tiling.tiles, part.shape[1]), (part.shape[1], 1))


def _segment(weight: Parameter) -> Segment:
    tiling, parts = weight.placed.tiling, weight.parts
    assert tiling is not None
    nested: Nested | None = None
    if "nested_absmax" in parts:
        offset = parts["nested_offset"].view(())
        nested = (parts["nested_absmax"], parts["nested_quant_map"], offset)
    return Segment(
        rows=weight.shape[0],
        first_tile=tiling.first_tile,
        tile_stride=tiling.tile_stride,
        nested=nested,
    )


def _linear(weight: Parameter, bias: torch.Tensor | None) -> Linear:
    shape = weight.placed.matrix_shape
    return Linear(handler=weight.handler, parts=weight.parts, shape=shape, bias=bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProducts:
    """A layer's products as decode steps compute them, fused with what lies between."""

    qkv: TiledLinears
    o: TiledLinears
    gate_up: TiledLinears
    down: TiledLinears

    def chains(self, tokens: int, chain: Chain) -> bool:
        """Whether all of them are computed as parts of a chain."""
        products = (self.qkv, self.o, self.gate_up, self.down)
        return all(product.chains(tokens, chain) for product in products)


class LayerWeights:
    """The parameters of one decoder layer, by what they are for."""

    __slots__ = (
        "down",
        "gate",
        "gate_up",
        "input_norm",
        "k_norm",
        "o",
        "post_norm",
        "q_norm",
        "qkv",
        "step",
        "up",
    )

    def __init__(self, block: Block, memory: torch.Tensor) -> None:
        found = {name_in_layer(placed.spec): Parameter(placed, memory) for placed in block.placed}

        def linears(*names: str) -> Projection:
            return projection(
                [found[f"{name}.weight"] for name in names],
                [found.get(f"{name}.bias") for name in names],
            )

        def norm(name: str) -> torch.Tensor | None:
            return found[name].tensor if name in found else None

        self.qkv = linears(*QKV)
        self.o = linears("self_attn.o_proj")
        self.gate_up = linears(*GATE_UP)
        width, hidden = found[f"{GATE_UP[1]}.weight"].shape
        step = up_rows(hidden, width)
        self.gate = self.gate_up.part(0, width)
        """The first half of gate_up."""
        self.up = tuple(
            self.gate_up.part(width + first, width + min(first + step, width))
            for first in range(0, width, step)
        )
        """The other, in slices whose result waits for its gate."""
        self.down = linears("mlp.down_proj")
        self.input_norm = found["input_layernorm.weight"].tensor
        self.post_norm = found["post_attention_layernorm.weight"].tensor
        self.q_norm = norm("self_attn.q_norm.weight")
        self.k_norm = norm("self_attn.k_norm.weight")
        self.step = self._step_products()
        """None where a product is not one stream of tiles, or the type has no kernel."""

    def _step_products(self) -> StepProducts | None:
        tiled = [part.tiled for part in (self.qkv, self.o, self.gate_up, self.down)]
        found = [part for part in tiled if part is not None and part.has_step]
        in_16_bits = self.input_norm.dtype in {torch.bfloat16, torch.float16}
        if len(found) < len(tiled) or not (self.input_norm.is_cuda and in_16_bits):
            return None
        qkv, o, gate_up, down = found
        return StepProducts(qkv=qkv, o=o, gate_up=gate_up, down=down)
