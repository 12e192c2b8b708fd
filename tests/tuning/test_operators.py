"""Training's operators: their gradients are autograd's, and the kernels compute the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from oomproof.engine.native.rotary import fill_rotary
from oomproof.models.forward import RopeSpec
from oomproof.tuning import operators as declared
from tests.tuning.kernel_cases import COMPARISONS

operators: Any = declared
EPS = 1e-6


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def autograd(compute: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Any:
    """(result, a gradient of it, gradients of the inputs)."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    out = compute(*leaves)
    grad = normal(*out.shape, seed=9)
    return out.detach(), grad, torch.autograd.grad(out, leaves, grad)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPS)


def rotated(x: torch.Tensor, rotary: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cosine, sine = (part[positions.long()][:, None] for part in rotary)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)


def test_the_gradient_of_a_norm_is_autograds() -> None:
    x, weight = normal(5, 24), normal(24, seed=1)
    out, grad, (expected,) = autograd(lambda x: norm(x, weight), x)
    found = torch.empty_like(x)
    operators.rms_norm(x, weight, EPS, found)
    torch.testing.assert_close(found, out)
    operators.rms_norm_backward(grad, x, weight, EPS, found, False, None)
    torch.testing.assert_close(found, expected)
    rounded = torch.empty_like(found, dtype=torch.bfloat16)
    operators.rms_norm_backward(grad, x, weight, EPS, found, True, rounded)
    torch.testing.assert_close(found, 2 * expected)
    assert torch.equal(rounded, found.bfloat16())


def test_updates_add_up_in_float32_and_what_is_kept_is_what_is_normalised() -> None:
    stream, weight = normal(5, 24).float(), normal(24, seed=1).bfloat16()
    update = (1e-3 * normal(5, 24, seed=2)).bfloat16()
    expected, rounded, out = stream + update.float(), torch.empty_like(update), update.clone()
    operators.accumulate(stream, out, rounded, weight, EPS, out)
    assert torch.equal(stream, expected)
    assert torch.equal(rounded, expected.bfloat16())
    again = torch.empty_like(out)
    operators.rms_norm(rounded, weight, EPS, again)
    assert torch.equal(out, again)


def test_an_operator_is_reached_without_the_dispatcher_too() -> None:
    x = normal(3, 8)
    out = torch.empty_like(x)
    declared.rms_norm.on("cpu")(x, normal(8), EPS, out)
    torch.testing.assert_close(out, norm(x, normal(8)))
    with torch.device("meta"):
        declared.rms_norm.on("meta")(torch.empty(3, 8), torch.empty(8), EPS, torch.empty(3, 8))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_on_a_gpu_that_is_the_kernels_launch() -> None:
    from oomproof.tuning import kernels_triton

    assert declared.rms_norm.on("cuda") is kernels_triton.rms_norm


@pytest.mark.parametrize("normed", [False, True])
def test_the_gradient_of_a_rotation_is_autograds(normed: bool) -> None:
    rotary = torch.empty(2, 16, 4)
    fill_rotary(rotary, RopeSpec(theta=1e4), 8)
    x, positions = normal(6, 3, 8), torch.tensor([0, 1, 2, 0, 1, 15], dtype=torch.int32)
    weight = normal(8, seed=2) if normed else None

    def compute(x: torch.Tensor) -> torch.Tensor:
        return rotated(x if weight is None else norm(x, weight), rotary, positions)

    out, grad, (expected,) = autograd(compute, x)
    found = x.clone()
    operators.rotate(found, rotary, positions, weight, EPS, found)
    torch.testing.assert_close(found, out)
    found = x.clone()
    operators.rotate_backward(grad, found, rotary, positions, weight, EPS, found)
    torch.testing.assert_close(found, expected)


def test_the_gradient_of_a_gate_is_autograds() -> None:
    gate, up = normal(4, 10), normal(4, 10, seed=1)
    compute = lambda gate, up: torch.nn.functional.silu(gate) * up  # noqa: E731
    out, grad, (of_gate, of_up) = autograd(compute, gate, up)
    operators.silu_mul_backward(gate, up, grad)
    for found, expected in ((gate, of_gate), (up, of_up), (grad, out)):
        torch.testing.assert_close(found, expected)


def test_the_gradient_of_the_loss_is_autograds() -> None:
    logits, labels = 3 * normal(5, 40), torch.tensor([0, 39, 7, 7, 20])
    leaf = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf / 2, labels, reduction="none")
    (grad,) = torch.autograd.grad(expected.sum() * 0.2, leaf)
    losses = torch.empty(5, dtype=torch.float64)
    scale = torch.tensor([0.2])
    before = logits.clone()
    operators.cross_entropy_(logits, labels, 0.5, scale, losses, False)
    assert torch.equal(logits, before)
    operators.cross_entropy_(logits, labels, 0.5, scale, losses, True)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(logits, grad, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_interpreted_kernels_compute_what_plain_torch_computes() -> None:
    # In a process of its own: triton reads the variable when it is imported.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.tuning.kernel_cases"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("compare", COMPARISONS)
def test_kernels_on_a_gpu_are_the_references(
    compare: Callable[..., None], dtype: torch.dtype, bound: float
) -> None:
    compare(torch.device("cuda"), dtype, bound)
