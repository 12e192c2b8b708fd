"""LoRA's kernels against their references, on any device; run in Triton's interpreter too.

`python -m tests.engine.native.lora_cases` with TRITON_INTERPRET=1 compares on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from oomproof.engine.native import lora_operators as declared
from oomproof.memory.adapter import LORA_SPLITS, LORA_STEP_TOKENS

CPU = torch.device("cpu")
operators: Any = declared


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Linears that share an input."""

    tokens: int
    columns: int
    rows: tuple[int, ...]
    """Of each linear's result."""
    ranks: tuple[int, ...]
    """Of each linear's adapter, a multiple of 8; 0 where it has none."""


CASES = (
    Case(tokens=1, columns=200, rows=(70,), ranks=(8,)),
    Case(tokens=3, columns=4000, rows=(128, 40, 40), ranks=(16, 0, 8)),
    Case(tokens=17, columns=136, rows=(65, 65), ranks=(24, 8)),
    Case(tokens=33, columns=72, rows=(96, 96), ranks=(0, 40)),
    Case(tokens=64, columns=2056, rows=(64, 64, 64), ranks=(8, 8, 8)),
)
GPU_CASES = (
    *CASES,
    Case(tokens=1, columns=4096, rows=(4096, 1024, 1024), ranks=(16, 16, 16)),
    Case(tokens=8, columns=14336, rows=(4096,), ranks=(16,)),
    Case(tokens=32, columns=4096, rows=(14336, 14336), ranks=(64, 64)),
    Case(tokens=65, columns=4096, rows=(4096, 1024, 1024), ranks=(16, 0, 16)),
    Case(tokens=300, columns=512, rows=(1000, 1000), ranks=(8, 256)),
)


def compare(case: Case, device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """The largest difference from plain torch in float64, over the result's own size."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    x = random(case.tokens, case.columns) / case.columns**0.5
    rank, width = sum(case.ranks), sum(case.rows)
    a = random(rank, case.columns)
    b, places = [], []
    column = first = 0
    for rows, ranks in zip(case.rows, case.ranks, strict=True):
        if ranks:
            b.append(random(rows, ranks))
            places += [column, first, ranks]
        column, first = column + rows, first + ranks
    scratch = _scratch(case, rank, dtype, device)
    # Results are a part of the columns of a wider tensor.
    out = random(case.tokens, width + 16)[:, :width]
    expected = _expected(x, a, b, places, out)
    given = out.clone()
    _down(x, a, scratch)
    _up(scratch, rank, b, places, out)
    _assert_near(out, expected, bound)
    if len(case.rows) == 2:
        gate, up = expected.chunk(2, dim=1)
        gated = torch.empty(case.tokens, case.rows[0], dtype=dtype, device=device)
        _up_gated(scratch, rank, b, places, given, gated)
        _assert_near(gated, torch.nn.functional.silu(gate) * up, 2 * bound)


def _down(x: torch.Tensor, a: torch.Tensor, scratch: torch.Tensor) -> None:
    if x.is_cuda:
        operators.lora_down(x, a, scratch)
    else:
        _interpreted().down(x, a, scratch)


def _up(
    scratch: torch.Tensor, rank: int, b: list[torch.Tensor], places: list[int], out: torch.Tensor
) -> None:
    if out.is_cuda:
        operators.lora_up(scratch, rank, b, places, out)
    else:
        _interpreted().up(scratch, rank, b, tuple(declared.placed(places)), out)


def _up_gated(
    scratch: torch.Tensor,
    rank: int,
    b: list[torch.Tensor],
    places: list[int],
    gate_up: torch.Tensor,
    out: torch.Tensor,
) -> None:
    if out.is_cuda:
        operators.lora_up_gated(scratch, rank, b, places, gate_up, out)
    else:
        _interpreted().up_gated(scratch, rank, b, tuple(declared.placed(places)), gate_up, out)


def _interpreted() -> Any:
    from oomproof.engine.native import lora_triton

    return lora_triton


def _scratch(case: Case, rank: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    size = rank * max(case.tokens * dtype.itemsize, LORA_SPLITS * LORA_STEP_TOKENS * 4)
    # What was there before is of no use, whatever it was.
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=device)


def _expected(
    x: torch.Tensor, a: torch.Tensor, b: list[torch.Tensor], places: list[int], out: torch.Tensor
) -> torch.Tensor:
    wide = out.double()
    down = (x.double() @ a.double().t()).to(x.dtype).double()
    for factor, (column, first, ranks) in zip(b, declared.placed(places), strict=True):
        part = wide[:, column : column + len(factor)]
        part += down[:, first : first + ranks] @ factor.double().t()
    return wide


def _assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < bound, float(error)


if __name__ == "__main__":
    # The interpreter multiplies bfloat16's bits as whole numbers.
    for one in CASES:
        for kind, most in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
            compare(one, CPU, kind, most)
