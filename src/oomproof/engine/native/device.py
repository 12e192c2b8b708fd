"""What one device of a plan holds, built from the plan's numbers: three allocations, then views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from oomproof.engine.native.arena import Arena
from oomproof.engine.native.ends import Embedding, FinalNorm, Head
from oomproof.engine.native.kv_pool import KVPool
from oomproof.engine.native.layout import Block, lay_out_block
from oomproof.engine.native.lora import LoraWeights
from oomproof.engine.native.rotary import fill_rotary
from oomproof.engine.native.sampler import Sampler
from oomproof.engine.native.stage import Layers
from oomproof.engine.native.stored import StoredWeights
from oomproof.engine.native.streaming import LayerStream
from oomproof.engine.native.weights import LayerWeights, Parameter
from oomproof.errors import NotRunnableError, PlanMismatchError
from oomproof.formats import DType
from oomproof.loading.targets import Target
from oomproof.memory.adapter import LoraLayer, lay_out_adapter
from oomproof.memory.kv_cache import KV_FORMATS
from oomproof.memory.model import unit_of
from oomproof.memory.native import STREAMING_BUFFERS, Share, StepShape, step_layout
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.memory.weights import StoredTensor, stored
from oomproof.models.forward import ForwardSpec
from oomproof.models.spec import ModelSpec, Role, TensorSpec
from oomproof.planning.plan import DevicePlan, Plan


class NativeDevice:
    """One device: first its weights, later the KV pool and the arena.

    Args:
        plan: The contract.
        planned: The device's part of it.
        spec: The model.
        forward: Its numbers.
        rank: Which part of every layer it has, of the plan's `tensor_parallel`.

    Raises:
        NotRunnableError: Layers are split over ranks, which this version does not compute.
    """

    def __init__(
        self,
        plan: Plan,
        planned: DevicePlan,
        spec: ModelSpec,
        forward: ForwardSpec,
        *,
        rank: int = 0,
    ) -> None:
        if plan.tensor_parallel != 1:
            raise NotRunnableError(
                f"the plan splits each layer over {plan.tensor_parallel} ranks, "
                f"this version computes 1",
                remedy="plan again with this version",
            )
        self.planned = planned
        self.share = Share(rank=rank, ranks=plan.tensor_parallel)
        self.device = torch.device(
            *(("cuda", planned.index) if planned.kind == "cuda" else ("cpu",))
        )
        self.stream = torch.cuda.Stream(device=self.device) if self.device.type == "cuda" else None
        self._plan, self._spec, self._forward = plan, spec, forward
        self._compute_dtype = DType(plan.compute_dtype)
        self._blocks = _blocks(plan, spec, tiled=planned.kind == "cuda")
        streamed = planned.streamed_layers
        self._arena: Arena | None = None
        self.pool: KVPool | None = None
        self.layers: Layers | None = None
        self.embedding: Embedding | None = None
        self.final_norm: FinalNorm | None = None
        self.head: Head | None = None
        self.sampler: Sampler | None = None
        self._streamed = range(0) if streamed is None else range(streamed[0], streamed[1] + 1)
        self.lora: LoraWeights | None = None
        self._allocate_weights()

    def _allocate_weights(self) -> None:
        units = _units(self.planned, self._spec)
        away = {layer + 1 for layer in self._streamed}
        resident = [unit for unit in units if unit not in away]
        largest = max((self._blocks[unit].size_bytes for unit in away), default=0)
        total = sum(self._blocks[unit].size_bytes for unit in resident)
        total += STREAMING_BUFFERS * largest
        adapters = self._adapters()
        adapter_bytes = sum(layer.size_bytes for layer in adapters.values())
        total += adapter_bytes
        if total > self.planned.terms.weights:
            raise PlanMismatchError((_too_large(self.planned, total),))
        self.weights = torch.empty(total, dtype=torch.uint8, device=self.device)
        """Every weight here, adapter and streaming buffers included."""
        if adapters:
            dtype: torch.dtype = getattr(torch, self._compute_dtype)
            self.lora = LoraWeights(adapters, dtype, self.weights[:adapter_bytes])
        self._memory: dict[int, torch.Tensor] = {}
        first = adapter_bytes
        for unit in resident:
            end = first + self._blocks[unit].size_bytes
            self._memory[unit] = self.weights[first:end]
            first = end
        self.layer_stream: LayerStream | None = None
        if self._streamed:
            assert self.stream is not None
            self.layer_stream = LayerStream(
                self._streamed[0],
                [self._blocks[layer + 1] for layer in self._streamed],
                [self.weights[first + n * largest :][:largest] for n in range(STREAMING_BUFFERS)],
                self.stream,
            )

    def _adapters(self) -> Mapping[int, LoraLayer]:
        """Those of the layers here, streamed ones too: they stay on the device."""
        layers = self.planned.layers
        if layers is None:
            return {}
        found = lay_out_adapter(self._spec, self._compute_dtype).items()
        return {index: layer for index, layer in found if layers[0] <= index <= layers[1]}

    @property
    def arena(self) -> Arena:
        """Its buffers, once they are allocated."""
        if self._arena is None:
            raise RuntimeError("the pools are not allocated yet")
        return self._arena

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the arena, 0 before it is allocated."""
        return 0 if self._arena is None else self._arena.memory.nbytes

    def workspace_numel(self) -> int:
        """float32 elements that quantizing needs while loading, at most."""
        sizes = [
            placed.workspace_numel
            for unit in _units(self.planned, self._spec)
            for placed in self._blocks[unit].placed
        ]
        return max(sizes, default=0)

    def targets(
        self, workspace: torch.Tensor, *, made_up: bool, held: StoredWeights | None = None
    ) -> list[Target]:
        """Where the loader brings each of the device's tensors.

        Args:
            workspace: float32 on the device, of `workspace_numel`, of no use after loading.
            made_up: Whether weights are random, and no file has them.
            held: Where the checkpoint holds the plan's format already.
        """

        def targets_of(
            parameter: Parameter, home: Mapping[str, torch.Tensor] | None = None
        ) -> list[Target]:
            if held is not None and parameter.placed.held.quantized:
                return held.targets(parameter, home)
            search = self._plan.search
            return [parameter.target(workspace, home, made_up=made_up, search=search)]

        found = [
            target
            for unit, memory in self._memory.items()
            for placed in self._blocks[unit].placed
            for target in targets_of(Parameter(placed, memory))
        ]
        if self.layer_stream is None:
            return found
        # A streamed layer is quantized in a buffer that will be its own, and copied to its home.
        buffer = self.weights[-STREAMING_BUFFERS * self._largest_streamed :]
        for layer, host in zip(self._streamed, self.layer_stream.host, strict=True):
            for placed in self._blocks[layer + 1].placed:
                home = Parameter(placed, host)
                away = Parameter(placed, buffer)
                found += targets_of(away, home.parts)
        return found

    @property
    def _largest_streamed(self) -> int:
        return max(self._blocks[layer + 1].size_bytes for layer in self._streamed)

    def _parameters(self) -> Iterable[Parameter]:
        for unit, memory in self._memory.items():
            for placed in self._blocks[unit].placed:
                yield Parameter(placed, memory)

    def allocate_pools(self) -> None:
        """KV pool and arena, once the weights are in place and staging is given back."""
        plan, planned, spec = self._plan, self.planned, self._spec
        shape = StepShape(
            context=plan.context,
            concurrency=plan.concurrency,
            compute_dtype=self._compute_dtype,
            quantized=plan.weight_format.is_quantized,
            has_layers=planned.layers is not None,
            has_head=planned.holds_head,
            share=self.share,
        )
        self._arena = Arena(step_layout(spec, shape), self.device)
        if planned.layers is not None:
            fill_rotary(self.arena["rotary"], self._forward.rope, spec.attention[0].key_head_dim)
            windows = {layer.sliding_window or 0 for layer in spec.attention}
            self.pool = KVPool(
                spec,
                planned.layers,
                context=plan.context,
                concurrency=plan.concurrency,
                dtype=KV_FORMATS[plan.kv_format],
                device=self.device,
                tables={window: self.arena[f"pages.{window}"] for window in windows},
                share=self.share,
            )
            self.layers = Layers(
                self.arena,
                self.pool,
                self._forward,
                planned.layers,
                *self._layer_source(),
                lora=self.lora,
            )
        self._compare_with_plan()
        self._wire_ends()
        if self.layer_stream is not None:
            self.layer_stream.start()

    def _compare_with_plan(self) -> None:
        """Pools are built from the plan's numbers; a plan that says otherwise is not this model's.

        Raises:
            PlanMismatchError: KV pool or arena are larger than planned.
        """
        planned = self.planned
        pool_bytes = 0 if self.pool is None else self.pool.size_bytes
        sizes = (
            ("kv_cache", planned.terms.kv_cache, pool_bytes),
            ("workspace", planned.terms.workspace, self.workspace_bytes),
        )
        differences = tuple(
            f"device {planned.index}: planned {promised:,} bytes of {term}, it takes {size:,}"
            for term, promised, size in sizes
            if size > promised
        )
        if differences:
            raise PlanMismatchError(differences)

    def _layer_source(self) -> tuple[Callable[[int], LayerWeights], Callable[[int], None]]:
        assert self.planned.layers is not None
        stream, streamed = self.layer_stream, self._streamed
        resident = {
            layer: LayerWeights(self._blocks[layer + 1], self._memory[layer + 1])
            for layer in range(self.planned.layers[0], self.planned.layers[1] + 1)
            if layer not in streamed
        }

        def weights(layer: int) -> LayerWeights:
            if stream is not None and layer in streamed:
                return stream.weights(layer)
            return resident[layer]

        def done(layer: int) -> None:
            if stream is not None and layer in streamed:
                stream.done()

        return weights, done

    def _wire_ends(self) -> None:
        """Embedding, last norm, head and sampler, as far as they are here."""
        planned, spec, forward, arena = self.planned, self._spec, self._forward, self.arena
        ends = {
            parameter.placed.spec.role: parameter.tensor
            for parameter in self._parameters()
            if parameter.placed.spec.layer is None
        }
        if planned.holds_embedding:
            self.embedding = Embedding(arena, ends[Role.EMBEDDING], forward.embedding_multiplier)
        if planned.holds_norm:
            self.final_norm = FinalNorm(arena, ends[Role.NORM], forward.rms_norm_eps)
        if planned.holds_head:
            weight = ends[Role.EMBEDDING if spec.tie_word_embeddings else Role.HEAD]
            self.head = Head(arena, weight, forward.logits_divisor)
            self.sampler = Sampler(
                self._plan.concurrency,
                spec.vocab_size,
                self.device,
                lambda name, _shape, _dtype: arena[f"sampler.{name}"],
            )


def _blocks(plan: Plan, spec: ModelSpec, *, tiled: bool) -> Sequence[Block]:
    """What each unit of the model holds."""
    weight_format, compute_dtype = plan.weight_format, DType(plan.compute_dtype)
    roles = QUANTIZED_ROLES[plan.engine]
    units: list[list[tuple[TensorSpec, StoredTensor]]] = [
        [] for _ in range(spec.num_hidden_layers + 2)
    ]
    for tensor in spec.tensors:
        held = stored(tensor, weight_format, compute_dtype, roles)
        units[unit_of(tensor, spec)].append((tensor, held))
    return [lay_out_block(unit, plan.format, tiled=tiled) for unit in units]


def _too_large(planned: DevicePlan, weights_bytes: int) -> str:
    return (
        f"device {planned.index}: planned {planned.terms.weights:,} bytes of weights, "
        f"its tensors take {weights_bytes:,}"
    )


def _units(planned: DevicePlan, spec: ModelSpec) -> list[int]:
    """The model's units on a device."""
    units = [0] if planned.holds_embedding else []
    if planned.layers is not None:
        units += range(planned.layers[0] + 1, planned.layers[1] + 2)
    return units + ([spec.num_hidden_layers + 1] if planned.holds_norm else [])
