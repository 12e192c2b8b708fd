"""1,000 weights that no model has, beside bitsandbytes: odd shapes, heavy tails, denormals."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from oomproof.quantization.handlers import handler
from oomproof.quantization.reference import unpack
from tests.quantization.test_linear import theirs
from tests.quantization.weights import encode_in_slices

COUNT = 250
"""Of each format."""
_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_ZEROS = torch.tensor([*range(8), 0, *range(9, 16)], dtype=torch.uint8)
"""fp4 has two codes for zero; its kernel for processors gives either."""


def awkward(seed: int) -> torch.Tensor:
    """[rows, columns], finite, in one of the types that checkpoints have."""
    chosen = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        chosen.randint(1, 70),
        chosen.choice([1, 3, 63, 64, 65, 127, 128, 191, 320, 777]),
    )
    values = torch.randn(rows, columns, generator=generator)
    kind = chosen.choice(["normal", "tails", "zeros", "one", "equal", "tiny", "signs", "ladder"])
    if kind == "tails":
        values = values / torch.rand(rows, columns, generator=generator).clamp(min=1e-4)
    elif kind == "zeros":
        values[torch.rand(rows, columns, generator=generator) < 0.97] = 0
    elif kind == "one":
        values.zero_().view(-1)[chosen.randrange(values.numel())] = -3.0
    elif kind == "equal":
        values.fill_(chosen.uniform(-2, 2))
    elif kind == "tiny":  # denormals beside numbers, not alone: whole blocks of them differ on GPUs
        values = values * torch.where(torch.rand(values.shape, generator=generator) < 0.5, 1, 1e-39)
    elif kind == "signs":
        values = values.sign() * chosen.choice([0.5, 1.0, 1e-3])
    elif kind == "ladder":
        values = torch.linspace(-1, 1, values.numel()).view(rows, columns)
    scale = chosen.choice([1.0, 0.02, 1e-3, 30.0])
    return (values * scale).clamp(-6e4, 6e4).to(chosen.choice(_TYPES))


def pairs(
    format_name: str, device: str
) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    for seed in range(COUNT):
        weight = awkward(seed).to(device)
        # On a GPU as a checkpoint is loaded: by the kernels, into final places.
        ours = (
            handler(format_name).encode(weight)
            if device == "cpu"
            else encode_in_slices(format_name, weight, len(weight))
        )
        expected = theirs(weight, format_name)
        yield seed, ours, {name: expected[name].reshape(part.shape) for name, part in ours.items()}


def same_scales(part: torch.Tensor, other: torch.Tensor) -> bool:
    """A block of zeros has the scale 0, and on some of their ways 1e-38."""
    return bool(((part == other) | ((part == 0) & (other <= 1e-38))).all())


def meaning(parts: dict[str, torch.Tensor], codes: torch.Tensor) -> torch.Tensor:
    """What codes of absmax values stand for; where the scale is 0 any code means 0."""
    nested = parts["nested_absmax"].repeat_interleave(256)[: codes.numel()]
    return parts["nested_quant_map"][codes.long()] * (nested != 0)


@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_awkward_weights_have_bitsandbytes_codes_and_scales(format_name: str) -> None:
    apart = total = 0
    for seed, ours, expected in pairs(format_name, "cpu"):
        for name, part in ours.items():
            if name == "absmax" and format_name.endswith("-dq"):
                # Its kernel for processors misses the nearest code now and then.
                away = (meaning(ours, part) - meaning(ours, expected[name])).abs()
                assert float(away.max()) < 0.02, seed
                apart, total = apart + int((away > 0).sum()), total + away.numel()
            elif name == "weight" and format_name.startswith("fp4"):
                codes, others = (_ZEROS[unpack(one).long()] for one in (part, expected[name]))
                apart, total = apart + int((codes != others).sum()), total + codes.numel()
            elif "absmax" in name or "offset" in name:
                assert same_scales(part, expected[name]), (seed, name)
            else:
                assert torch.equal(part, expected[name]), (seed, name)
    assert apart <= 0.005 * total


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
def test_on_a_gpu_awkward_weights_have_every_bit_of_bitsandbytes(format_name: str) -> None:
    """But in blocks of zeros, where its kernels for GPUs and for processors give other codes."""
    for seed, ours, expected in pairs(format_name, "cuda"):
        for name, part in ours.items():
            if name == "absmax" and format_name.endswith("-dq"):
                both = (meaning(ours, one) for one in (part, expected[name]))
                assert torch.equal(*both), seed
            elif name == "weight":
                is_zero = (awkward_blocks(seed) == 0).to(part.device)
                codes, others = (codes_of_blocks(one) for one in (part, expected[name]))
                assert torch.equal(codes[~is_zero], others[~is_zero]), (seed, name)
            else:
                assert torch.equal(part, expected[name]), (seed, name)


def awkward_blocks(seed: int) -> torch.Tensor:
    """The largest magnitude of each block of a weight."""
    values = awkward(seed).float().abs().view(-1)
    return torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 64).amax(dim=1)


def codes_of_blocks(codes: torch.Tensor) -> torch.Tensor:
    """[blocks, 32]; a last short one is filled up."""
    return torch.nn.functional.pad(codes.view(-1), (0, -codes.numel() % 32)).view(-1, 32)
