"""Decode steps for the attention kernel in CUDA C++, and what plain torch makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from oomproof.engine.native import operators as declared
from oomproof.engine.native.attend_cuda import (
    AttendedLayer,
    Geometry,
    Params,
    geometry_of,
    params_of,
    variant_of,
)
from oomproof.engine.native.rotary import fill_rotary
from oomproof.formats import DType, ceil_div
from oomproof.kernels.source import Variant
from oomproof.memory.kv_cache import PAGE_TOKENS
from oomproof.memory.native import attention_counters, attention_partials
from oomproof.models.forward import RopeSpec

operators: Any = declared
"""Called with unpacked arguments, which no type checker follows."""
BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A decode step of a layer."""

    group: int
    kv_heads: int
    head_dim: int
    positions: tuple[int, ...]
    """Of each row; -1 for padding."""
    dtype: torch.dtype = BF16
    kv_dtype: torch.dtype = BF16
    window: int = 0
    normed: bool = False

    @property
    def variant(self) -> Variant:
        return variant_of(_named(self.dtype), _named(self.kv_dtype), self.head_dim, self.group)

    @property
    def context(self) -> int:
        """Planned tokens."""
        return max(*self.positions, 0) + 1

    @property
    def bound(self) -> float:
        """Weights of the values and what comes out are rounded to the compute type."""
        return 6e-3 if self.dtype is BF16 else 1e-3


class Step:
    """The tensors of a step on a device. What no kernel may read is not a number.

    Args:
        case: The layer and the rows.
        device: Where the kernel runs.
        seed: Of all values.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)
        rows, kv_heads, head_dim = len(case.positions), case.kv_heads, case.head_dim
        heads = case.group * kv_heads

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        num_pages = ceil_div(case.context, PAGE_TOKENS)
        if case.window:
            # As few as hold a window, wherever it begins: most positions go around.
            num_pages = min(num_pages, ceil_div(case.window, PAGE_TOKENS) + 1)
        slots = rows + 1
        self.pages = torch.randperm(slots * num_pages, generator=generator).int()
        self.pages = self.pages.view(slots, num_pages)
        self.positions = torch.tensor([max(0, position) for position in case.positions]).int()
        self.slots = torch.randperm(slots, generator=generator)[:rows].int()
        self.slots[torch.tensor(case.positions) < 0] = -1
        qkv = random(rows, (heads + 2 * kv_heads) * head_dim)
        # New values of every size: some are too large for e4m3, some are below its normal ones.
        spread = torch.rand(rows, kv_heads * head_dim, generator=generator) * 7 - 4
        qkv[:, (heads + kv_heads) * head_dim :] *= 10**spread
        self.qkv = qkv.to(case.dtype)
        self.norms = [
            torch.rand(head_dim, generator=generator).to(case.dtype) if case.normed else None
            for _ in range(2)
        ]
        self.rotary = torch.empty(2, case.context, head_dim // 2)
        fill_rotary(self.rotary, RopeSpec(theta=1e4), head_dim)
        shape = (slots * num_pages, kv_heads, PAGE_TOKENS, head_dim)
        self.pools = [torch.full(shape, torch.nan).to(case.kv_dtype) for _ in range(2)]
        for position, slot in zip(case.positions, self.slots.tolist(), strict=True):
            if slot < 0:
                continue
            first = max(0, position + 1 - case.window) if case.window else 0
            span = torch.arange(first, position)
            page = self.pages[slot, span // PAGE_TOKENS % num_pages].long()
            for pool in self.pools:
                stored = random(len(span), kv_heads, head_dim).to(case.kv_dtype)
                bits_of(pool)[page, :, span % PAGE_TOKENS] = bits_of(stored)
        self.qkv_there = self.qkv.to(device)
        self.pools_there = [pool.to(device, copy=True) for pool in self.pools]
        self.placed_there = [
            tensor.to(device) for tensor in (self.positions, self.slots, self.pages)
        ]
        self.norms_there = [None if norm is None else norm.to(device) for norm in self.norms]
        self.rotary_there = self.rotary.to(device)
        self.out = torch.full((rows, heads * head_dim), torch.nan, dtype=case.dtype, device=device)
        floats = attention_partials(kv_heads, case.group, head_dim, rows)
        self.partials = torch.full((floats,), torch.nan, device=device)
        self.counters = torch.zeros(
            attention_counters(kv_heads, rows), dtype=torch.int32, device=device
        )

    def geometry(
        self, multiprocessors: int, capability: tuple[int, int], cluster: int | None = None
    ) -> Geometry:
        """A launch's sizes on such a GPU."""
        return geometry_of(
            self.case.variant,
            rows=len(self.case.positions),
            kv_heads=self.case.kv_heads,
            context=self.case.window or self.case.context,
            multiprocessors=multiprocessors,
            multiprocessor_shared_bytes=228 * 1024,
            capability=capability,
            cluster=cluster,
        )

    def params(self, geometry: Geometry) -> Params:
        """Its parameters."""
        positions, slots, pages = self.placed_there
        q_norm, k_norm = self.norms_there
        keys, values = self.pools_there
        layer = AttendedLayer(
            keys=keys,
            values=values,
            rotary=self.rotary_there,
            positions=positions,
            slots=slots,
            pages=pages,
            q_norm=q_norm,
            k_norm=k_norm,
            partials=self.partials,
            counters=self.counters,
            scale=self.case.head_dim**-0.5,
            window=self.case.window,
            eps=EPS,
        )
        return params_of(geometry, layer, self.qkv_there, self.out)

    def check(self) -> None:
        """What the kernel left is what plain torch makes of it."""
        case = self.case
        qkv = self.qkv.clone()
        placed = (self.positions, self.slots, self.pages)
        operators.rotate_and_store(qkv, self.rotary, *placed, *self.pools, *self.norms, EPS)
        for found, expected in zip(self.pools_there, self.pools, strict=True):
            assert same_bits(found.cpu(), expected) or case.normed
            # A norm's sum may be added in another order.
            real = ~expected.float().isnan()
            assert torch.equal(real, ~found.cpu().float().isnan())
            assert error(found.cpu().float()[real], expected.float()[real]) < 1e-3
        expected = torch.empty(self.out.shape)
        operators.attend(
            qkv.float(), *placed, *self.pools, expected, torch.empty(0),
            case.head_dim**-0.5, case.window, False,
        )  # fmt: skip
        found_out = self.out.cpu().float()
        for row, slot in enumerate(self.slots.tolist()):
            if slot < 0:
                assert torch.equal(found_out[row], torch.zeros_like(found_out[row]))
            else:
                assert error(found_out[row], expected[row]) < case.bound, row
        assert not self.counters.any()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error; NaN where anything is not a number."""
    left, right = found.double(), expected.double()
    return float((left - right).norm() / right.norm().clamp(min=1e-30))


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.uint8 if values.itemsize == 1 else torch.int16)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(bits_of(left), bits_of(right))


def _named(dtype: torch.dtype) -> DType:
    return DType(str(dtype).removeprefix("torch."))
