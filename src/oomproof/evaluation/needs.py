"""What an evaluation takes in memory, before it takes any: pure functions, no torch.

One unit of the model is there at a time (the embedding, a layer, or norm and head): as the
checkpoint has it, and in one format. What grows with the text are the hidden states of every
window, once for the reference and once for each format, and three figures a token and format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from oomproof.errors import PlanDoesNotFitError
from oomproof.evaluation.variants import Variant
from oomproof.formats import BLOCK_SIZE, FORMATS, NESTED_BLOCK_SIZE, DType, ceil_div
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.memory.arena import ALIGNMENT_BYTES
from oomproof.memory.model import unit_of
from oomproof.memory.native import StepShape, layer_kv_bytes, step_layout
from oomproof.memory.profiles import EngineProfile, engine_profile
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec, TensorSpec
from oomproof.units import GIB, MIB, format_bytes, round_up

SLICE_ELEMENTS = 1 << 22
"""Weights that are quantized, or compared, at once."""
LOGITS_BYTES = 64 * MIB
"""Of float32 logits at once, at least those of a token; the comparison keeps SCORE_COPIES."""
SCORE_COPIES = 6
"""Log-probabilities of both models, their difference and product, and what makes them."""
_COMPARED_BYTES = 32
"""A weight that is compared: twice in float32, as an index of a bin, and what is on the way."""
FIGURES = 3
"""Negative log-likelihood, divergence and agreement of a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes of an evaluation, by what they are for."""

    device: Mapping[str, int]
    """What is on the device whatever the text."""
    host: Mapping[str, int]
    """The same of host memory."""
    state_bytes: int
    """Hidden states of one token in all formats; on the device where they fit, else on the host."""
    figure_bytes: int
    """What is known of one token in all formats, on the host."""

    @property
    def device_bytes(self) -> int:
        """On the device without any token."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """On the host without any token."""
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Where an evaluation goes."""

    states_on_device: bool
    peak_bytes: int
    """On the device; on a processor of all host memory."""


def unit_tensors(spec: ModelSpec, variant: Variant | None = None) -> list[list[TensorSpec]]:
    """The model's tensors: embedding, each layer, norm and head. A tied head is the embedding's.

    Args:
        spec: The model.
        variant: Whose tensors they are, where it is read from elsewhere.
    """
    units: list[list[TensorSpec]] = [[] for _ in range(spec.num_hidden_layers + 2)]
    for tensor in spec.tensors if variant is None else variant.tensors(spec):
        units[unit_of(tensor, spec)].append(tensor)
    return units


def needs_of(
    spec: ModelSpec,
    formats: Sequence[Variant],
    *,
    context: int,
    compute_dtype: DType,
    device: DeviceSpec,
    hardware: Hardware,
) -> Needs:
    """The bytes of an evaluation.

    Args:
        spec: The model, with the headers of its checkpoint.
        formats: All of them, the reference first.
        context: Tokens of a window.
        compute_dtype: What everything is computed in.
        device: Where it is computed.
        hardware: The machine.
    """
    profile = engine_profile("native", device, hardware.host)
    on_gpu = device.kind == "cuda"
    units = unit_tensors(spec)
    compute = compute_dtype.itemsize
    shape = StepShape(
        context=context,
        concurrency=1,
        compute_dtype=compute_dtype,
        quantized=True,
        has_head=False,
    )
    windows = {layer.sliding_window or 0: layer for layer in spec.attention}
    cache = sum(
        layer_kv_bytes(layer, context=context, concurrency=1, dtype=compute_dtype)
        for layer in windows.values()
    )
    per_token = LOGITS_BYTES // (4 * spec.vocab_size) or 1
    figures = min(per_token, context) * spec.vocab_size * (4 * SCORE_COPIES + compute)
    on_device = {
        "cuda_context": profile.context_bytes,
        "source": max(source_bytes(spec, unit) for unit in units),
        "weights": block_bytes(spec, formats, compute_dtype, profile),
        "stored": sum(
            stored_bytes(spec, one, compute_dtype, profile) for one in formats if one.stored
        ),
        "absmax": absmax_numel(spec, formats, profile) * DType.FLOAT32.itemsize,
        "quantizing": int(max(profile.scratch_bytes_4bit, _COMPARED_BYTES) * widest_slice(spec)),
        "kv_cache": cache,
        "workspace": step_layout(spec, shape).size_bytes + context * spec.hidden_size * compute * 2,
        "logits": figures,
        "libraries": profile.library_workspace_bytes
        + profile.fragmentation_bytes
        + profile.loading_bytes,
        "margin": profile.margin_bytes,
    }
    return Needs(
        device=on_device,
        host={
            "runtime": profile.host_runtime_bytes,
            "pinned": profile.pinned_bytes if on_gpu else 0,
        },
        state_bytes=len(formats) * spec.hidden_size * compute,
        figure_bytes=len(formats) * FIGURES * DType.FLOAT32.itemsize + 8 * DType.INT64.itemsize,
    )


def source_bytes(spec: ModelSpec, tensors: Sequence[TensorSpec]) -> int:
    """What a unit takes as the checkpoint has it."""
    dtypes = {} if spec.checkpoint is None else {t.name: t.dtype for t in spec.checkpoint.tensors}
    return sum(
        round_up(tensor.numel * dtypes.get(tensor.name, spec.dtype).itemsize, ALIGNMENT_BYTES)
        for tensor in tensors
    )


def unit_bytes(
    tensors: Sequence[TensorSpec], variant: Variant, compute_dtype: DType, profile: EngineProfile
) -> int:
    """What a unit takes as one of the variants."""
    return sum(
        stored(tensor, variant.format, compute_dtype, profile.quantized_roles).allocated_bytes(
            ALIGNMENT_BYTES
        )
        for tensor in tensors
    )


def block_bytes(
    spec: ModelSpec, variants: Sequence[Variant], compute_dtype: DType, profile: EngineProfile
) -> int:
    """What the largest unit takes as any of the variants that are quantized here."""
    return max(
        unit_bytes(unit, variant, compute_dtype, profile)
        for unit in unit_tensors(spec)
        for variant in variants
        if variant.stored is None
    )


def stored_bytes(
    spec: ModelSpec, variant: Variant, compute_dtype: DType, profile: EngineProfile
) -> int:
    """What a checkpoint in 4 bits takes: its largest unit, and at the end its norm and head."""
    units = unit_tensors(spec, variant)
    return max(unit_bytes(unit, variant, compute_dtype, profile) for unit in units)


def absmax_numel(spec: ModelSpec, variants: Sequence[Variant], profile: EngineProfile) -> int:
    """float32 elements that quantizing the largest linear needs."""
    linears = [t for t in spec.tensors if t.role in profile.quantized_roles and len(t.shape) == 2]
    formats = {
        tensor.name: {one.format.for_tensor(tensor.name).name for one in variants if not one.stored}
        for tensor in linears
    }
    return max(
        (
            ceil_div(tensor.numel, FORMATS[name].block_size)
            for tensor in linears
            for name in formats[tensor.name]
            if FORMATS[name].double_quantized
        ),
        default=0,
    )


def slice_rows(columns: int) -> int:
    """Rows that are quantized or compared at once; they begin at whole nested blocks of scales."""
    nested = BLOCK_SIZE * NESTED_BLOCK_SIZE
    step = nested // gcd(nested, columns)
    return step * max(1, SLICE_ELEMENTS // (columns * step))


def widest_slice(spec: ModelSpec) -> int:
    """Weights of the largest slice."""
    matrices = [t.shape for t in spec.tensors if t.layer is not None and len(t.shape) == 2]
    return max((min(rows, slice_rows(columns)) * columns for rows, columns in matrices), default=0)


def find_room(
    needs: Needs,
    hardware: Hardware,
    device: DeviceSpec,
    *,
    usable_bytes: int,
    host_bytes: int,
    windows: int,
    context: int,
    scored: int,
) -> Room:
    """Where the hidden states go.

    Args:
        needs: What is needed.
        hardware: The machine.
        device: Where it is computed.
        usable_bytes: Of the device.
        host_bytes: Of host memory.
        windows: Of the text.
        context: Tokens of a window.
        scored: Those of them that are predicted.

    Raises:
        PlanDoesNotFitError: There is no room for so many tokens, or for any.
    """
    each = needs.state_bytes + needs.figure_bytes
    tokens, window = windows * context, (context, scored)
    if device.kind == "cpu":
        # There, model and process live in the same memory.
        usable = min(usable_bytes, host_bytes)
        fixed = needs.device_bytes + needs.host_bytes
        peak = fixed + tokens * each
        if peak <= usable:
            return Room(states_on_device=True, peak_bytes=peak)
        raise _refusal("the processor", peak, usable, (usable - fixed) // each, window)
    where = f"GPU {device.index}"
    if needs.device_bytes > usable_bytes:
        raise _refusal(where, needs.device_bytes, usable_bytes, 0, window)
    if hardware.host.total_ram_bytes and needs.host_bytes > host_bytes:
        raise _refusal("the host", needs.host_bytes, host_bytes, 0, window)
    peak = needs.device_bytes + tokens * needs.state_bytes
    if peak <= usable_bytes and needs.host_bytes + tokens * needs.figure_bytes <= host_bytes:
        return Room(states_on_device=True, peak_bytes=peak)
    if needs.host_bytes + tokens * each <= host_bytes:
        return Room(states_on_device=False, peak_bytes=needs.device_bytes)
    on_device = (usable_bytes - needs.device_bytes) // needs.state_bytes
    on_device = min(on_device, (host_bytes - needs.host_bytes) // needs.figure_bytes)
    on_host = (host_bytes - needs.host_bytes) // each
    if on_device > on_host:
        raise _refusal(where, peak, usable_bytes, on_device, window)
    raise _refusal("the host", needs.host_bytes + tokens * each, host_bytes, on_host, window)


def _refusal(
    where: str, needed: int, usable: int, most_tokens: int, window: tuple[int, int]
) -> PlanDoesNotFitError:
    context, scored = window
    most = max(0, most_tokens) // context * scored
    digits = f"{format_bytes(needed)}" if needed >= GIB else f"{needed / MIB:,.0f} MiB"
    return PlanDoesNotFitError(
        f"evaluating needs {digits} of {where}, it may use {format_bytes(usable)}",
        shortfall_bytes=needed - usable,
        remedy=f"use --tokens {most} at most"
        if most
        else "use fewer --formats, a shorter --context or a smaller model",
    )
