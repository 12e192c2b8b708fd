"""Attention with its gradient: plain torch's are autograd's, the GPU's are plain torch's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from oomproof.errors import InputError
from oomproof.tuning import attention_choice
from oomproof.tuning.attention import (
    Attention,
    Cudnn,
    Documents,
    Flash,
    Plain,
)
from oomproof.tuning.attention_choice import choose_attention

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
    return choose_attention(
        name, device=device, dtype=dtype, heads=(4, 2), head_dim=head_dim, scale=SCALE
    )


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
    qkv, plain = inputs(torch.float64, 6), implementation("auto", CPU, torch.float64, 6)
    grad = torch.randn(32, 24, dtype=torch.float64)
    out, gradients = expected_of(qkv, grad, bounds, window)
    attended = plain.forward(qkv, documents(bounds), window)
    torch.testing.assert_close(attended.out, out)
    found = plain.backward(grad, qkv, attended, documents(bounds), window)
    torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("name", ["flash", "cudnn", "Flash"])
def test_what_does_not_run_here_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        implementation(name, CPU, torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("capability", "version", "head_dim", "refusal", "expected"),
    [
        ((9, 0), 91_002, 128, None, Cudnn),
        ((8, 0), 90_000, 64, None, Cudnn),
        ((7, 5), 91_002, 64, None, Flash),
        ((9, 0), 8_902, 64, None, Flash),
        ((9, 0), None, 64, None, Flash),
        ((9, 0), 91_002, 256, None, Flash),
        ((9, 0), 91_002, 64, RuntimeError("no plan"), Flash),
    ],
)
def test_a_gpu_uses_cudnns_where_it_computes_an_example_and_says_why_not(
    capability: tuple[int, int],
    version: int | None,
    head_dim: int,
    refusal: Exception | None,
    expected: type[Attention],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def example(*_: object) -> None:
        if refusal is not None:
            raise refusal

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: version is not None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(attention_choice, "_try", example)
    with caplog.at_level("INFO"):
        found = implementation("auto", CUDA, torch.bfloat16, head_dim)
    assert type(found) is expected
    assert bool(caplog.messages) == (expected is Flash)


def test_memory_that_runs_out_is_no_reason_for_another_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def example(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_002)
    monkeypatch.setattr(attention_choice, "_try", example)
    with pytest.raises(torch.OutOfMemoryError):
        implementation("auto", CUDA, torch.bfloat16, 64)


def test_the_example_is_attention_with_its_gradient() -> None:
    attention_choice._try(Plain(SCALE), CPU, torch.float32, (4, 2), 8)


@pytest.mark.gpu
def test_a_gpu_of_today_uses_cudnns_attention() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    assert type(implementation("auto", CUDA, torch.bfloat16, 128)) is Cudnn


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
    chosen, packed = (
        implementation(name, CUDA, torch.bfloat16, head_dim),
        documents(bounds, CUDA),
    )
    attended = chosen.forward(there, packed, window)
    found = chosen.backward(grad.to(CUDA), there, attended, packed, window)
    for one, right in zip((attended.out, *found), (out, *gradients), strict=True):
        assert float((one.cpu().float() - right).norm() / right.norm()) < 2e-2
