"""Mixtures within a number of bytes."""

from __future__ import annotations

import pytest

from oomproof.errors import InputError
from oomproof.formats import DType, Format, get_format
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.memory.weights import stored
from oomproof.models.resolve import resolve
from oomproof.planning.damage import WeightErrors
from oomproof.planning.fit_bytes import fit_bytes

ROLES = QUANTIZED_ROLES["native"]
SPEC = resolve("llama-3.1-8b")


def size_bytes(weight_format: Format) -> int:
    return sum(stored(t, weight_format, DType.BFLOAT16, ROLES).stored_bytes for t in SPEC.tensors)


def fitted(budget: int, errors: WeightErrors | None = None) -> Format:
    return fit_bytes(
        SPEC,
        budget,
        compute_dtype=DType.BFLOAT16,
        roles=ROLES,
        errors=errors or WeightErrors(),
    )


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_nearly_all_bytes_are_spent_and_none_more(share: float) -> None:
    low, high = (size_bytes(get_format(name)) for name in ("nf4-dq", "int8"))
    budget = low + int(share * (high - low))
    assert budget - 0.02 * (budget - low) <= size_bytes(fitted(budget)) <= budget


def test_the_smallest_formats_bytes_are_enough_and_one_less_is_refused() -> None:
    least = size_bytes(get_format("nf4-dq"))
    assert fitted(least).members == {"nf4-dq"}
    with pytest.raises(InputError, match=f"takes in nf4-dq, {least:,} bytes .*: use fit:{least}"):
        fitted(least - 1)


def test_with_bytes_for_all_weights_nothing_is_quantized() -> None:
    assert fitted(size_bytes(get_format("bf16"))).members == {"bf16"}


def test_what_errors_cost_most_in_is_raised_first() -> None:
    errors = WeightErrors(sensitivities={"7.gate_up": 1000.0})
    budget = size_bytes(get_format("nf4-dq")) + (64 << 20)
    chosen = fitted(budget, errors)
    assert chosen.for_tensor("model.layers.7.mlp.gate_proj.weight").name == "int8"
