"""Slices that are written beside products: in which order, on streams that are made up here; and
on a GPU the bits of one stream, without an allocation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from oomproof.quantization import operators, slices_cuda
from oomproof.quantization.handlers import handler
from oomproof.quantization.slices_cuda import Room, Scratch, multiply, room_of, slices_of
from tests.quantization.weights import random_input, random_weight, same_bits, tiled_set

COLUMNS = 8


@dataclass(eq=False)
class Event:
    """What had been done on a stream when it was recorded."""

    seen: frozenset[str] = frozenset()

    def record(self, stream: Stream) -> None:
        self.seen = frozenset(stream.seen)


@dataclass(eq=False)
class Stream:
    """What is done before anything that it is given next."""

    seen: set[str] = field(default_factory=set)

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_no_slice_is_read_before_it_is_written_or_written_before_it_is_read(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, side = Stream(), Stream()
    current = [main]

    events = [Event(frozenset({"stale"})) for _ in range(5)]
    sides = slices_cuda._Side(
        stream=side,  # type: ignore[arg-type]
        begun=events[0],  # type: ignore[arg-type]
        written=tuple(events[1:3]),  # type: ignore[arg-type]
        read=tuple(events[3:5]),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(slices_cuda, "_side", lambda _device: sides)
    weight, x = torch.randn(count * 4 - 1, COLUMNS), torch.randn(3, COLUMNS)
    main.seen.add("before")

    def dequantize(first: int, end: int, into: torch.Tensor) -> None:
        number = first // 4
        assert current[-1] is side
        assert "before" in side.seen
        # The slice before the last one had this place.
        assert number < 2 or f"read {number - 2}" in side.seen
        side.seen.add(f"written {number}")
        into.copy_(weight[first:end])

    product = torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        assert current[-1] is main
        number = sum(one.startswith("read") for one in main.seen)
        assert f"written {number}" in main.seen
        main.seen.add(f"read {number}")
        product(left, right, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    out = torch.full((3, len(weight)), torch.nan)
    room = Room(step=4, places=tuple(torch.empty(4, COLUMNS) for _ in range(2)))
    slices = slices_of(0, len(weight), 4)
    found = list(multiply(x, dequantize, slices, lambda a, b: out[:, a:b], room))
    assert found == slices
    assert {f"read {number}" for number in range(count)} <= main.seen
    torch.testing.assert_close(out, x @ weight.t())


def test_places_are_aligned_halves_of_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices_cuda, "_may_overlap", lambda _x: True)
    x = torch.empty(1 << 20, 66, dtype=torch.float16)
    scratch = torch.empty(2 * 300 * 132 + 1, dtype=torch.uint8)
    room = room_of(x, 10_000, Scratch(scratch))
    assert len(room.places) == 2
    assert all(place.shape == (room.step, 66) for place in room.places)
    assert all(place.data_ptr() % 256 == 0 for place in room.places)
    assert 128 <= room.step <= 300
    monkeypatch.setattr(slices_cuda, "_may_overlap", lambda _x: False)
    assert len(room_of(x, 10_000, Scratch(scratch)).places) == 1


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
def test_on_two_streams_products_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Slices of 512 KiB, of which a product has a dozen.
    monkeypatch.setattr("oomproof.memory.slices.SLICE_BYTES", 1 << 19)
    monkeypatch.setattr("oomproof.memory.slices.SLICE_RESULTS", 1)
    x = random_input(1500, 1024, torch.bfloat16).cuda()
    results = []
    for overlaps in (False, True):
        monkeypatch.setattr(slices_cuda, "_OVERLAPS", overlaps)
        out = torch.full((1500, 2 * 6144), float("nan"), dtype=x.dtype, device="cuda")
        gated = torch.full((1500, 6144), float("nan"), dtype=x.dtype, device="cuda")
        scratch = torch.full((16 << 20,), 0xA5, dtype=torch.uint8, device="cuda")
        products(x, scratch, out, gated)
        results.append((out, gated))
    for one, two in zip(*results, strict=True):
        assert not bool(one.isnan().any())
        assert same_bits(one, two)
    gate, up = (half + torch.linspace(-1, 1, 6144, dtype=x.dtype, device="cuda").float()
                for half in results[0][0].float().chunk(2, dim=1))  # fmt: skip
    expected = torch.nn.functional.silu(gate) * up
    error = (results[0][1].float() - expected).norm() / expected.norm()
    assert float(error) < 1e-2
