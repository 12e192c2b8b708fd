"""The product of a decode step in plain torch: what is fused, written out once more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch.library import opcheck

from oomproof.quantization import operators
from oomproof.quantization.handlers import handler
from oomproof.quantization.step_operators import step_linear_4bit
from oomproof.quantization.tiled import TiledSet
from tests.quantization.weights import (
    PRODUCT_ERRORS,
    random_input,
    random_weight,
    same_bits,
    tiled_set,
)

TILED = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int4")
COLUMNS = 384
EPS = 1e-2
"""Large, so that its place shows."""
NO_SCRATCH = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Linears:
    """A set, and its weights side by side."""

    tiled: TiledSet
    exact: torch.Tensor
    """float64 [rows, columns]."""


@cache
def linears(format_name: str, rows: tuple[int, ...], *, in_turn: bool) -> Linears:
    weights = [(1 + i) * random_weight((n, COLUMNS), seed=i) for i, n in enumerate(rows)]
    encoded = [handler(format_name).encode(weight) for weight in weights]
    decoded = [
        handler(format_name).decode(parts, (n, COLUMNS), torch.float32).double()
        for n, parts in zip(rows, encoded, strict=True)
    ]
    return Linears(
        tiled=tiled_set(format_name, encoded, COLUMNS, in_turn=in_turn), exact=torch.cat(decoded)
    )


def random_vector(size: int, dtype: torch.dtype, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return (mean + 0.5 * torch.randn(size, generator=generator)).to(dtype)


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm in float64, token after token."""
    rows = []
    for row in hidden.double():
        mean_square = sum(float(value) ** 2 for value in row) / len(row)
        rows.append(row / (mean_square + EPS) ** 0.5 * weight.double())
    return torch.stack(rows)


@pytest.mark.parametrize("format_name", TILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_anything_fused_it_is_the_sets_product(
    format_name: str, dtype: torch.dtype
) -> None:
    weights = linears(format_name, (64, 16, 32), in_turn=False)
    x = random_input(3, COLUMNS, dtype)
    out, product = (torch.empty(3, 112, dtype=dtype) for _ in range(2))
    arguments = weights.tiled.arguments()
    step_linear_4bit(x, None, None, None, EPS, 1.0, *arguments, [], False, out, NO_SCRATCH)
    operators.linear_4bit_tiled(x, *arguments, product, NO_SCRATCH)
    assert same_bits(out, product)
    assert error_of(out, x.double() @ weights.exact.t()) < PRODUCT_ERRORS[dtype]


@pytest.mark.parametrize("format_name", TILED)
@pytest.mark.parametrize(("updated", "multiplier"), [(False, 7.0), (True, 1.0), (True, 0.5)])
def test_the_norm_is_of_the_hidden_states_and_their_update(
    format_name: str, updated: bool, multiplier: float
) -> None:
    weights = linears(format_name, (48, 48), in_turn=False)
    hidden = random_input(2, COLUMNS).contiguous()
    kept = hidden.clone()
    update = random_input(4, COLUMNS)[2:] if updated else None
    weight = random_vector(COLUMNS, torch.float32, mean=1.0)
    hidden_out = torch.full_like(hidden, float("nan"))
    wide = torch.full((2, 98), float("nan"))
    step_linear_4bit(
        hidden,
        update,
        weight,
        hidden_out,
        EPS,
        multiplier,
        *weights.tiled.arguments(),
        [],
        False,
        wide[:, 1:-1],
        NO_SCRATCH,
    )
    total = hidden if update is None else hidden + update * multiplier
    assert same_bits(hidden_out, total)
    assert same_bits(hidden, kept)
    assert error_of(wide[:, 1:-1], norm(total, weight) @ weights.exact.t()) < 5e-6
    assert bool(wide[:, [0, -1]].isnan().all())


@pytest.mark.parametrize("format_name", TILED)
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_each_linear_has_its_bias_in_front_of_the_gate(
    format_name: str, in_turn: bool, gated: bool
) -> None:
    weights = linears(format_name, (48, 48), in_turn=in_turn)
    x = random_input(3, COLUMNS)
    biases = [random_vector(48, torch.float32), random_vector(49, torch.float32)[1:]]
    out = torch.empty(3, 48 if gated else 96)
    step_linear_4bit(
        x,
        None,
        None,
        None,
        EPS,
        1.0,
        *weights.tiled.arguments(),
        biases,
        gated,
        out,
        NO_SCRATCH,
    )
    expected = x.double() @ weights.exact.t() + torch.cat(biases).double()
    if gated:
        gate, up = expected[:, :48], expected[:, 48:]
        expected = gate / (1 + (-gate).exp()) * up
    assert error_of(out, expected) < 5e-6


@pytest.mark.parametrize("format_name", TILED)
@pytest.mark.parametrize("biased", [False, True])
def test_a_prompts_gate_and_up_are_those_of_a_step(format_name: str, biased: bool) -> None:
    arguments = linears(format_name, (48, 48), in_turn=True).tiled.arguments()
    x, out, step = random_input(3, COLUMNS), torch.empty(3, 48), torch.empty(3, 48)
    biases = [random_vector(n, torch.float32)[-48:] for n in (48, 49)] if biased else []
    fused = (*arguments, biases, True, step, NO_SCRATCH)
    step_linear_4bit(x, None, None, None, EPS, 1.0, *fused)
    operators.gated_4bit_tiled(x, *arguments, biases, out, NO_SCRATCH)
    assert same_bits(out, step)
    opcheck(operators.gated_4bit_tiled._call, (x, *arguments, biases, out, torch.zeros(0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_rounds_where_the_separate_operations_do(dtype: torch.dtype) -> None:
    weights = linears("nf4-dq", (32, 32), in_turn=True)
    hidden, update = (random_input(n, COLUMNS, dtype)[:2].contiguous() for n in (2, 3))
    weight = random_vector(COLUMNS, dtype, mean=1.0)
    biases = [random_vector(n, dtype)[-32:] for n in (32, 33)]
    hidden_out, out = torch.empty_like(hidden), torch.empty(2, 32, dtype=dtype)
    arguments = weights.tiled.arguments()
    step_linear_4bit(
        hidden,
        update,
        weight,
        hidden_out,
        EPS,
        0.5,
        *arguments,
        biases,
        True,
        out,
        NO_SCRATCH,
    )
    total = hidden + 0.5 * update
    assert same_bits(hidden_out, total)
    variance = total.float().pow(2).mean(-1, keepdim=True)
    normed = weight * (total.float() * torch.rsqrt(variance + EPS)).to(dtype)
    product = torch.empty(2, 64, dtype=dtype)
    operators.linear_4bit_tiled(normed, *arguments, product, NO_SCRATCH)
    gate, up = product[:, :32] + biases[0], product[:, 32:] + biases[1]
    expected = (torch.nn.functional.silu(gate.float()) * up.float()).to(dtype)
    assert same_bits(out, expected)


@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq", "int4"])
def test_the_operator_passes_torchs_own_checks(format_name: str) -> None:
    weights = linears(format_name, (16, 16), in_turn=True)
    x, out = random_input(2, COLUMNS), torch.zeros(2, 16)
    fused = (random_input(3, COLUMNS)[1:], torch.ones(COLUMNS), torch.zeros(2, COLUMNS), EPS, 0.5)
    biases = [torch.ones(16), torch.zeros(16)]
    scratch = torch.zeros(64, dtype=torch.uint8)
    arguments = weights.tiled.arguments()
    opcheck(step_linear_4bit._call, (x, *fused, *arguments, biases, True, out, scratch))


def test_what_is_not_fused_may_be_absent_in_torchs_own_checks() -> None:
    arguments = linears("int4", (16,), in_turn=False).tiled.arguments()
    x, out = random_input(2, COLUMNS), torch.zeros(2, 16)
    before = (None, None, None, EPS, 1.0)
    opcheck(step_linear_4bit._call, (x, *before, *arguments, [], False, out, torch.zeros(0)))


def test_the_fake_kernel_computes_nothing() -> None:
    codes, scales, quant_map, codebook, nested, segments = linears(
        "nf4-dq", (16, 16), in_turn=True
    ).tiled.arguments()
    assert quant_map is not None

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    step_linear_4bit(
        meta(2, COLUMNS),
        meta(2, COLUMNS),
        meta(COLUMNS),
        meta(2, COLUMNS),
        EPS,
        1.0,
        codes.to("meta"),
        scales.to("meta"),
        quant_map.to("meta"),
        codebook,
        [part.to("meta") for part in nested],
        segments,
        [meta(16), meta(16)],
        True,
        meta(2, 16),
        meta(64, dtype=torch.uint8),
    )
