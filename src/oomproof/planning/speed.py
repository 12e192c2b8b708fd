"""Predicted tokens per second, from bytes, bandwidth, FLOP/s and measured efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oomproof.formats import Format
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.model import MemoryModel
from oomproof.models.spec import ModelSpec, Role


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
    """Share of the datasheet's FLOP/s that a prefill chunk reaches."""
    layer_overhead_s: float
    """Least time of one layer: launches, Python; it bounds small models and fast GPUs."""
    measured: str
    """When, on which device, with which versions."""


_H200 = "NVIDIA H200, torch 2.11, transformers 5.17, bitsandbytes 0.50.2"

CALIBRATIONS: dict[tuple[str, str], Calibration] = {
    # (engine, kind of weights) → calibration; benchmarks/results/contract-h200.jsonl.
    ("transformers", "16-bit"): Calibration(
        bandwidth_efficiency=0.75,
        flops_efficiency=0.23,
        layer_overhead_s=0.62e-3,
        measured=f"2026-11-21, {_H200}: 8B 45.0 tokens/s, 1B 95.0, 8B prompts at 15.2 k",
    ),
    ("transformers", "4-bit"): Calibration(
        bandwidth_efficiency=0.20,
        flops_efficiency=0.19,
        layer_overhead_s=0.85e-3,
        measured=f"2026-11-21, {_H200}: 8B 34.4 tokens/s, prompts at 12.7 k; "
        "the bandwidth from 405B layers at 4.9 tokens/s, 2026-11-20",
    ),
    ("transformers", "llm-int8"): Calibration(
        bandwidth_efficiency=0.20,
        flops_efficiency=0.11,
        layer_overhead_s=2.1e-3,
        measured=f"2026-11-21, {_H200}: 8B 14.0 tokens/s, prompts at 7.2 k; "
        "the bandwidth as for 4 bits, not measured",
    ),
}


def calibration(engine: str, weight_format: Format) -> Calibration:
    """The measured efficiency that is nearest to how the engine runs a format."""
    if not weight_format.is_quantized:
        return CALIBRATIONS[engine, "16-bit"]
    return CALIBRATIONS[engine, "4-bit" if weight_format.bits_per_weight < 8 else "llm-int8"]


def predict_speed(
    spec: ModelSpec,
    weight_format: Format,
    engine: str,
    stages: Sequence[tuple[DeviceSpec, MemoryModel, int, int]],
) -> TokensPerSecond:
    """Speed of a placement.

    Args:
        spec: The model.
        weight_format: Format of its linear layers.
        engine: The engine that runs it.
        stages: (device, memory model, first unit, end unit) of each device in use, in order.
    """
    measured = calibration(engine, weight_format)
    decode_s = 0.0
    prefill_s_per_token = 0.0
    for device, model, first, end in stages:
        layers = max(1, end - first)
        overhead_s = layers * measured.layer_overhead_s if device.kind != "cpu" else 0.0
        if device.bandwidth_bytes_per_s is None:
            return TokensPerSecond(decode=None, decode_total=None, prefill=None)
        read_bytes = model.traffic_bytes(first, end)
        read_bytes += model.kv_bytes(first, end) // (2 * model.demand.concurrency)
        bandwidth = device.bandwidth_bytes_per_s * measured.bandwidth_efficiency
        decode_s += max(read_bytes / bandwidth, overhead_s)
        chunk = model.profile.prefill_chunk_tokens
        if device.flops_per_s is None:
            prefill_s_per_token = float("nan")
        else:
            flops = 2 * _active_parameters(spec) * (end - first) / model.num_units
            rate = device.flops_per_s * measured.flops_efficiency
            prefill_s_per_token += max(flops / rate, overhead_s / chunk)
    decode = 1 / decode_s
    # Requests take turns, one token each: together they are as fast as one alone.
    return TokensPerSecond(
        decode=_rounded(decode),
        decode_total=_rounded(decode),
        prefill=_rounded(1 / prefill_s_per_token) if prefill_s_per_token > 0 else None,
    )


def _active_parameters(spec: ModelSpec) -> int:
    """Parameters that one token passes through, embedding aside."""
    active = 0
    for tensor in spec.tensors:
        if tensor.role is Role.EXPERTS:
            active += tensor.numel * spec.num_experts_per_token // spec.num_experts
        elif tensor.role is not Role.EMBEDDING:
            active += tensor.numel
    return active


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
