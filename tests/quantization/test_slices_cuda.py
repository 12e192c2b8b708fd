"""Products with slices of a weight: where they lie; on a GPU their values, without allocations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from oomproof.quantization import operators
from oomproof.quantization.handlers import handler
from oomproof.quantization.slices_cuda import Scratch, room_of, slice_after_slice
from tests.quantization.weights import random_input, random_weight, tiled_set


def test_every_slice_is_multiplied_once_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oomproof.memory.slices.SLICE_BYTES", 1 << 14)
    monkeypatch.setattr("oomproof.memory.slices.SLICE_RESULTS", 1)
    weight, x = torch.randn(1111, 64), torch.randn(3, 64)
    written: list[tuple[int, int]] = []

    def dequantize(first: int, end: int, into: torch.Tensor) -> None:
        written.append((first, end))
        into.copy_(weight[first:end])

    out = torch.full((3, len(weight)), torch.nan)
    scratch = Scratch(torch.empty(1 << 16, dtype=torch.uint8))
    found = list(slice_after_slice(x, dequantize, out, scratch))
    assert found == written
    assert len(found) > 2
    torch.testing.assert_close(out, x @ weight.t())


def test_a_slice_is_an_aligned_part_of_scratch() -> None:
    x = torch.empty(1 << 20, 66, dtype=torch.float16)
    scratch = torch.empty(300 * 132 + 256, dtype=torch.uint8)
    room = room_of(x, 10_000, Scratch(scratch[1:]))
    assert room.place.shape == (room.step, 66)
    assert room.place.data_ptr() % 256 == 0
    # How many fit depends on where the memory lies.
    assert room.step in {300, 301}


def products(x: torch.Tensor, scratch: torch.Tensor, out: Any, gated: Any) -> None:
    encoded = [handler("nf4-dq").encode(random_weight((6144, 1024), seed=n)) for n in (0, 1)]
    encoded = [{name: part.cuda() for name, part in parts.items()} for parts in encoded]
    weights = tiled_set("nf4-dq", encoded, 1024, in_turn=True)
    biases = [torch.linspace(-1, 1, 6144, dtype=x.dtype, device="cuda") for _ in encoded]
    arguments = weights.arguments()
    for _ in range(3):
        operators.linear_4bit_tiled(x, *arguments, out, scratch)
        operators.gated_4bit_tiled(x, *arguments, biases, gated, scratch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    operators.linear_4bit_tiled(x, *arguments, out, scratch)
    operators.gated_4bit_tiled(x, *arguments, biases, gated, scratch)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.gpu
def test_a_gate_in_slices_is_that_of_whole_products(monkeypatch: pytest.MonkeyPatch) -> None:
    # Slices of 512 KiB, of which a product has a dozen.
    monkeypatch.setattr("oomproof.memory.slices.SLICE_BYTES", 1 << 19)
    monkeypatch.setattr("oomproof.memory.slices.SLICE_RESULTS", 1)
    x = random_input(1500, 1024, torch.bfloat16).cuda()
    out = torch.full((1500, 2 * 6144), float("nan"), dtype=x.dtype, device="cuda")
    gated = torch.full((1500, 6144), float("nan"), dtype=x.dtype, device="cuda")
    scratch = torch.full((16 << 20,), 0xA5, dtype=torch.uint8, device="cuda")
    products(x, scratch, out, gated)
    gate, up = (half + torch.linspace(-1, 1, 6144, dtype=x.dtype, device="cuda").float()
                for half in out.float().chunk(2, dim=1))  # fmt: skip
    expected = torch.nn.functional.silu(gate) * up
    error = (gated.float() - expected).norm() / expected.norm()
    assert float(error) < 1e-2
