"""Attention with its gradient: plain torch's are autograd's, the GPU's are plain torch's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from oomproof.errors import InputError
from oomproof.tuning.attention import Attention, Documents, choose_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCALE = 0.3
PACKED = (0, 5, 6, 16, 24, 32)
ROWS = (0, 16, 32)


def documents(bounds: tuple[int, ...], device: torch.device = CPU) -> Documents:
    cumulative = None
    if len(bounds) > 3:
        cumulative = torch.tensor(bounds, dtype=torch.int32, device=device)
    return Documents(bounds=bounds, length=16, cumulative=cumulative)


def implementation(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    return choose_attention(name, device=device, dtype=dtype, head_dim=head_dim, scale=SCALE)


def inputs(dtype: torch.dtype, head_dim: int, tokens: int = 32) -> list[torch.Tensor]:
    """Queries, keys and values as parts of one tensor, as a layer has them."""
    generator = torch.Generator().manual_seed(4)
    whole = torch.randn((tokens, 8, head_dim), generator=generator, dtype=torch.float64).to(dtype)
    return list(whole.split((4, 2, 2), dim=1))


def expected_of(qkv: list[torch.Tensor], grad: torch.Tensor, bounds: Any, window: int) -> Any:
    """(output, gradients) of torch's own attention, document by document."""
    leaves = [part.detach().clone().requires_grad_() for part in qkv]
    found = []
    for first, end in pairwise(bounds):
        query, key, value = (part[first:end].transpose(0, 1)[None] for part in leaves)
        back = torch.arange(end - first)[:, None] - torch.arange(end - first)
        seen = (back >= 0) & (back < window) if window else back >= 0
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=SCALE, enable_gqa=True
        )
        found.append(out[0].transpose(0, 1))
    out = torch.cat(found).reshape(len(grad), -1)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("bounds", [ROWS, PACKED])
@pytest.mark.parametrize("window", [0, 4])
def test_plain_attention_has_autograds_gradients(bounds: tuple[int, ...], window: int) -> None:
    qkv, attention = inputs(torch.float64, 6), implementation("auto", CPU, torch.float64, 6)
    grad = torch.randn(32, 24, dtype=torch.float64)
    out, gradients = expected_of(qkv, grad, bounds, window)
    attended = attention.forward(qkv, documents(bounds), window)
    torch.testing.assert_close(attended.out, out)
    found = attention.backward(grad, qkv, attended, documents(bounds), window)
    torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("name", ["flash", "cudnn", "Flash"])
def test_what_does_not_run_here_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        implementation(name, CPU, torch.bfloat16, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "cudnn"])
@pytest.mark.parametrize("bounds", [ROWS, PACKED])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_on_a_gpu_is_plain_torchs(
    name: str, bounds: tuple[int, ...], window: int, head_dim: int
) -> None:
    qkv = inputs(torch.bfloat16, head_dim)
    grad = torch.randn(32, 4 * head_dim).bfloat16()
    out, gradients = expected_of([one.float() for one in qkv], grad.float(), bounds, window)
    whole = torch.cat(qkv, dim=1).to(CUDA)
    there = list(whole.split((4, 2, 2), dim=1))
    attention, packed = (
        implementation(name, CUDA, torch.bfloat16, head_dim),
        documents(bounds, CUDA),
    )
    attended = attention.forward(there, packed, window)
    found = attention.backward(grad.to(CUDA), there, attended, packed, window)
    for one, right in zip((attended.out, *found), (out, *gradients), strict=True):
        assert float((one.cpu().float() - right).norm() / right.norm()) < 2e-2
