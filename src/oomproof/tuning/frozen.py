"""The frozen model: weights in their format, as the engine lays them out, and their loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from oomproof.engine.native.layout import Block, Held, lay_out_block, name_in_layer
from oomproof.engine.native.linears import Linear, Projection, TiledLinears
from oomproof.engine.native.weights import Parameter, projection
from oomproof.errors import NotRunnableError
from oomproof.formats import DType, get_format
from oomproof.loading.targets import LoadProgress, LoadReport
from oomproof.memory.model import unit_of
from oomproof.memory.sharding import cut_layers
from oomproof.memory.training import input_norms_bytes
from oomproof.memory.training_buffers import SLICE_ROWS
from oomproof.memory.training_shape import PROJECTIONS
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec, Role
from oomproof.quantization.handlers import Int4, Plain, Table4bit, handler
from oomproof.quantization.tiled import TiledSet
from oomproof.tuning.distributed import ALONE, Ranks
from oomproof.tuning.filling import fill_frozen
from oomproof.tuning.sharded import ShardedLayers

if TYPE_CHECKING:
    from oomproof.kernels.module import Launch


class FrozenWeight:
    """The weights of a projection, which become 16 bits when they are multiplied.

    Args:
        product: Where they lie.
        columns: Of all of them.
        dtype: That they are computed in.
    """

    def __init__(self, product: Projection, columns: int, dtype: torch.dtype) -> None:
        self._product = product
        self.columns = columns
        self.rows = sum(part.rows for part in product.products)
        self.plain = _plain(product, dtype)
        """(first row, end, those rows), where all are in the compute dtype already; else none."""
        self._launches: dict[tuple[int, int, int], list[Launch]] = {}
        """(first row, end, address that they go to) → what writes them, where that is known."""
        self._bias_of: list[tuple[int, int, torch.Tensor]] = []
        begin = 0
        for part in product.products:
            if isinstance(part, TiledLinears):
                self._bias_of += [(begin + a, begin + b, bias) for a, b, bias in part.biases]
            elif isinstance(part, Linear) and part.bias is not None:
                self._bias_of.append((begin, begin + part.rows, part.bias))
            begin += part.rows

    def add_biases(self, out: torch.Tensor, multiplier: float) -> None:
        """Adds the biases that there are to a product [tokens, rows]."""
        for first, end, bias in self._bias_of:
            out[:, first:end].add_(bias, alpha=multiplier)

    def write(self, first: int, end: int, into: torch.Tensor) -> None:
        """Rows first … end - 1 to [end - first, columns], contiguous, on the current device."""
        key = first, end, into.data_ptr()
        launches = self._launches.get(key)
        if launches is None and into.is_cuda:
            launches = self._launches[key] = self._prepared(first, end, into)
        if launches:
            stream = torch.cuda.current_stream(into.device).cuda_stream
            for launch in launches:
                launch.put_on(stream)
            return
        begin = 0
        for part in self._product.products:
            inner, outer = max(first, begin), min(end, begin + part.rows)
            if inner < outer:
                rows = into[inner - first : outer - first]
                if isinstance(part, TiledLinears):
                    _write_tiles(part.weights, inner - begin, outer - begin, rows)
                else:
                    assert isinstance(part, Linear)
                    _write_linear(part, inner - begin, outer - begin, rows)
            begin += part.rows

    def _prepared(self, first: int, end: int, into: torch.Tensor) -> list[Launch]:
        """What writes these rows there, which holds no tensor; nothing where that takes others."""
        from oomproof.quantization.dequantize_cuda import prepared_tiles, supports_rows

        found: list[Launch] = []
        begin = 0
        for part in self._product.products:
            inner, outer = max(first, begin), min(end, begin + part.rows)
            if inner < outer:
                if not isinstance(part, TiledLinears):
                    return []
                for segment, a, b, place in part.weights.pieces(inner - begin, outer - begin):
                    rows = into[inner - first + place :][: b - a]
                    if not supports_rows(rows, a):
                        return []
                    found.append(prepared_tiles(part.weights, segment, a, rows))
            begin += part.rows
        return found


def _plain(product: Projection, dtype: torch.dtype) -> list[tuple[int, int, torch.Tensor]]:
    found: list[tuple[int, int, torch.Tensor]] = []
    first = 0
    for part in product.products:
        if not isinstance(part, Linear) or not isinstance(part.handler, Plain):
            return []
        weight = part.parts["weight"].view(part.shape)
        if weight.dtype is not dtype:
            return []
        found.append((first, first + part.rows, weight))
        first += part.rows
    return found


def _write_tiles(weights: TiledSet, first: int, end: int, into: torch.Tensor) -> None:
    from oomproof.quantization.dequantize_cuda import dequantize_tiles, supports_rows
    from oomproof.quantization.tiles_triton import dequantize_tiled

    with torch.cuda.device(into.device):
        for segment, a, b, place in weights.pieces(first, end):
            part = into[place : place + b - a]
            write = dequantize_tiles if supports_rows(part, a) else dequantize_tiled
            write(weights, segment, a, part)


def _write_linear(linear: Linear, first: int, end: int, into: torch.Tensor) -> None:
    held_as, parts = linear.handler, linear.parts
    if not into.is_cuda or isinstance(held_as, Plain):
        into.copy_(held_as.decode(parts, linear.shape, into.dtype)[first:end])
        return
    from oomproof.quantization.dequantize_triton import FourBits, dequantize_4bit

    nested = None
    if "nested_absmax" in parts:
        offset = parts["nested_offset"].view(())
        nested = (parts["nested_absmax"], parts["nested_quant_map"], offset)
    weight = FourBits(
        codes=parts["weight"].view(-1),
        scales=parts["scale" if "scale" in parts else "absmax"],
        table=parts.get("quant_map"),
        nested=nested,
        block_size=held_as.block_size if isinstance(held_as, Table4bit) else 64,
    )
    with torch.cuda.device(into.device):
        dequantize_4bit(weight, first, into)


class Scratch:
    """Where weights become 16 bits, and stay until the next of them do.

    Args:
        memory: uint8, contiguous.
        dtype: That they are computed in.
    """

    def __init__(self, memory: torch.Tensor, dtype: torch.dtype) -> None:
        self._memory = memory.view(dtype) if memory.numel() else memory.new_empty(0, dtype=dtype)
        self._holds: FrozenWeight | None = None
        self._whole: dict[tuple[int, int], torch.Tensor] = {}
        """Shape → the memory in that shape."""

    def slices(self, weight: FrozenWeight) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, end, those rows) one after the other; each is lost with the next."""
        if weight.plain:
            yield from weight.plain
            return
        fit = self._memory.numel() // weight.columns
        if fit >= weight.rows:
            shape = weight.rows, weight.columns
            if shape not in self._whole:
                self._whole[shape] = self._memory[: weight.rows * weight.columns].view(shape)
            whole = self._whole[shape]
            if self._holds is not weight:
                weight.write(0, weight.rows, whole)
                self._holds = weight
            yield 0, weight.rows, whole
            return
        self._holds = None
        step = fit // SLICE_ROWS * SLICE_ROWS
        for first in range(0, weight.rows, step):
            end = min(first + step, weight.rows)
            part = self._memory[: (end - first) * weight.columns].view(-1, weight.columns)
            weight.write(first, end, part)
            yield first, end, part


class FrozenLayer:
    """The weights of one decoder layer."""

    __slots__ = ("input_norm", "k_norm", "post_norm", "projections", "q_norm")

    def __init__(self, block: Block, memory: torch.Tensor, dtype: torch.dtype) -> None:
        found = {name_in_layer(placed.spec): Parameter(placed, memory) for placed in block.placed}

        def norm(name: str) -> torch.Tensor | None:
            return found[name].tensor if name in found else None

        self.projections = {
            kind: FrozenWeight(
                projection(
                    [found[f"{name}.weight"] for name in names],
                    [found.get(f"{name}.bias") for name in names],
                ),
                found[f"{names[0]}.weight"].shape[1],
                dtype,
            )
            for kind, names in PROJECTIONS.items()
        }
        self.input_norm = found["input_layernorm.weight"].tensor
        self.post_norm = found["post_attention_layernorm.weight"].tensor
        self.q_norm = norm("self_attn.q_norm.weight")
        self.k_norm = norm("self_attn.k_norm.weight")


class FrozenModel:
    """All weights of a model on one device, in one allocation; or, sharded, a rank's part of them.

    Args:
        spec: The model.
        format_name: Of its linears.
        dtype: Of all else.
        device: Where it lives.
        ranks: The processes that train it together.
        sharded: Whether each of them holds a part of every layer; what is no layer is whole.

    Raises:
        NotRunnableError: The decoder is none that is trained here, or the format.
    """

    def __init__(
        self,
        spec: ModelSpec,
        format_name: str,
        dtype: DType,
        device: torch.device,
        *,
        ranks: Ranks = ALONE,
        sharded: bool = False,
    ) -> None:
        check_trainable(spec, format_name)
        self._spec, self.ranks = spec, ranks
        weight_format, roles = get_format(format_name), frozenset({Role.LINEAR})
        units: list[list[Held]] = [[] for _ in range(spec.num_hidden_layers + 2)]
        for tensor in spec.tensors:
            held = stored(tensor, weight_format, dtype, roles)
            units[unit_of(tensor, spec)].append((tensor, held))
        tiled = device.type == "cuda"
        blocks = [lay_out_block(unit, format_name, tiled=tiled) for unit in units]
        first, *layers, last = [block.size_bytes for block in blocks]
        cut = cut_layers(layers, ranks.size) if sharded and ranks.size > 1 else None
        of_layers = sum(layers) if cut is None else cut.parts_bytes + cut.buffers_bytes
        of_norms = 0 if cut is None else input_norms_bytes(spec, dtype)
        sizes = [first, of_layers, last, of_norms]
        self.memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        start, middle, end, norms = self.memory.split(sizes)
        self.sharded = None if cut is None else ShardedLayers(middle, cut, ranks)
        """None where all layers are here."""
        places = list(middle.split(layers)) if cut is None else []
        if self.sharded is not None:
            places = [self.sharded.place(number) for number in range(len(layers))]
        places = [start, *places, end]
        self._units = [
            [Parameter(placed, place) for placed in block.placed]
            for block, place in zip(blocks, places, strict=True)
        ]
        compute: torch.dtype = getattr(torch, dtype.value)
        self.layers = [
            FrozenLayer(block, place, compute)
            for block, place in zip(blocks[1:-1], places[1:-1], strict=True)
        ]
        """Views of where a layer's weights are while it is taken."""
        self.input_norms = [layer.input_norm for layer in self.layers]
        """Of each layer; sharded they are whole, since one is needed before its layer has come."""
        if self.sharded is not None:
            self.input_norms = list(norms.view(compute).view(len(self.layers), -1))
        ends = {
            parameter.placed.spec.role: parameter.tensor
            for unit in (self._units[0], self._units[-1])
            for parameter in unit
        }
        self.embedding = ends[Role.EMBEDDING]
        self.final_norm = ends[Role.NORM]
        self.head = ends[Role.EMBEDDING if spec.tie_word_embeddings else Role.HEAD]

    def take(self, layer: int, following: int | None) -> FrozenLayer:
        """A layer, whose weights are there for what is launched until the next one is taken.

        Args:
            layer: Its index.
            following: The one that is taken next, a neighbour; None for none.
        """
        if self.sharded is not None:
            self.sharded.take(layer, following)
        return self.layers[layer]

    def load(
        self, folder: Path | None, *, seed: int, progress: LoadProgress | None = None
    ) -> LoadReport:
        """Brings the weights of a checkpoint, or random ones where there is no folder.

        See tuning.filling.fill_frozen.
        """
        report = fill_frozen(
            self._spec,
            self._units,
            folder,
            device=self.memory.device,
            seed=seed,
            progress=progress,
            sharded=self.sharded,
        )
        if self.sharded is not None:
            for number, norm in enumerate(self.input_norms):
                norm.copy_(self.take(number, None).input_norm)
        return report


def check_trainable(spec: ModelSpec, format_name: str) -> None:
    """Whether a model is trained here, in a format.

    Raises:
        NotRunnableError: It is not, and why.
    """
    problem = None
    if spec.forward is None:
        problem = spec.not_native or "the native engine has no decoder of this family yet"
    elif spec.num_experts or any(tensor.role is Role.EXPERTS for tensor in spec.tensors):
        problem = "experts are not trained here"
    elif spec.eager_attention or any(one.is_latent for one in spec.attention):
        problem = "its attention has no gradient here"
    elif len({(one.num_key_value_heads, one.key_head_dim) for one in spec.attention}) > 1:
        problem = "its layers differ in their heads"
    if problem is not None:
        raise NotRunnableError(
            f"{spec.id} cannot be trained: {problem}", remedy="train it with transformers and peft"
        )
    for name in get_format(format_name).members:
        if not isinstance(handler(name), Plain | Int4 | Table4bit):
            raise NotRunnableError(
                f"{name} weights have no gradient here",
                remedy="use nf4-dq, nf4, fp4-dq, fp4, int4 or bf16",
            )
