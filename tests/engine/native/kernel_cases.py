"""The decoder's kernels against their references, on any device; run in Triton's interpreter too.

`python -m tests.engine.native.kernel_cases` with TRITON_INTERPRET=1 compares on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from oomproof.engine.native import operators as declared
from oomproof.engine.native.rotary import fill_rotary
from oomproof.memory.kv_cache import PAGE_TOKENS
from oomproof.models.forward import RopeSpec

CPU = torch.device("cpu")
operators: Any = declared
"""Called with unpacked arguments, which no type checker follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An attention layer's shape."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype = torch.float32
    window: int = 0
    normed: bool = False


CASES = (
    Case(heads=3, kv_heads=1, head_dim=12, normed=True),
    Case(heads=2, kv_heads=2, head_dim=8, window=100),
    Case(heads=2, kv_heads=1, head_dim=8, kv_dtype=torch.float8_e4m3fn, window=200),
)
GPU_CASES = (
    *CASES,
    Case(heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, kv_dtype=torch.bfloat16),
    Case(heads=14, kv_heads=2, head_dim=64, dtype=torch.float16, kv_dtype=torch.float16),
    Case(
        heads=8, kv_heads=8, head_dim=96, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn,
        window=200,
    ),
)  # fmt: skip
SLOTS = 3
CHUNKS = (150, 33, 1, 256, 260)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error; NaN where anything is not a number."""
    left, right = found.cpu().double(), expected.double()
    return float((left - right).norm() / right.norm().clamp(min=1e-30))


def compare_elementwise(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Norm and gate, at widths that fill no block."""
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((1, 96), (3, 200), (5, 1030)):
        hidden, update, weight = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((rows, width), (rows, width), (width,))
        )
        for adds in (True, False):
            ours = [tensor.clone().to(device) for tensor in (hidden, update)]
            expected = [hidden.float(), update.float()]
            operators.add_rms_norm(*expected, weight.float(), 1e-5, 0.5, adds)
            _kernels().add_rms_norm(*ours, weight.to(device), 1e-5, 0.5, adds)
            for found, right in zip(ours, expected, strict=True):
                assert error(found, right) < bound
        gate, up = torch.randn((2, rows, width), generator=generator).to(dtype)
        expected_out = torch.empty(rows, width)
        operators.silu_mul(gate.float(), up.float(), expected_out)
        # Of wider tensors, to a third one and to the place of the gate.
        wide = torch.full((rows, 2 * width + 4), torch.nan, dtype=dtype, device=device)
        wide[:, :width], wide[:, width : 2 * width] = gate, up
        left, right = wide[:, :width], wide[:, width : 2 * width]
        for out in (torch.empty_like(wide)[:, :width], left):
            _gate().silu_mul(left, right, out)
            assert error(out, expected_out) < bound
        assert bool(wide[:, 2 * width :].isnan().all())


def compare_next_inputs(device: torch.device) -> None:
    """Rows of a decode step and padding; more than one program has, and those that are not its."""
    for rows in (1, 8, 300):
        inputs = torch.arange(3 * (rows + 5), dtype=torch.int32).view(3, rows + 5)
        inputs[2, rows // 2 : rows] = -1
        drawn = torch.arange(rows) + 100_000
        found = inputs.clone().to(device)
        operators.next_inputs(inputs[:, :rows], drawn)
        _kernels().next_inputs(found[:, :rows], drawn.to(device))
        assert torch.equal(found.cpu(), inputs)
    assert inputs[0, 149] == 100_149
    assert inputs[0, 150] == 0
    assert inputs[1, 149] == 305 + 149 + 1
    assert inputs[1, 150] == 305 + 150


def compare_attention(case: Case, device: torch.device, bound: float) -> None:
    """Chunks of one request, over the border of its ring where it has a window, each with padding
    behind it or without, then a step."""
    generator = torch.Generator().manual_seed(1)
    rotary = torch.empty(2, 1024, case.head_dim // 2)
    fill_rotary(rotary, RopeSpec(theta=1e4), case.head_dim)
    # A window and a chunk lie in two pages at most here, which all tokens go around.
    ring = 2 if case.window else 3
    pages = torch.randperm(SLOTS * ring, generator=generator).view(SLOTS, ring).int()
    pool = (SLOTS * ring, case.kv_heads, PAGE_TOKENS, case.head_dim)
    expected_pools = [torch.zeros(pool).to(case.kv_dtype) for _ in range(2)]
    pools = [torch.zeros(pool).to(case.kv_dtype).to(device) for _ in range(2)]
    norms = [
        torch.rand(case.head_dim, generator=generator).to(case.dtype) if case.normed else None
        for _ in range(2)
    ]
    partials = torch.empty(SLOTS, case.heads, 4, case.head_dim + 2)
    position = 0
    chunks = [(torch.full((n,), 1), True, 70 * (number % 2)) for number, n in enumerate(CHUNKS)]
    for slots, one_request, padding in [*chunks, (torch.tensor([0, 1, -1]), False, 0)]:
        rows = len(slots)
        at = torch.arange(position, position + rows)
        if not one_request:
            at = torch.tensor([3, position, 5])
        qkv = torch.randn(
            (rows, (case.heads + 2 * case.kv_heads) * case.head_dim), generator=generator
        ).to(case.dtype)
        placed = (at.int(), slots.int(), pages)
        expected_qkv, found_qkv = qkv.float().clone(), qkv.to(device)
        expected_norms = [None if norm is None else norm.float() for norm in norms]
        operators.rotate_and_store(
            expected_qkv, rotary, *placed, *expected_pools, *expected_norms, 1e-6
        )
        found_qkv = torch.cat((found_qkv, found_qkv[:1].expand(padding, -1)))
        filled = (at.new_zeros(padding), slots.new_full((padding,), -1))
        there = (
            torch.cat((at, filled[0])).int().to(device),
            torch.cat((slots, filled[1])).int().to(device),
            pages.to(device),
        )
        _kernels().rotate_and_store(
            found_qkv,
            rotary.to(device),
            *there,
            *pools,
            *(None if norm is None else norm.to(device) for norm in norms),
            1e-6,
        )
        expected = torch.empty(rows, case.heads * case.head_dim)
        found = torch.full(
            (rows + padding, expected.shape[1]), torch.nan, dtype=case.dtype, device=device
        )
        scale, window = case.head_dim**-0.5, case.window
        operators.attend(
            expected_qkv, *placed, *expected_pools, expected, partials, scale, window, one_request
        )
        _attention().attend(
            found_qkv, *there, *pools, found, partials.to(device), scale, window, one_request
        )
        queries = case.heads * case.head_dim
        found_qkv, found = found_qkv[:rows], found[:rows]
        assert error(found_qkv[:, :queries], expected_qkv[:, :queries]) < bound
        assert error(found, expected) < bound
        if not one_request:
            assert not found[2].any()
        position += rows
    for ours, right in zip(pools, expected_pools, strict=True):
        assert error(ours.float(), right.float()) < bound


def bound_of(case: Case) -> float:
    """What rounding allows: a value of e4m3 may fall on the other side of a tie."""
    if case.dtype is torch.float32:
        return 2e-3 if case.kv_dtype is torch.float8_e4m3fn else 1e-5
    return 3e-2 if case.kv_dtype is torch.float8_e4m3fn else 1e-2


def compare_e4m3(device: torch.device) -> None:
    """Every kind of value becomes what torch makes of it, clamped."""
    generator = torch.Generator().manual_seed(2)
    sizes = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
    values = torch.cat([torch.randn(80, generator=generator) * size for size in sizes])
    keys = torch.zeros(16, 1, PAGE_TOKENS, 2)
    keys = keys.to(torch.float8_e4m3fn).to(device)
    stored = torch.zeros_like(keys.view(torch.uint8)).view(torch.float8_e4m3fn)
    rows = len(values) // 2
    qkv = torch.zeros(rows, 6)
    qkv[:, 4:] = values.view(rows, 2)
    rotary = torch.stack((torch.ones(rows, 1), torch.zeros(rows, 1)))
    at = torch.arange(rows).int()
    pages = torch.arange(16).view(1, 16).int()
    _kernels().rotate_and_store(
        qkv.to(device),
        rotary.to(device),
        at.to(device),
        torch.zeros_like(at).to(device),
        pages.to(device),
        keys,
        stored,
        None,
        None,
        1e-6,
    )
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    found = stored.cpu().view(torch.uint8).view(-1)[: len(values)]
    assert torch.equal(found, expected)


def _kernels() -> Any:
    from oomproof.engine.native import kernels_triton

    return kernels_triton


def _gate() -> Any:
    from oomproof.quantization import gate_triton

    return gate_triton


def _attention() -> Any:
    from oomproof.engine.native import attend_triton

    return attend_triton


if __name__ == "__main__":
    compare_elementwise(CPU, torch.float32, 1e-5)
    compare_e4m3(CPU)
    compare_next_inputs(CPU)
    for one in CASES:
        compare_attention(one, CPU, bound_of(one))
