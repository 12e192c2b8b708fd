"""The memory model of one model in one format: the terms of a device for any range of layers.

A model is a row of units, and a device holds a contiguous range of them:

    unit 0            token embedding (and a vision tower, where there is one)
    unit 1 … L        decoder layers 0 … L-1
    unit L+1          final norm and lm_head

A tied head shares the embedding's tensor, so its logits are computed where the embedding is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from oomproof.formats import BLOCK_SIZE, DType, Format, ceil_div, held_format
from oomproof.memory import native
from oomproof.memory.adapter import layer_lora_bytes
from oomproof.memory.kv_cache import layer_kv_bytes
from oomproof.memory.profiles import EngineProfile
from oomproof.memory.terms import DeviceTerms
from oomproof.memory.weights import StoredTensor, resident_bytes, stored
from oomproof.memory.workspace import WorkspaceShape, chunk_tokens, workspace_bytes
from oomproof.models.spec import AttentionSpec, ModelSpec, Role, TensorSpec

_REFERENCE_BYTES_PER_WEIGHT = 24
"""What dequantizing a weight takes on a processor: codes as int64, float32 values and scales."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What is asked of a model, besides its weights."""

    context: int
    """Prompt and answer of one request, in tokens."""
    concurrency: int
    """Requests at once."""
    kv_dtype: DType


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    weights: int
    traffic: int
    staging: int
    largest_linear: int


class WeightCosts:
    """What the units of a model cost in one format, whatever is asked of it; computed once."""

    def __init__(
        self, spec: ModelSpec, weight_format: Format, profile: EngineProfile, compute_dtype: DType
    ) -> None:
        self.spec = spec
        self.weight_format = weight_format
        self.profile = profile
        self.compute_dtype = compute_dtype
        units = _units(spec, weight_format, profile, compute_dtype)
        adapters = [0, *layer_lora_bytes(spec, profile, compute_dtype), 0]
        self.adapters = [0, *accumulate(adapters)]
        weights = [unit.weights + size for unit, size in zip(units, adapters, strict=True)]
        self.weights = [0, *accumulate(weights)]
        """Adapters included, which stay on their device where a layer's own weights do not."""
        traffic = [unit.traffic + size for unit, size in zip(units, adapters, strict=True)]
        self.traffic = [0, *accumulate(traffic)]
        self.staging = [unit.staging for unit in units]
        self.largest_linear = [unit.largest_linear for unit in units]
        self.largest_staging_of = RangeMaximum(self.staging)
        self.largest_linear_of = RangeMaximum(self.largest_linear)


class RangeMaximum:
    """The largest value of any range of a row, in constant time: a sparse table."""

    def __init__(self, values: Sequence[int]) -> None:
        # Row k holds the largest of each 2^k neighbours.
        self._rows = [list(values)]
        width = 1
        while 2 * width <= len(values):
            row = self._rows[-1]
            self._rows.append(list(map(max, row, row[width:])))
            width *= 2

    def __call__(self, first: int, end: int) -> int:
        """The largest of values first … end-1; the range is not empty."""
        power = (end - first).bit_length() - 1
        row = self._rows[power]
        return max(row[first], row[end - (1 << power)])


class MemoryModel:
    """Terms of any unit range of a model, in one format, for one engine profile and demand."""

    def __init__(self, costs: WeightCosts, demand: Demand) -> None:
        self.costs = costs
        self.spec = spec = costs.spec
        self.profile = costs.profile
        self.demand = demand
        self.num_units = spec.num_hidden_layers + 2
        kv_bytes = cache(self._layer_kv_bytes)
        unit_kv = [0, *(kv_bytes(attention) for attention in spec.attention), 0]
        self._kv = [0, *accumulate(unit_kv)]
        self._workspace = cache(self._workspace_bytes)
        self._peaks: dict[int, list[int]] = {}
        hidden_bytes = spec.hidden_size * costs.compute_dtype.itemsize
        self._comm_bytes = 0
        if not self.profile.is_static:
            self._comm_bytes = 2 * chunk_tokens(demand.context, self.profile) * hidden_bytes
        steps = len(native.graph_sizes(demand.concurrency))
        pieces = len(native.prompt_sizes(native.chunk_tokens(demand.context)))
        self._graph_bytes = (
            steps * self.profile.graph_bytes_per_layer
            + pieces * self.profile.prompt_graph_bytes_per_layer
        )

    def _layer_kv_bytes(self, attention: AttentionSpec) -> int:
        demand = self.demand
        if self.profile.is_static:
            return native.layer_kv_bytes(
                attention,
                context=demand.context,
                concurrency=demand.concurrency,
                dtype=demand.kv_dtype,
            )
        return layer_kv_bytes(
            attention,
            context=demand.context,
            concurrency=demand.concurrency,
            dtype=demand.kv_dtype,
            overhead_bytes=self.profile.kv_layer_overhead_bytes,
        )

    def graphs_bytes(self, first: int, end: int) -> int:
        """What recorded steps of units first … end-1 take from the driver."""
        return self._graph_bytes * (end - first)

    def _workspace_bytes(self, largest_linear: int, has_head: bool) -> int:
        if self.profile.is_static:
            return self._static_workspace_bytes(largest_linear, has_head)
        shape = WorkspaceShape(
            context=self.demand.context,
            compute_dtype=self.costs.compute_dtype,
            largest_linear=largest_linear,
            splits_outliers=self.costs.weight_format.name == "llm-int8",
            has_head=has_head,
        )
        return workspace_bytes(self.spec, shape, self.profile)

    def _static_workspace_bytes(self, largest_linear: int, has_head: bool) -> int:
        shape = native.StepShape(
            context=self.demand.context,
            concurrency=self.demand.concurrency,
            compute_dtype=self.costs.compute_dtype,
            quantized=self.costs.weight_format.is_quantized,
            has_head=has_head,
        )
        profile = self.profile
        around = profile.library_workspace_bytes + profile.fragmentation_bytes
        if profile.dequantizes_to_scratch:
            # The references that serve a processor make copies of a weight as they go.
            around += largest_linear * _REFERENCE_BYTES_PER_WEIGHT
        return native.step_layout(self.spec, shape).size_bytes + around

    def _computes_logits(self, first: int, end: int) -> bool:
        if self.spec.tie_word_embeddings:
            return first == 0
        return end == self.num_units

    def weights_bytes(self, first: int = 0, end: int | None = None) -> int:
        """Stored bytes of units first … end-1, as the allocator rounds them."""
        return (
            self.costs.weights[self.num_units if end is None else end] - self.costs.weights[first]
        )

    def adapter_bytes(self, first: int = 0, end: int | None = None) -> int:
        """The part of `weights_bytes` that an adapter takes."""
        end = self.num_units if end is None else end
        return self.costs.adapters[end] - self.costs.adapters[first]

    def streamable_bytes(self, first: int, end: int) -> int:
        """The part of `weights_bytes` that may stay in host memory."""
        return self.weights_bytes(first, end) - self.adapter_bytes(first, end)

    def traffic_bytes(self, first: int = 0, end: int | None = None) -> int:
        """Weight bytes of units first … end-1 that one decode step reads."""
        return (
            self.costs.traffic[self.num_units if end is None else end] - self.costs.traffic[first]
        )

    def kv_bytes(self, first: int = 0, end: int | None = None) -> int:
        """KV cache bytes of units first … end-1."""
        return self._kv[self.num_units if end is None else end] - self._kv[first]

    def staging_bytes(self, first: int, end: int) -> int:
        """What loading units first … end-1 needs besides the weights."""
        largest = self.costs.largest_staging_of(first, end)
        if self.profile.is_static:
            return largest
        return largest + self._staging_growth(largest, first, end)

    def _staging_growth(self, largest: int, first: int, end: int) -> int:
        # Each layer leaves holes that the next layer's largest source does not fit in.
        layers = min(end, self.num_units - 1) - max(first, 1)
        source = largest - self.profile.fragmentation_bytes
        return int(self.profile.staging_growth * max(0, layers) * source)

    def overhead_bytes(self, largest_linear: int, *, has_head: bool = False) -> int:
        """What one of several devices needs at least, besides its units' weights and cache."""
        fixed = self.profile.context_bytes + self.profile.margin_bytes + self._comm_bytes
        return fixed + self._workspace(largest_linear, has_head)

    def terms(self, first: int, end: int) -> DeviceTerms:
        """Terms of a device that holds units first … end-1 (nothing where they are equal)."""
        if first >= end:
            return DeviceTerms()
        return DeviceTerms(
            cuda_context=self.profile.context_bytes,
            weights=self.weights_bytes(first, end),
            kv_cache=self.kv_bytes(first, end),
            workspace=self._workspace(
                self.costs.largest_linear_of(first, end), self._computes_logits(first, end)
            ),
            staging=self.staging_bytes(first, end),
            graphs=self.graphs_bytes(first, end),
            comm=0 if end - first == self.num_units else self._comm_bytes,
            margin=self.profile.margin_bytes,
        )

    def peak_bytes(self, first: int, end: int) -> int:
        """The peak of a device that holds units first … end-1; equals that of `terms`."""
        costs = self.costs
        running = (
            self._kv[end]
            - self._kv[first]
            + self._workspace(
                costs.largest_linear_of(first, end), self._computes_logits(first, end)
            )
        )
        if end - first < self.num_units:
            running += self._comm_bytes
        running += self.graphs_bytes(first, end)
        return (
            self.profile.context_bytes
            + self.profile.margin_bytes
            + costs.weights[end]
            - costs.weights[first]
            + max(self.staging_bytes(first, end), running)
        )

    def peaks_from(self, first: int) -> Sequence[int]:
        """Peak bytes of the ranges first … first+1, first … first+2, …; each equals `terms(…)`."""
        if first not in self._peaks:
            self._peaks[first] = list(self._growing_peaks(first))
        return self._peaks[first]

    def _growing_peaks(self, first: int) -> Iterator[int]:
        # Plan searches spend their time here, so what does not change from unit to unit is not
        # computed again: the workspace changes where a larger weight or the head joins the range.
        costs, kv, num_units = self.costs, self._kv, self.num_units
        fixed = self.profile.context_bytes + self.profile.margin_bytes - costs.weights[first]
        staging, linear, has_head, workspace = 0, -1, False, 0
        for end in range(first + 1, num_units + 1):
            staging = max(staging, costs.staging[end - 1])
            computes_logits = self._computes_logits(first, end)
            if costs.largest_linear[end - 1] > linear or computes_logits != has_head:
                linear = max(linear, costs.largest_linear[end - 1])
                has_head = computes_logits
                workspace = self._workspace(linear, has_head)
            running = kv[end] - kv[first] + workspace + self.graphs_bytes(first, end)
            if end - first < num_units:
                running += self._comm_bytes
            grown = staging
            if not self.profile.is_static:
                grown += self._staging_growth(staging, first, end)
            yield fixed + costs.weights[end] + max(grown, running)


def unit_of(tensor: TensorSpec, spec: ModelSpec) -> int:
    """The unit a tensor belongs to."""
    if tensor.layer is not None:
        return tensor.layer + 1
    in_decoder = tensor.name.startswith((spec.decoder_prefix + ".", "lm_head."))
    if tensor.role is Role.EMBEDDING or not in_decoder:
        return 0
    return spec.num_hidden_layers + 1


def _units(
    spec: ModelSpec, weight_format: Format, profile: EngineProfile, compute_dtype: DType
) -> list[_Unit]:
    @cache
    def cost(tensor: TensorSpec, own: str) -> _Unit:
        held = stored(tensor, by_name[own], compute_dtype, profile.quantized_roles)
        resident = resident_bytes(tensor, held, profile)
        return _Unit(
            weights=resident,
            traffic=_decode_traffic(spec, tensor, resident),
            staging=_staging_bytes(spec, tensor, held, profile),
            largest_linear=tensor.numel if held.quantized else 0,
        )

    by_name: dict[str, Format] = {}
    units: list[list[_Unit]] = [[] for _ in range(spec.num_hidden_layers + 2)]
    for tensor in spec.tensors:
        own = weight_format.for_tensor(tensor.name)
        by_name[own.name] = own
        # Parameters of one kind and shape cost the same, whatever their names.
        kind = TensorSpec(
            name="",
            shape=tensor.shape,
            role=tensor.role,
            kept=tensor.kept,
            stored_as=tensor.stored_as,
        )
        units[unit_of(tensor, spec)].append(cost(kind, own.name))
    buffers = profile.buffer_bytes
    units[0].append(_Unit(weights=buffers, traffic=0, staging=0, largest_linear=0))
    if spec.tie_word_embeddings:
        # The head's product reads the shared tensor, wherever it is placed.
        tied = next(t for t in spec.tensors if t.role is Role.EMBEDDING)
        head_traffic = tied.numel * compute_dtype.itemsize
        units[0].append(_Unit(weights=0, traffic=head_traffic, staging=0, largest_linear=0))
    return [
        _Unit(
            weights=sum(part.weights for part in parts),
            traffic=sum(part.traffic for part in parts),
            staging=max((part.staging for part in parts), default=0),
            largest_linear=max((part.largest_linear for part in parts), default=0),
        )
        for parts in units
    ]


def _decode_traffic(spec: ModelSpec, tensor: TensorSpec, resident: int) -> int:
    """Bytes of a parameter that one decode step of one request reads."""
    if tensor.role is Role.EMBEDDING:
        return resident // tensor.shape[0]
    if tensor.role is Role.EXPERTS:
        return resident * spec.num_experts_per_token // spec.num_experts
    return resident


def _staging_bytes(
    spec: ModelSpec, tensor: TensorSpec, held: StoredTensor, profile: EngineProfile
) -> int:
    """Bytes that loading a parameter needs on its device besides the parameter itself."""
    if profile.is_static:
        # Slices wait in buffers of a fixed size; double quantization keeps every absmax besides.
        block_size = BLOCK_SIZE if held.format is None else held_format(held.format).block_size
        blocks = ceil_div(tensor.numel, block_size)
        absmax = blocks * DType.FLOAT32.itemsize if held.quantized else 0
        return profile.fragmentation_bytes + profile.loading_bytes + absmax
    return profile.fragmentation_bytes + _source_bytes(spec, tensor, held, profile)


def _source_bytes(
    spec: ModelSpec, tensor: TensorSpec, held: StoredTensor, profile: EngineProfile
) -> int:
    """Copies of the tensor in the checkpoint's precision, and what quantizing it takes."""
    source = tensor.numel * spec.dtype.itemsize
    if tensor.role is Role.EXPERTS:
        # Experts arrive one by one, are stacked, then concatenated: two copies beside the result.
        return 2 * source
    if held.quantized:
        eight_bits = held.dtype is DType.INT8
        per_weight = profile.scratch_bytes_8bit if eight_bits else profile.scratch_bytes_4bit
        absmax_copies = 3 * (tensor.numel // 64) * DType.FLOAT32.itemsize
        return source + int(per_weight * tensor.numel) + absmax_copies
    return source if spec.dtype is not held.dtype else 0
