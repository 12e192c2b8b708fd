"""Predicted speed, from bytes, bandwidth, FLOP/s and measured efficiency.

A decode step reads every weight once, or takes its launches' time, whichever is more, and then
attends: where the engine copies keys and values to every query head over the whole planned context,
those copies are read and written too. Units of the model run one after the other, on one device or
on several. A prompt's chunk is bound by the arithmetic of its weights and of its attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from oomproof.formats import FORMATS, Format
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.adapter import adapted_groups
from oomproof.memory.kv_cache import planned_tokens
from oomproof.memory.model import MemoryModel
from oomproof.models.spec import ModelSpec, Role

MIN_TOKENS_PER_SECOND = 1.0
"""A plan that streams weights from host memory and is slower than this wants --force."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensPerSecond:
    """Predicted speed; None where the device's bandwidth or FLOP/s are not known."""

    decode: float | None
    """One request alone, half of its context used."""
    decode_total: float | None
    """All concurrent requests together."""
    prefill: float | None
    """Prompt tokens of one request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How near an engine comes to the limits of a device."""

    bandwidth_efficiency: float
    """Share of the datasheet's bandwidth that reading weights reaches."""
    flops_efficiency: float
    """Share of the datasheet's 16-bit FLOP/s that a prefill chunk's products with weights reach."""
    layer_overhead_s: float
    """Least time of one layer: launches, Python; it bounds small models and fast GPUs."""
    chunk_overhead_s: float
    """The same for a chunk of a prompt."""
    split_overhead_s: float
    """What a layer costs besides, where the model is spread over several devices."""
    load_bytes_per_s: float
    """Checkpoint bytes that are read, quantized and placed a second, files in the page cache."""
    measured: str
    """When, on which device, with which versions."""
    added_overhead_s: float = 0.0
    """What a layer costs in a decode step besides reading its weights."""
    attention_flops_efficiency: float = 0.31
    """Share of the FLOP/s that attention over a chunk reaches, as if it saw the whole context: 8B
    and 14B at 4k, 8k and 32k."""
    batch_step_factor: float | None = None
    """A decode step of several requests over one of one request; None where they take turns."""
    batch_flops_efficiency: float | None = None
    """Share of the FLOP/s at which each further request's products add to a decode step; None where
    the weights' bytes hide them."""
    wide_flops_efficiency: float | None = None
    """The same for requests beyond the fourth on Hopper, whose kernel for many multiplies them."""
    added_chunk_s: float = 0.0
    """What a layer of a prompt's chunk costs besides its products' arithmetic."""


_H200 = "NVIDIA H200, torch 2.11, transformers 5.17, bitsandbytes 0.50.2"
_SOURCE = f"2026-11-21, {_H200} (benchmarks/results/rehearsals-h200.jsonl)"
_SPLIT = "; over two GPUs 8B bf16 43.9 and nf4-dq 32.1 (rehearsals-2xh200.jsonl)"
_LOADING = "; loading: contract-h200.jsonl"

CALIBRATIONS: dict[tuple[str, str], Calibration] = {
    # (engine, kind of weights) → calibration.
    ("transformers", "16-bit"): Calibration(
        bandwidth_efficiency=0.75,
        flops_efficiency=0.38,
        layer_overhead_s=0.58e-3,
        chunk_overhead_s=0.95e-3,
        split_overhead_s=0.01e-3,
        load_bytes_per_s=3.6e9,
        measured=f"{_SOURCE}: tokens/s and prompts at 8k of 1B 93 and 60 k, 3B 50 and 30 k, "
        f"8B 44 and 20 k, 14B 36 and 11 k{_SPLIT}{_LOADING}",
    ),
    ("transformers", "4-bit"): Calibration(
        bandwidth_efficiency=0.20,
        flops_efficiency=0.40,
        layer_overhead_s=0.70e-3,
        chunk_overhead_s=1.6e-3,
        split_overhead_s=0.14e-3,
        load_bytes_per_s=3.2e9,
        measured=f"{_SOURCE}: 1B 81 tokens/s, 3B 51, 8B 36 to 41, 14B 24, prompts at 21 k, 20 k, "
        f"14 k and 9 k, of 70B 2.5 k, of 405B 0.5 k; the bandwidth from 405B layers at 4.9 tokens/s"
        f"{_SPLIT}{_LOADING}",
    ),
    ("transformers", "llm-int8"): Calibration(
        bandwidth_efficiency=0.20,
        flops_efficiency=0.11,
        layer_overhead_s=2.0e-3,
        chunk_overhead_s=3.5e-3,
        split_overhead_s=0.14e-3,
        load_bytes_per_s=1.0e9,
        measured=f"{_SOURCE}: 1B 31 tokens/s, 3B 15, 8B 14, 14B 10, prompts at 10 k, 10 k, 6 k "
        f"and 4 k; the bandwidth as for 4 bits, not measured{_SPLIT}{_LOADING}",
    ),
}

_NATIVE_SOURCE = (
    "2026-11-21, NVIDIA H200, torch 2.11, Triton 3.6 "
    "(benchmarks/results/rehearsals-native-h200.jsonl)"
)
for _kind, _bandwidth, _flops, _batch, _chunk_s, _attention in (
    # Kind or format, share of the bandwidth, share of the FLOP/s, step of several over step of one,
    # what a layer of a chunk costs besides, share of the FLOP/s of its attention. Those of prompts
    # by least squares over all rows with prompts from 2,016 to 32,736 tokens: within a tenth.
    ("16-bit", 0.87, 0.73, 1.0, 0.085e-3, 0.71),
    ("8-bit", 0.65, 0.62, 1.25, 0.155e-3, 0.93),
    ("fp8", 0.50, 1.07, 1.33, 0.23e-3, 0.94),
    ("4-bit", 0.80, 0.66, 1.0, 0.156e-3, 0.88),
):
    CALIBRATIONS["native", _kind] = Calibration(
        bandwidth_efficiency=_bandwidth,
        flops_efficiency=_flops,
        layer_overhead_s=0.0,
        chunk_overhead_s=0.0,
        added_chunk_s=_chunk_s,
        split_overhead_s=0.0,
        load_bytes_per_s=12e9,
        measured=_NATIVE_SOURCE,
        # Of 4 bits' fused layers; the others have launches between their products.
        added_overhead_s=18.5e-6 if _kind == "4-bit" else 0.04e-3,
        attention_flops_efficiency=_attention,
        batch_step_factor=_batch,
        batch_flops_efficiency=0.135 if _kind == "4-bit" else None,
        wide_flops_efficiency=0.5 if _kind == "4-bit" else None,
    )

# Row by row, as nf4-dq was before its tiles: an 8B at 131 tokens/s (benchmarks/LOG.md).
CALIBRATIONS["native", "nf4-g16"] = replace(
    CALIBRATIONS["native", "8-bit"],
    bandwidth_efficiency=0.15,
    measured=f"{_NATIVE_SOURCE}; decoding as nf4-dq did without tiles, not measured",
)

ATTENTION_BANDWIDTH_EFFICIENCY = 0.75
"""Share of the bandwidth that copying keys and values to the query heads reaches, as 16 bits do."""
HOP_S = 30e-6
"""Hidden states of one token from one device to the next: a copy of some KiB and its launch."""

ADAPTED_S = {"native": 13e-6, "transformers": 80e-6}
"""What an adapter adds to a layer's product in a decode step besides its bytes: two launches, and
those that are not fused with the product any more (an 8B on an H200, benchmarks/LOG.md). Of
transformers, eager ones for each linear: estimated, not measured."""

_HOPPER = (9, 0)
_NARROW_REQUESTS = 4
"""Of a decode step on Hopper, that the kernel for few tokens multiplies."""
HOST_LINK_EFFICIENCY = 0.87
"""Share of PCI Express' rate that pinned copies reach: 55 of 63 GB/s on an H200, 2026-11."""
_HOST_LINKS = (
    # Compute capability from which on boards have this host link; x16, GB/s of one direction.
    ((12, 0), 63.0e9),
    ((9, 0), 63.0e9),
    ((8, 0), 31.5e9),
    ((0, 0), 15.75e9),
)
_DEFAULT_HOST_LINK = 31.5e9
"""PCI Express 4.0 x16, where nothing is known of the GPU."""


def calibration(engine: str, weight_format: Format) -> Calibration:
    """The measured efficiency that is nearest to how the engine runs a format."""
    if weight_format.by_tensor is not None:
        # Layers with several formats take every product alone: the slowest member's speed.
        members = [calibration(engine, FORMATS[name]) for name in sorted(weight_format.members)]
        return min(members, key=lambda member: member.bandwidth_efficiency)
    own = CALIBRATIONS.get((engine, weight_format.name))
    if own is not None:
        return own
    if not weight_format.is_quantized:
        return CALIBRATIONS[engine, "16-bit"]
    if weight_format.bits_per_weight < 8:
        return CALIBRATIONS[engine, "4-bit"]
    return CALIBRATIONS[engine, "8-bit" if engine == "native" else "llm-int8"]


def host_link_bytes_per_s(device: DeviceSpec) -> float:
    """What pinned host memory gives a device: the probed link, else its generation's x16."""
    rate = device.host_link_bytes_per_s
    if rate is None and device.compute_capability is None:
        rate = _DEFAULT_HOST_LINK
    elif rate is None:
        known = device.compute_capability or (0, 0)
        rate = next(rate for first, rate in _HOST_LINKS if known >= first)
    return rate * HOST_LINK_EFFICIENCY


class SpeedModel:
    """Times of a model in one format on one device.

    Args:
        engine: The engine that runs it.
        device: Its bandwidth and FLOP/s; where they are not known, relative times still hold.
        model: The memory model, whose bytes are read.
        decode_factor: Measured over predicted time of a decode step on this machine.
        prefill_factor: The same for a prompt.
    """

    def __init__(
        self,
        engine: str,
        device: DeviceSpec,
        model: MemoryModel,
        *,
        decode_factor: float = 1.0,
        prefill_factor: float = 1.0,
    ) -> None:
        measured = calibration(engine, model.costs.weight_format)
        self._device = device
        self.model = model
        """The memory model."""
        context = planned_tokens(model.demand.context)
        self.prefill_chunk_tokens = min(model.profile.prefill_chunk_tokens, context)
        """Tokens of a prompt that are processed at once."""
        self._measured = measured
        self._prefill_factor = prefill_factor
        self.is_known = device.bandwidth_bytes_per_s is not None
        on_cpu = device.kind == "cpu"
        datasheet = device.bandwidth_bytes_per_s or 1e12
        bandwidth = datasheet * measured.bandwidth_efficiency
        attention_bandwidth = datasheet * ATTENTION_BANDWIDTH_EFFICIENCY
        overhead_s = 0.0 if on_cpu else measured.layer_overhead_s
        split_s = 0.0 if on_cpu else measured.split_overhead_s
        added_s = 0.0 if on_cpu else measured.added_overhead_s
        groups = (0, *adapted_groups(model.spec), 0)
        adapted_s = 0.0 if on_cpu else ADAPTED_S[engine]
        alone = [
            decode_factor
            * (
                max(model.traffic_bytes(unit, unit + 1) / bandwidth, overhead_s)
                + added_s
                + adapted_s * groups[unit]
                + self._attention_bytes(unit) / attention_bandwidth
            )
            for unit in range(model.num_units)
        ]
        self.alone_s = sum(alone)
        """A decode step, where the device holds the whole model."""
        self.unit_s = tuple(seconds + split_s for seconds in alone)
        """A decode step of each unit, where it holds a part of it."""
        self.attention_s = tuple(
            decode_factor * self._attention_bytes(unit) / attention_bandwidth
            for unit in range(model.num_units)
        )
        """The part of it that grows with the requests."""
        self.batch_step_factor = measured.batch_step_factor

    def _attention_bytes(self, unit: int) -> float:
        """Bytes of keys and values that one request's step moves in a unit."""
        model = self.model
        kv_bytes = model.kv_bytes(unit, unit + 1) / model.demand.concurrency
        if not model.profile.expands_kv_heads or not kv_bytes:
            return kv_bytes / 2  # half of the context is used
        # A static cache is attended to in its whole length; copies are written and read.
        layer = model.spec.attention[unit - 1]
        kept = layer.num_key_value_heads * (layer.key_head_dim + layer.value_head_dim)
        head_dims = layer.query_head_dim + layer.output_head_dim
        copies = model.spec.num_attention_heads * head_dims / kept
        return kv_bytes if copies == 1 else kv_bytes * (1 + 2 * copies)

    def batch_s(self, first: int, end: int) -> float:
        """What the other requests add to a decode step of units first … end-1, attention aside."""
        model, device, measured = self.model, self._device, self._measured
        if device.flops_per_s is None or measured.batch_flops_efficiency is None:
            return 0.0
        others = model.demand.concurrency - 1
        wide = 0
        if device.compute_capability == _HOPPER and measured.wide_flops_efficiency is not None:
            wide = max(0, others + 1 - _NARROW_REQUESTS)
        flops = 2 * _active_parameters(model.spec) * (end - first) / model.num_units
        seconds = flops * (others - wide) / measured.batch_flops_efficiency
        seconds += flops * wide / (measured.wide_flops_efficiency or 1.0)
        return seconds / device.flops_per_s

    def prefill_s_per_token(self, first: int, end: int) -> float | None:
        """Time of a prompt's token in units first … end-1, None where the rate is not known."""
        model, device = self.model, self._device
        if device.flops_per_s is None:
            return None
        flops = 2 * _active_parameters(model.spec) * (end - first) / model.num_units
        measured, chunk = self._measured, self.prefill_chunk_tokens
        products_s = flops / (device.flops_per_s * measured.flops_efficiency)
        attention_s = self._attention_flops(first, end) / (
            device.flops_per_s * measured.attention_flops_efficiency
        )
        if device.kind != "cpu":
            products_s = max(products_s, (end - first) * measured.chunk_overhead_s / chunk)
            products_s += (end - first) * measured.added_chunk_s / chunk
        return self._prefill_factor * (products_s + attention_s)

    def _attention_flops(self, first: int, end: int) -> float:
        """Scores and weighted values of one token over the planned context."""
        spec, context = self.model.spec, self.model.demand.context
        layers = spec.attention[max(first, 1) - 1 : min(end, self.model.num_units - 1) - 1]
        return sum(
            2
            * spec.num_attention_heads
            * (layer.query_head_dim + layer.output_head_dim)
            * min(context, layer.sliding_window or context)
            for layer in layers
        )


def predict_speed(
    stages: Sequence[tuple[SpeedModel, int, int]], *, streaming_s: float = 0.0
) -> TokensPerSecond:
    """Speed of a placement.

    Args:
        stages: (speed model, first unit, end unit) of each device in use, in order.
        streaming_s: What waiting for weights from host memory adds to a decode step.
    """
    if not all(speed.is_known for speed, _, _ in stages):
        return TokensPerSecond(decode=None, decode_total=None, prefill=None)
    if len(stages) == 1 and not streaming_s:
        decode_s = stages[0][0].alone_s
    else:
        decode_s = HOP_S * (len(stages) - 1) + streaming_s
        decode_s += sum(sum(speed.unit_s[first:end]) for speed, first, end in stages)
    prefills = [speed.prefill_s_per_token(first, end) for speed, first, end in stages]
    prefill_s = None if None in prefills else sum(seconds or 0.0 for seconds in prefills)
    if prefill_s is not None and streaming_s:
        # Every chunk of a prompt waits for the streamed weights as a decode step does.
        chunk = min(speed.prefill_chunk_tokens for speed, _, _ in stages)
        prefill_s += streaming_s / chunk
    return TokensPerSecond(
        decode=_rounded(1 / decode_s),
        decode_total=_rounded(_total_speed(stages, decode_s)),
        prefill=_rounded(1 / prefill_s) if prefill_s else None,
    )


def _total_speed(stages: Sequence[tuple[SpeedModel, int, int]], decode_s: float) -> float:
    """Tokens a second of all requests together."""
    speed = stages[0][0]
    requests, factor = speed.model.demand.concurrency, speed.batch_step_factor
    if factor is None or requests == 1:
        # Requests take turns, one token each: together they are as fast as one alone.
        return 1 / decode_s
    attention_s = sum(sum(speed.attention_s[first:end]) for speed, first, end in stages)
    added_s = sum(speed.batch_s(first, end) for speed, first, end in stages)
    step_s = factor * (decode_s - attention_s) + added_s
    return requests / (step_s + requests * attention_s)


def load_seconds(spec: ModelSpec, weight_format: Format, engine: str) -> float:
    """Predicted time of loading from the page cache; a slower disk takes its own time instead."""
    source_bytes = sum(tensor.numel for tensor in spec.tensors) * spec.dtype.itemsize
    return _rounded(source_bytes / calibration(engine, weight_format).load_bytes_per_s)


def _active_parameters(spec: ModelSpec) -> int:
    """Parameters that one token passes through, embedding aside."""
    active = 0
    for tensor in spec.tensors:
        if tensor.role is Role.EXPERTS:
            active += tensor.numel * spec.num_experts_per_token // spec.num_experts
        elif tensor.role is not Role.EMBEDDING:
            active += tensor.numel
    return active + (0 if spec.adapter is None else spec.adapter.num_parameters)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
