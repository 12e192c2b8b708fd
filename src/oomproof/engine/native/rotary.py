"""Cosines and sines of rotary positions, as transformers computes them (modeling_rope_utils.py)."""

from __future__ import annotations

import math

import torch

from oomproof.models.forward import RopeSpec


def fill_rotary(table: torch.Tensor, rope: RopeSpec, head_dim: int) -> None:
    """Writes cosines and sines of every position.

    Args:
        table: float32 [2, positions, head dim / 2].
        rope: How the frequencies are stretched.
        head_dim: Width of a head.
    """
    frequencies, factor = frequencies_of(rope, head_dim)
    positions = torch.arange(table.shape[1], dtype=torch.float32)
    angles = positions.unsqueeze(1) * frequencies
    table[0].copy_(angles.cos() * factor)
    table[1].copy_(angles.sin() * factor)


def frequencies_of(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """(frequencies, float32 [head dim / 2] on the CPU; what cos and sin are scaled by)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.kind:
        case "linear":
            return plain / rope.factor, 1.0
        case "llama3":
            return _llama3(plain, rope), 1.0
        case "yarn":
            return _yarn(rope, exponents, head_dim), _yarn_attention(rope)
        case _:
            return plain, 1.0


def _llama3(plain: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Short wavelengths stay, long ones are stretched, those between are interpolated."""
    context = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / plain
    longest = context / rope.low_freq_factor
    shortest = context / rope.high_freq_factor
    smooth = (context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    stretched = torch.where(wavelengths > longest, plain / rope.factor, plain)
    return torch.where((wavelengths >= shortest) & (wavelengths <= longest), between, stretched)


def _yarn(rope: RopeSpec, exponents: torch.Tensor, head_dim: int) -> torch.Tensor:
    def dimension(rotations: float) -> float:
        """The dimension that turns this often within the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    powers = rope.theta**exponents
    return ramp / (rope.factor * powers) + (1 - ramp) / powers


def _yarn_attention(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
