"""What training LoRA adapters on frozen weights takes on a device, term by term."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod

from oomproof.errors import InputError, PlanDoesNotFitError
from oomproof.formats import DType, ceil_div, get_format
from oomproof.memory.arena import ALIGNMENT_BYTES, lay_out
from oomproof.memory.model import unit_of
from oomproof.memory.sharding import COMM_BYTES, Sharding, cut_layers
from oomproof.memory.training_buffers import (
    ALLOCATION_BYTES,
    allocated,
    static_buffers,
    workspace_bytes,
)
from oomproof.memory.training_shape import Kept, TrainingShape, adapter_numel, adapter_shapes
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec, Role
from oomproof.units import MIB, format_bytes

_ROUNDING_BYTES = MIB
"""What torch's allocator may add to a large block rather than split it."""
_LARGE_ALLOCATIONS = 10
_CUBLAS_BYTES = 2 * 32 * MIB
"""torch's workspaces for it on Hopper, 8 MiB each elsewhere: one for the thread that calls forward,
one for autograd's."""
_BATCH_BYTES = 64
"""Token ids, labels, positions and rows of a token, each in 64 bits, and what they are made of."""
KEPT_IN_ORDER = ("attention", "mid", "qkv", "gate_up")
"""Time spared by a byte is about the same for all of them; the cheapest go first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTerms:
    """Bytes of a step's peak on each rank, by what they are for."""

    weights: int
    """Frozen ones that are held: of several ranks, each may hold a part of every layer."""
    gathered: int
    """Where the parts of a layer come together."""
    adapters: int
    """Their float32 parameters."""
    gradients: int
    optimizer: int
    checkpoints: int
    kept: int
    """Activations that the backward pass need not compute again."""
    scratch: int
    """Dequantized weights."""
    buffers: int
    """Others that stay: hidden states and their gradient, rotary positions, inputs times A."""
    workspace: int
    """The largest phase of a layer, or the logits, with what attention allocates."""
    batch: int
    libraries: int
    rounding: int
    comm: int
    """NCCL's buffers: an estimate, and the one term that torch's allocator does not count."""

    @property
    def peak_bytes(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    @property
    def allocated_bytes(self) -> int:
        """What torch counts of them: torch.cuda.max_memory_allocated stays below."""
        return self.peak_bytes - self.comm


OPTIMIZER_STATE_BYTES = {
    "adamw": 8,
    "adamw-8bit": 2,
    "adamw-paged": 2,
    "adamw-paged-32bit": 8,
    "none": 0,
}
"""Optimizer → bytes of its moments for each trained number."""
_LEAST_PAGED = 100_000
"""Numbers of a matrix whose moments bitsandbytes' paged optimizers keep in managed memory."""
_LEAST_8BIT = 4096
"""Numbers of one whose moments are in 8 bits at all."""
_8BIT_BLOCK = 256
"""Numbers of an 8-bit moment that share an absmax in float32, which is never paged."""
_8BIT_MAPS_BYTES = 2 * 1024
"""What a code stands for, in float32: one table for signed moments and one for others."""
_CUT_BYTES = 20 * MIB
"""What torch's allocator cuts larger allocations than a MiB from."""


def training_memory(
    spec: ModelSpec, shape: TrainingShape, *, optimizer: str = "adamw"
) -> TrainingTerms:
    """The terms of a step's peak.

    Args:
        spec: A model that the native engine computes.
        shape: Of a step.
        optimizer: A key of OPTIMIZER_STATE_BYTES.

    Raises:
        InputError: Another optimizer.
    """
    if optimizer not in OPTIMIZER_STATE_BYTES:
        raise InputError(
            f"optimizer {optimizer!r} is not known",
            remedy=f"use one of {', '.join(OPTIMIZER_STATE_BYTES)}",
        )
    trained = spec.num_hidden_layers * adapter_numel(spec, shape.rank, shape.targets)
    static = {buffer.name: buffer.size_bytes for buffer in static_buffers(spec, shape)}
    kept = sum(size for name, size in static.items() if name.startswith("kept."))
    named = static["checkpoints"] + static["scratch"] + kept
    cut = sharding_of(spec, shape)
    return TrainingTerms(
        weights=weights_bytes(spec, shape),
        gathered=0 if cut is None else cut.buffers_bytes,
        adapters=allocated(4 * trained),
        gradients=allocated(4 * trained),
        optimizer=_optimizer_bytes(spec, shape, optimizer),
        checkpoints=static["checkpoints"],
        kept=kept,
        scratch=static["scratch"],
        buffers=lay_out(static_buffers(spec, shape)).size_bytes - named,
        workspace=workspace_bytes(spec, shape),
        batch=shape.tokens * _BATCH_BYTES + 16 * ALLOCATION_BYTES,
        libraries=_CUBLAS_BYTES,
        rounding=_LARGE_ALLOCATIONS * _ROUNDING_BYTES,
        comm=COMM_BYTES if shape.ranks > 1 else 0,
    )


def _optimizer_bytes(spec: ModelSpec, shape: TrainingShape, optimizer: str) -> int:
    """State of each A and each B, each tensor of it an allocation of its own."""
    if optimizer == "none":
        return 0
    in_8bit = optimizer in {"adamw-8bit", "adamw-paged"}
    shapes = adapter_shapes(spec, shape.rank, shape.targets).values()
    sizes: list[int] = []
    for numel in (prod(matrix) for pair in shapes for matrix in pair):
        in_32bit = not in_8bit or numel < _LEAST_8BIT
        if not optimizer.startswith("adamw-paged") or numel < _LEAST_PAGED:
            sizes += 2 * [allocated(numel * (4 if in_32bit else 1))]
        # An absmax for each moment, or the count of steps, which bitsandbytes has in Python.
        if not in_8bit:
            sizes.append(ALLOCATION_BYTES)
        elif not in_32bit:
            sizes += 2 * [allocated(4 * ceil_div(numel, _8BIT_BLOCK))]
    # The last cut of a piece of memory may leave up to a MiB that nothing else gets.
    cut = sum(size for size in sizes if size > MIB) * MIB // (_CUT_BYTES - MIB)
    maps = _8BIT_MAPS_BYTES if in_8bit else 0
    return spec.num_hidden_layers * (sum(sizes) + cut) + maps


def weights_bytes(spec: ModelSpec, shape: TrainingShape) -> int:
    """Frozen weights on a rank: linears in their format, all else in the compute dtype.

    Embedding, last norm and head are whole on every rank, and so is the first norm of each layer,
    which is needed before the layer has come.
    """
    first, *layers, last = _units_bytes(spec, shape)
    cut = sharding_of(spec, shape)
    if cut is None:
        return first + last + sum(layers)
    return first + last + cut.parts_bytes + input_norms_bytes(spec, shape.compute_dtype)


def input_norms_bytes(spec: ModelSpec, compute_dtype: DType) -> int:
    """Of the weights of each layer's first norm, one after the other."""
    return spec.num_hidden_layers * spec.hidden_size * compute_dtype.itemsize


def sharding_of(spec: ModelSpec, shape: TrainingShape) -> Sharding | None:
    """How layers are cut; None where every rank holds them whole."""
    if not shape.is_sharded:
        return None
    return cut_layers(_units_bytes(spec, shape)[1:-1], shape.ranks)


def _units_bytes(spec: ModelSpec, shape: TrainingShape) -> list[int]:
    """Of the embedding, each layer, and norm and head."""
    weight_format, linear = get_format(shape.format), frozenset({Role.LINEAR})
    found = [0] * (spec.num_hidden_layers + 2)
    for tensor in spec.tensors:
        held = stored(tensor, weight_format, shape.compute_dtype, linear)
        found[unit_of(tensor, spec)] += held.allocated_bytes(ALIGNMENT_BYTES)
    return found


def kept_within(
    spec: ModelSpec, shape: TrainingShape, limit_bytes: int, *, optimizer: str = "adamw"
) -> TrainingShape:
    """The shape that keeps as many activations as fit, in KEPT_IN_ORDER.

    Args:
        spec: The model.
        shape: Of a step; what it keeps is replaced.
        limit_bytes: Of the peak.
        optimizer: See training_memory.

    Raises:
        PlanDoesNotFitError: The step takes more without keeping anything.
    """
    found = replace(shape, kept=Kept())
    peak = training_memory(spec, found, optimizer=optimizer).peak_bytes
    if peak > limit_bytes:
        raise PlanDoesNotFitError(
            f"a step of {shape.tokens:,} tokens takes {format_bytes(peak)}, "
            f"the limit is {format_bytes(limit_bytes)}",
            shortfall_bytes=peak - limit_bytes,
            remedy="train shorter sequences, or fewer at once, or a lower rank"
            + ("" if shape.is_sharded or shape.ranks == 1 else ", or share the layers"),
        )
    for name in KEPT_IN_ORDER:
        low, high = 0, spec.num_hidden_layers
        while low < high:
            count = (low + high + 1) // 2
            kept = replace(found.kept, **{name: count})
            tried = replace(found, kept=kept)
            if training_memory(spec, tried, optimizer=optimizer).peak_bytes <= limit_bytes:
                low = count
            else:
                high = count - 1
        found = replace(found, kept=replace(found.kept, **{name: low}))
    return found


def host_bytes(spec: ModelSpec, shape: TrainingShape) -> int:
    """Page-locked host memory, where checkpoints wait there."""
    if not shape.offload_checkpoints:
        return 0
    item = shape.compute_dtype.itemsize
    size = spec.num_hidden_layers * shape.tokens * spec.hidden_size * item
    # torch takes a power of two from the system.
    return 1 << (size - 1).bit_length()
