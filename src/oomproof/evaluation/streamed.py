"""A model's weights, one unit at a time: read once, then quantized into each format in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from oomproof.engine.native.layout import Block, lay_out_block, name_in_layer
from oomproof.engine.native.load import refuse_another_head
from oomproof.engine.native.weights import LayerWeights, Parameter
from oomproof.errors import CheckpointError
from oomproof.evaluation.levels import HistogramCounter
from oomproof.evaluation.needs import (
    absmax_numel,
    block_bytes,
    slice_rows,
    source_bytes,
    unit_tensors,
)
from oomproof.evaluation.variants import Variant
from oomproof.formats import DType
from oomproof.loading.pipeline import load_checkpoint
from oomproof.loading.targets import Target, is_computed_buffer
from oomproof.memory.arena import ALIGNMENT_BYTES
from oomproof.memory.profiles import EngineProfile
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec, Role, TensorSpec
from oomproof.quantization.rows import parts_of_rows
from oomproof.units import round_up


class StreamedWeights:
    """One unit in one format, in memory that is allocated once.

    Args:
        spec: The model, with the headers of its checkpoint.
        folder: Where its files are.
        variants: All that will be asked for.
        compute_dtype: Of what is not quantized.
        device: Where everything is.
        profile: Of the native engine there.
    """

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        variants: Sequence[Variant],
        compute_dtype: DType,
        device: torch.device,
        profile: EngineProfile,
    ) -> None:
        if spec.checkpoint is None:
            raise CheckpointError(str(folder), "holds no safetensors files")
        self._spec, self._folder, self._profile = spec, folder, profile
        self._checkpoint = spec.checkpoint
        self._dtypes = {tensor.name: tensor.dtype for tensor in self._checkpoint.tensors}
        self._compute_dtype = compute_dtype
        self._units = unit_tensors(spec)
        self._known = {tensor.name for tensor in spec.tensors}
        if spec.tie_word_embeddings:
            refuse_another_head(folder, spec.checkpoint)
            self._known.add("lm_head.weight")
        sizes = [source_bytes(spec, unit) for unit in self._units]
        self._source_memory = torch.empty(max(sizes), dtype=torch.uint8, device=device)
        block = block_bytes(spec, variants, compute_dtype, profile)
        self._memory = torch.empty(block, dtype=torch.uint8, device=device)
        absmax = absmax_numel(spec, variants, profile)
        self._workspace = torch.empty(absmax, dtype=torch.float32, device=device)
        self._sources: dict[str, torch.Tensor] = {}
        self._device = device
        self.unit_bytes = tuple(sizes)
        """Of each unit, in the order in which they are read."""

    def read(self, unit: int) -> None:
        """Brings a unit's tensors as the checkpoint has them, in place of the last one's.

        Raises:
            CheckpointError, LoadError: As load_checkpoint.
        """
        # What is computed still may read what the loader's own streams will write, and after it.
        self._wait()
        self._sources = {}
        offset = 0
        targets = []
        for tensor in self._units[unit]:
            dtype: torch.dtype = getattr(torch, self._dtypes.get(tensor.name, self._spec.dtype))
            size = tensor.numel * dtype.itemsize
            place = self._source_memory[offset : offset + size].view(dtype).view(tensor.shape)
            offset += round_up(size, ALIGNMENT_BYTES)
            self._sources[tensor.name] = place
            targets.append(
                Target(
                    name=tensor.name,
                    shape=tensor.shape,
                    device=self._device,
                    store=_never,
                    place=place,
                )
            )
        load_checkpoint(
            self._folder,
            self._checkpoint,
            targets,
            ignored=lambda name: name in self._known or is_computed_buffer(name),
        )
        self._wait()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def plain(self, unit: int, role: Role) -> torch.Tensor:
        """A tensor of the unit that was read, in the compute dtype."""
        found = next(tensor for tensor in self._units[unit] if tensor.role is role)
        dtype: torch.dtype = getattr(torch, self._compute_dtype)
        begin = 0
        for tensor in self._units[unit]:
            size = tensor.numel * dtype.itemsize
            if tensor is found:
                place = self._memory[begin : begin + size].view(dtype).view(tensor.shape)
                return place.copy_(self._sources[tensor.name])
            begin += round_up(size, ALIGNMENT_BYTES)
        raise AssertionError("unreachable")

    def layer(self, unit: int, variant: Variant) -> tuple[LayerWeights, Block]:
        """The layer that was read, as a variant, in place of the last one."""
        held = [
            (tensor, stored(tensor, variant.format, self._compute_dtype, self._roles))
            for tensor in self._units[unit]
        ]
        block = lay_out_block(held, variant.format.name)
        for placed in block.placed:
            self._fill(Parameter(placed, self._memory), search=variant.search)
        return LayerWeights(block, self._memory), block

    def tensors(self, unit: int, variant: Variant) -> dict[str, torch.Tensor]:
        """Name in its layer → parameter, of a variant that quantizes nothing."""
        _, block = self.layer(unit, variant)
        return {name_in_layer(p.spec): Parameter(p, self._memory).tensor for p in block.placed}

    @property
    def _roles(self) -> frozenset[Role]:
        return self._profile.quantized_roles

    def _fill(self, parameter: Parameter, *, search: bool) -> None:
        source = self._sources[parameter.placed.spec.name]
        target = parameter.target(self._workspace, search=search)
        if target.place is not None:
            target.place.copy_(source)
            return
        for first, end in _slices(source):
            target.store(source[first:end], first)
        if target.finish is not None:
            target.finish()

    def errors(
        self, block: Block, memory: torch.Tensor | None = None
    ) -> Mapping[str, tuple[float, float]]:
        """Linear → (squared error, squared weights) of the layer as it was filled last.

        Args:
            block: The layer's.
            memory: Where it is, if not here.
        """
        found: dict[str, torch.Tensor] = {}
        for placed in block.placed:
            if not placed.held.quantized:
                continue
            parameter = Parameter(placed, self._memory if memory is None else memory)
            shape = placed.matrix_shape
            sums = torch.zeros(2, dtype=torch.float64, device=self._device)
            for first, end, source in self._linear_slices(placed.spec):
                parts = parts_of_rows(parameter.parts, shape, first, end)
                there = parameter.handler.decode(parts, (end - first, shape[1]), torch.float32)
                sums[1] += source.square().sum()
                sums[0] += there.sub_(source).square_().sum()
            found[name_in_layer(placed.spec).removesuffix(".weight")] = sums
        return {name: (float(sums[0]), float(sums[1])) for name, sums in found.items()}

    def count(self, unit: int, counter: HistogramCounter) -> None:
        """Adds the linears of the layer that was read to a histogram."""
        for tensor in self._units[unit]:
            if tensor.role in self._roles and len(tensor.shape) == 2:
                for _, _, source in self._linear_slices(tensor):
                    counter.add(source)

    def _linear_slices(self, spec: TensorSpec) -> Iterator[tuple[int, int, torch.Tensor]]:
        source = self._sources[spec.name]
        for first, end in _slices(source):
            yield first, end, source[first:end].float()


def _slices(source: torch.Tensor) -> Iterator[tuple[int, int]]:
    rows, columns = source.shape
    step = slice_rows(columns)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _never(_source: torch.Tensor, _first_row: int) -> None:
    raise AssertionError("what has a place of its own dtype is read straight there")
