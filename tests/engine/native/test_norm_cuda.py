"""The norm of few tokens on a GPU against its reference."""

from __future__ import annotations

import pytest
import torch

from oomproof.engine.native.norm_cuda import add_rms_norm_step, supports_norm
from oomproof.engine.native.operators import add_rms_norm


def test_what_the_kernel_does_not_fit_is_left_to_the_operator() -> None:
    assert not supports_norm(torch.zeros(1, 4096))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [8, 136, 4096, 8192, 16384])
@pytest.mark.parametrize("tokens", [1, 7, 32])
@pytest.mark.parametrize("adds", [True, False])
def test_few_tokens_are_normalised_as_the_reference_does(
    tokens: int, columns: int, dtype: torch.dtype, *, adds: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(tokens, columns + 8, generator=generator).to(dtype) for _ in range(2)]
    weight = torch.rand(columns, generator=generator).to(dtype)
    expected = [part[:, :columns].clone() for part in wide]
    add_rms_norm(expected[0], expected[1], weight, 1e-5, 0.5, adds)
    found = [part.cuda()[:, :columns] for part in wide]
    assert supports_norm(found[0])
    add_rms_norm_step(found[0], found[1], weight.cuda(), 1e-5, 0.5, adds)
    assert torch.equal(found[0].cpu(), expected[0])
    # The sum of squares is added in another order: a last bit may differ.
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=2**-7, atol=1e-6)
