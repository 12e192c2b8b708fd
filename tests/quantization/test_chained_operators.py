"""The products of a chain in plain torch: updates of the hidden states, and their norms."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from oomproof.formats import ceil_div
from oomproof.memory.native import SQUARES_COLUMNS
from oomproof.quantization.chained_operators import chained_linear_4bit, squares_numel
from oomproof.quantization.wide_launch import UNIT_ROWS, WIDE_TEMPLATES
from tests.quantization.test_step_operators import (
    COLUMNS,
    EPS,
    NO_SCRATCH,
    error_of,
    linears,
    norm,
    random_vector,
)
from tests.quantization.weights import PRODUCT_ERRORS, random_input

COUNTERS = torch.zeros(1, dtype=torch.int32)


def new_squares(hidden: int, tokens: int) -> torch.Tensor:
    return torch.full((squares_numel(hidden, tokens) + 3,), float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiplier", [1.0, 0.25])
def test_an_update_is_added_and_its_squares_are_summed(
    dtype: torch.dtype, multiplier: float
) -> None:
    weights, tokens = linears("nf4-dq", (144,), in_turn=False), 5
    x, hidden = random_input(tokens, COLUMNS, dtype), random_input(tokens, 144, dtype)
    before, squares = hidden.double(), new_squares(144, tokens)
    bias = random_vector(144, dtype)
    chained_linear_4bit(
        x,
        None,
        EPS,
        multiplier,
        *weights.tiled.arguments(),
        [bias],
        False,
        True,
        hidden,
        squares,
        COUNTERS,
        NO_SCRATCH,
    )
    update = x.double() @ weights.exact.t() + bias.double()
    assert error_of(hidden, before + multiplier * update) < PRODUCT_ERRORS[dtype]
    # Three parts of up to 64 columns, for the eight tokens that a kernel is compiled for.
    sums = squares[:-3].view(3, 8)[:, :tokens].double()
    for part, columns in enumerate((slice(0, 64), slice(64, 128), slice(128, 144))):
        assert error_of(sums[part], hidden[:, columns].double().square().sum(dim=1)) < 1e-6


def test_what_one_has_updated_the_next_one_normalises() -> None:
    tokens, update, gates = 9, linears("nf4", (COLUMNS,), in_turn=False), (48, 48)
    gate_up, weight = linears("nf4", gates, in_turn=True), random_vector(COLUMNS, torch.float32, 1)
    x, hidden = random_input(tokens, COLUMNS), random_input(tokens, COLUMNS).flip(0).clone()
    squares, out = new_squares(COLUMNS, tokens), torch.empty(tokens, 48)
    chained_linear_4bit(
        x,
        None,
        EPS,
        1.0,
        *update.tiled.arguments(),
        [],
        False,
        True,
        hidden,
        squares,
        COUNTERS,
        NO_SCRATCH,
    )
    chained_linear_4bit(
        hidden,
        weight,
        EPS,
        1.0,
        *gate_up.tiled.arguments(),
        [],
        True,
        False,
        out,
        squares,
        COUNTERS,
        NO_SCRATCH,
    )
    gate, up = (norm(hidden, weight) @ gate_up.exact.t()).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    assert error_of(out, expected) < 2 * PRODUCT_ERRORS[torch.float32]


@pytest.mark.parametrize("hidden", [64, 144, 4096, 8192])
def test_every_step_finds_room_for_its_squares(hidden: int) -> None:
    assert UNIT_ROWS == SQUARES_COLUMNS
    # As memory.native plans it.
    planned = WIDE_TEMPLATES[-1] * ceil_div(hidden, SQUARES_COLUMNS)
    assert max(squares_numel(hidden, tokens) for tokens in range(1, 65)) == planned


@pytest.mark.parametrize("updates", [False, True])
def test_it_is_declared_as_torch_wants_it(updates: bool) -> None:
    weights, tokens = linears("nf4-dq", (COLUMNS,), in_turn=False), 5
    x, out = random_input(tokens, COLUMNS).contiguous(), torch.zeros(tokens, COLUMNS)
    opcheck(
        chained_linear_4bit._call,
        (
            x,
            None if updates else random_vector(COLUMNS, torch.float32, 1),
            EPS,
            1.0,
            *weights.tiled.arguments(),
            [],
            False,
            updates,
            out,
            torch.ones(squares_numel(COLUMNS, tokens)),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(0, dtype=torch.uint8),
        ),
    )
