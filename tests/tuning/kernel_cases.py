"""Training's kernels against their references; run with TRITON_INTERPRET=1 it compares on the CPU.

`python -m tests.tuning.kernel_cases`
"""

from __future__ import annotations

from typing import Any

import torch

from oomproof.engine.native.rotary import fill_rotary
from oomproof.models.forward import RopeSpec
from oomproof.tuning import operators as declared

CPU = torch.device("cpu")
operators: Any = declared
"""Called with unpacked arguments, which no type checker follows."""


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error; NaN where anything is not a number."""
    left, right = found.cpu().double(), expected.double()
    return float((left - right).norm() / right.norm().clamp(min=1e-30))


def kernels() -> Any:
    from oomproof.tuning import kernels_triton

    return kernels_triton


def compare(name: str, device: torch.device, arguments: list[Any], bound: float) -> None:
    """What the kernel leaves in each tensor is what the reference leaves in float32."""
    theirs = [
        one.float() if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for one in arguments
    ]
    theirs = [one.clone() if isinstance(one, torch.Tensor) else one for one in theirs]
    ours = [one.to(device) if isinstance(one, torch.Tensor) else one for one in arguments]
    getattr(operators, name)(*theirs)
    getattr(kernels(), name)(*ours)
    for number, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(found, torch.Tensor):
            assert error(found, expected) < bound, (name, number, error(found, expected))


def compare_norms(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """At widths that fill no block."""
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((1, 96), (3, 200), (5, 1030)):
        x, above, grad = torch.randn((3, rows, width), generator=generator).to(dtype)
        weight = torch.rand(width, generator=generator).to(dtype)
        compare("rms_norm", device, [x, weight, 1e-5, torch.empty_like(x)], bound)
        for adds in (False, True):
            for rounded in (None, torch.empty_like(x)):
                arguments = [above, x, weight, 1e-5, grad.float().clone(), adds, rounded]
                compare("rms_norm_backward", device, arguments, bound)


def compare_sums(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """With a norm and without, what is rounded kept and not, in the update's place and not."""
    generator = torch.Generator().manual_seed(6)
    for rows, width in ((1, 96), (3, 200), (5, 1030)):
        stream, update = torch.randn((2, rows, width), generator=generator)
        update, weight = update.to(dtype), torch.rand(width, generator=generator).to(dtype)
        for rounded in (None, torch.empty_like(update)):
            for norm, out in ((None, None), (weight, torch.empty_like(update))):
                arguments = [stream.clone(), update, rounded, norm, 1e-5, out]
                compare("accumulate", device, arguments, bound)
        there = [one.clone().to(device) for one in (stream, update, weight)]
        kernels().accumulate(there[0], there[1], None, there[2], 1e-5, there[1])
        expected, out = stream.clone(), update.clone()
        operators.accumulate(expected, update, None, weight, 1e-5, out)
        assert error(there[0], expected) < bound
        assert error(there[1], out) < bound


def compare_rotations(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Heads of wider tensors, with norms and without, in place and not."""
    generator = torch.Generator().manual_seed(1)
    rows, heads, head_dim = 5, 3, 12
    rotary = torch.empty(2, 64, head_dim // 2)
    fill_rotary(rotary, RopeSpec(theta=1e4), head_dim)
    positions = torch.tensor([0, 1, 2, 0, 63], dtype=torch.int32)
    for weight in (None, torch.rand(head_dim, generator=generator).to(dtype)):
        wide = torch.randn((rows, heads + 2, head_dim), generator=generator).to(dtype)
        grad = torch.randn((rows, heads, head_dim), generator=generator).to(dtype)
        x = wide[:, 1 : heads + 1]
        out = torch.empty_like(grad)
        compare("rotate", device, [x, rotary, positions, weight, 1e-6, out], bound)
        compare("rotate_backward", device, [grad, x, rotary, positions, weight, 1e-6, out], bound)
        expected = x.float().clone()
        operators.rotate(expected, rotary, positions, _float(weight), 1e-6, expected)
        found = wide.clone().to(device)
        place = found[:, 1 : heads + 1]
        there = (rotary.to(device), positions.to(device), _on(weight, device))
        kernels().rotate(place, *there, 1e-6, place)
        assert error(place, expected) < bound
        assert torch.equal(found[:, 0].cpu(), wide[:, 0])
        place.copy_(x)
        kernels().rotate_backward(grad.to(device), place, *there, 1e-6, place)
        operators.rotate_backward(
            grad.float(), x.float(), rotary, positions, _float(weight), 1e-6, expected
        )
        assert error(place, expected) < bound


def compare_gates(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Gate and up as halves of one tensor."""
    generator = torch.Generator().manual_seed(2)
    for rows, width in ((1, 8), (3, 1030)):
        both = torch.randn((rows, 2 * width), generator=generator).to(dtype)
        grad = torch.randn((rows, width), generator=generator).to(dtype)
        expected = [*both.float().chunk(2, dim=1), grad.float()]
        expected = [one.clone() for one in expected]
        operators.silu_mul_backward(*expected)
        there, above = both.clone().to(device), grad.clone().to(device)
        kernels().silu_mul_backward(*there.chunk(2, dim=1), above)
        for found, right in zip((*there.chunk(2, dim=1), above), expected, strict=True):
            assert error(found, right) < bound


def compare_gates_with_adapters(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Ranks that fill no matrix instruction; the products are columns of a wider tensor."""
    generator = torch.Generator().manual_seed(5)
    for rows, width, rank in ((1, 8, 1), (40, 200, 16), (33, 130, 20)):
        both = torch.randn((rows, 2 * width), generator=generator).to(dtype)
        grad = torch.randn((rows, width), generator=generator).to(dtype)
        wide = torch.randn((rows, 3 * rank), generator=generator).to(dtype)
        gate_b, up_b = torch.randn((2, width, rank), generator=generator).to(dtype)
        for name in ("silu_mul_low", "silu_mul_low_backward"):
            expected = [one.float().clone() for one in (*both.chunk(2, dim=1), grad)]
            low = wide[:, rank:]
            getattr(operators, name)(
                *expected[:2], low.float(), gate_b.float(), up_b.float(), 0.5, expected[2]
            )
            there, out = both.clone().to(device), grad.clone().to(device)
            found = [*there.chunk(2, dim=1), out]
            low = wide.to(device)[:, rank:]
            bs = (gate_b.to(device), up_b.to(device))
            getattr(kernels(), name)(*found[:2], low, *bs, 0.5, out)
            for one, right in zip(found, expected, strict=True):
                assert error(one, right) < bound


def compare_losses(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Vocabularies that fill no block, and one of several blocks; large logits too."""
    generator = torch.Generator().manual_seed(3)
    for rows, vocab, size in ((1, 40, 1.0), (3, 5000, 1.0), (2, 8192, 40.0)):
        logits = (size * torch.randn((rows, vocab), generator=generator)).to(dtype)
        labels = torch.randint(0, vocab, (rows,), generator=generator)
        scale, losses = torch.tensor([0.25]), torch.zeros(rows)
        for writes in (False, True):
            arguments = [logits.clone(), labels, 0.5, scale, losses.clone(), writes]
            compare("cross_entropy_", device, arguments, bound)


def compare_dropout(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """The same mask everywhere, of about the share that was asked for."""
    x = torch.ones(33, 300, dtype=dtype)
    for seed, probability in ((1, 0.1), (0x7FFFFFFF, 0.75)):
        out = torch.full_like(x, 2)
        for adds in (False, True):
            compare("drop", device, [x, seed, probability, out.clone(), adds], bound)
        operators.drop(x, seed, probability, out, False)
        assert abs(float((out == 0).double().mean()) - probability) < 0.02


def _float(weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight is None else weight.float()


def _on(weight: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if weight is None else weight.to(device)


COMPARISONS = (
    compare_norms,
    compare_sums,
    compare_rotations,
    compare_gates,
    compare_gates_with_adapters,
    compare_losses,
    compare_dropout,
)

if __name__ == "__main__":
    for one in COMPARISONS:
        one(CPU, torch.float32, 1e-5)
