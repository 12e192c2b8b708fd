"""SwiGLU's gate in CUDA C++ against plain torch; what it is not for goes to Triton."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from oomproof.quantization import gate_cuda, gate_triton


@pytest.mark.parametrize(
    ("dtype", "width", "first"),
    [(torch.float32, 64, 0), (torch.bfloat16, 63, 0), (torch.bfloat16, 64, 4)],
)
def test_other_types_and_rows_that_are_no_vectors_are_tritons(
    dtype: torch.dtype, width: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(gate_triton, "silu_mul", lambda *given: calls.append(given))
    wide = torch.zeros(2, 80, dtype=dtype)
    part = wide[:, first : first + width]
    gate_cuda.silu_mul(part, part, part)
    assert len(calls) == 1
    vectors = dtype is not torch.float32 and width % 8 == 0 and first % 8 == 0
    assert gate_cuda._in_vectors(width, (part,)) == (vectors or dtype is torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 2040), (5, 2056), (300, 4096)])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_gate_is_plain_torchs(
    rows: int, width: int, dtype: torch.dtype, *, in_place: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    wide = (8 * torch.randn(rows, 2 * width + 16, generator=generator)).to(dtype)
    # exp of what is far below zero is infinite in float32.
    wide[0, :4] = torch.tensor([-300.0, 300.0, 0.0, -88.0])
    expected = torch.nn.functional.silu(wide[:, :width].float()) * wide[:, width : 2 * width]
    there = wide.cuda()
    gate, up = there[:, :width], there[:, width : 2 * width]
    out = gate if in_place else torch.full_like(there, float("nan"))[:, :width]
    gate_cuda.silu_mul(gate, up, out)
    torch.testing.assert_close(out.cpu(), expected.to(dtype), rtol=2**-7, atol=1e-6)
    assert torch.equal(there[:, width:].cpu(), wide[:, width:])
