"""1,000 weights that no model has, beside bitsandbytes: odd shapes, heavy tails, denormals.

Each in each format. On a GPU every bit is compared. Elsewhere it is with what bitsandbytes makes in
plain torch, to the bit but for fp4; its kernels for processors are not exact themselves.
"""

from __future__ import annotations

import random
import runpy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes import _ops

from oomproof.quantization.handlers import handler
from oomproof.quantization.reference import unpack
from tests.quantization.test_linear import theirs
from tests.quantization.weights import encode_in_slices

Kernels = dict[str, Callable[..., Any]]
NAMES = ("nf4", "nf4-dq", "fp4", "fp4-dq")
COUNT = 1000
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
    format_name: str, device: str, kernels: Kernels | None = None, count: int = COUNT
) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """(seed, ours, theirs) by bitsandbytes' kernels for the device, or by the given ones."""
    for seed in range(count):
        weight = awkward(seed).to(device)
        # On a GPU as a checkpoint is loaded: by the kernels, into final places.
        ours = (
            handler(format_name).encode(weight)
            if device == "cpu"
            else encode_in_slices(format_name, weight, len(weight))
        )
        expected = (
            portable(weight, format_name, kernels) if kernels else theirs(weight, format_name)
        )
        yield seed, ours, {name: expected[name].reshape(part.shape) for name, part in ours.items()}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """bitsandbytes' kernels in plain torch, by operator: for devices that have no others.

    Its dispatcher gives them to no processor; run again, their module tells what it registers.
    """
    found: Kernels = {}
    with (
        patch.object(_ops, "register_kernel", lambda name, _: partial(found.setdefault, name)),
        warnings.catch_warnings(action="ignore"),
    ):
        runpy.run_module("bitsandbytes.backends.default.ops")
    return found


def portable(weight: torch.Tensor, format_name: str, kernels: Kernels) -> dict[str, torch.Tensor]:
    """What bitsandbytes.functional.quantize_4bit makes with them."""
    quant_type = format_name[:3]
    quantize = kernels["bitsandbytes::quantize_4bit"]
    codes, absmax = quantize(weight, 64, quant_type, torch.uint8)
    parts = {"weight": codes, "quant_map": bnb.get_4bit_type(quant_type, device="cpu")}
    if not format_name.endswith("-dq"):
        return parts | {"absmax": absmax}
    table, offset = bnb.create_dynamic_map(), absmax.mean()
    codes, nested = kernels["bitsandbytes::quantize_blockwise"](absmax - offset, table, 256)
    nesting = {"nested_absmax": nested, "nested_quant_map": table, "nested_offset": offset}
    return parts | {"absmax": codes} | nesting


def same_scales(part: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, but that a short last block has a scale of 1e-38 at least where they have no GPU."""
    return bool(((part == other) | ((part - other).abs() <= 1e-38)).all())


def meaning(parts: dict[str, torch.Tensor], codes: torch.Tensor) -> torch.Tensor:
    """What codes of absmax values stand for; where the scale is 0 any code means 0."""
    nested = parts["nested_absmax"].repeat_interleave(256)[: codes.numel()]
    return parts["nested_quant_map"][codes.long()] * (nested != 0)


@pytest.mark.parametrize("format_name", NAMES)
def test_awkward_weights_have_bitsandbytes_codes_and_scales(
    format_name: str, kernels: Kernels
) -> None:
    apart = total = 0
    for seed, ours, expected in pairs(format_name, "cpu", kernels):
        for name, part in ours.items():
            if name == "weight" and format_name.startswith("fp4"):
                # Thresholds of its kernel for GPUs, which are ours, are no midpoints.
                codes, others = (_ZEROS[unpack(one).long()] for one in (part, expected[name]))
                apart, total = apart + int((codes != others).sum()), total + codes.numel()
            elif part.dtype is torch.float32:
                assert same_scales(part, expected[name]), (seed, name)
            else:
                assert torch.equal(part, expected[name]), (seed, name)
    assert apart <= 1e-3 * total


@pytest.mark.parametrize("format_name", NAMES)
def test_its_kernels_for_processors_are_seldom_apart(format_name: str) -> None:
    apart = total = 0
    for seed, ours, expected in pairs(format_name, "cpu", count=COUNT // 4):
        for name, part in ours.items():
            if name == "absmax" and format_name.endswith("-dq"):
                # They miss the nearest code now and then.
                away = (meaning(ours, part) - meaning(ours, expected[name])).abs()
                assert float(away.max()) < 0.02, seed
                apart, total = apart + int((away > 0).sum()), total + away.numel()
            elif name == "weight" and format_name.startswith("fp4"):
                codes, others = (_ZEROS[unpack(one).long()] for one in (part, expected[name]))
                apart, total = apart + int((codes != others).sum()), total + codes.numel()
            elif part.dtype is torch.float32:
                assert same_scales(part, expected[name]), (seed, name)
            else:
                assert torch.equal(part, expected[name]), (seed, name)
    assert apart <= 0.01 * total


def test_all_kinds_of_awkward_weights_occur() -> None:
    weights = [awkward(seed) for seed in range(COUNT)]
    assert len({tuple(weight.shape) for weight in weights}) > 300
    assert {weight.dtype for weight in weights} == set(_TYPES)
    tiny = torch.finfo(torch.float32).tiny
    assert sum(bool(((w != 0) & (w.abs().float() < tiny)).any()) for w in weights) > 30
    assert sum(bool((w == 0).float().mean() > 0.9) for w in weights) > 60
    assert sum(float(w.abs().max() / w.float().std()) > 30 for w in weights if w.numel() > 1) > 30


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", NAMES)
def test_on_a_gpu_awkward_weights_have_every_bit_of_bitsandbytes(format_name: str) -> None:
    """But in blocks of zeros, or of what fast arithmetic takes for zeros.

    There its kernels for GPUs and for processors give other codes.
    """
    for seed, ours, expected in pairs(format_name, "cuda"):
        for name, part in ours.items():
            if name == "absmax" and format_name.endswith("-dq"):
                both = (meaning(ours, one) for one in (part, expected[name]))
                assert torch.equal(*both), seed
            elif name == "weight":
                is_zero = (awkward_blocks(seed) < 2**-126).to(part.device)
                codes, others = (codes_of_blocks(one) for one in (part, expected[name]))
                assert torch.equal(codes[~is_zero], others[~is_zero]), (seed, name)
            else:
                found, wanted = (flushed(one) for one in (part, expected[name]))
                assert torch.equal(found, wanted), (seed, name)


def flushed(scales: torch.Tensor) -> torch.Tensor:
    """What fast arithmetic makes of float32 numbers."""
    return torch.where(scales.abs() < 2**-126, 0, scales)


def awkward_blocks(seed: int) -> torch.Tensor:
    """The largest magnitude of each block of a weight."""
    values = awkward(seed).float().abs().view(-1)
    return torch.nn.functional.pad(values, (0, -len(values) % 64)).view(-1, 64).amax(dim=1)


def codes_of_blocks(codes: torch.Tensor) -> torch.Tensor:
    """[blocks, 32]; a last short one is filled up."""
    return torch.nn.functional.pad(codes.view(-1), (0, -codes.numel() % 32)).view(-1, 32)
