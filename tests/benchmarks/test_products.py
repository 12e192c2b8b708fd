"""Products alone: the same codes on both sides, what is counted, and what is written."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from benchmarks.products import (
    MODELS,
    MOST_ERROR,
    SCRATCH_BYTES,
    Shape,
    describe,
    error,
    layer_shapes,
    make_copies,
    measure,
    record,
    theirs,
)

from oomproof.engine.native.step_products import products_of
from oomproof.formats import get_format
from oomproof.models.resolve import resolve
from oomproof.quantization import reference
from oomproof.quantization.products_tiled import prepare
from oomproof.session import plan

CPU = torch.device("cpu")
SMALL = layer_shapes(256, 512, 2, 1)
"""Rows of k and v are fewer than those of q."""


@pytest.mark.parametrize("model", MODELS)
def test_shapes_and_bytes_are_those_of_the_models_decode_steps(model: str) -> None:
    made = plan(model, gpus="H200", format="nf4-dq", engine="native", context=256)
    products = products_of(made, resolve(model))
    assert len(products) == len(MODELS[model])
    for product, shape in zip(products, MODELS[model], strict=True):
        placed = product.block.placed
        assert product.name == shape.name
        assert product.is_gated == shape.in_turn
        assert [one.matrix_shape for one in placed] == [(n, shape.columns) for n in shape.rows]
        tables = 4 * (16 + 256 + 1)
        stored = [
            sum(c.size_bytes for c in get_format("nf4-dq").components(*one.matrix_shape)) - tables
            for one in placed
        ]
        assert sum(stored) == shape.weight_bytes


@pytest.mark.parametrize("shape", SMALL, ids=[shape.name for shape in SMALL])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_tiles_hold_the_codes_that_bitsandbytes_multiplies_with(shape: Shape, tokens: int) -> None:
    torch.manual_seed(0)
    copies = make_copies(shape, CPU, 2, made_up=False)
    x = torch.randn(tokens, shape.columns, dtype=torch.bfloat16)
    for weights, peers in zip(copies.ours, copies.linears, strict=True):
        product = x.new_empty(tokens, weights.rows)
        reference.linear_4bit_tiled(x, weights, product)
        assert error(product, theirs(x, peers), gated=False) < MOST_ERROR
    other = theirs(x, copies.linears[0])
    assert error(product, other, gated=False) > 1
    assert len(copies.stacked) == (2 if len(shape.rows) > 1 else 0)


def test_a_gate_is_compared_as_a_gate() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    gated = torch.nn.functional.silu(gate) * up
    assert error(gated, [gate, up], gated=True) < 1e-6
    assert error(-gated, [gate, up], gated=True) == pytest.approx(2)


def test_without_bitsandbytes_ours_have_made_up_codes_of_the_same_shapes() -> None:
    for shape in SMALL:
        alone = make_copies(shape, CPU, 3, made_up=True)
        beside = make_copies(shape, CPU, 1, made_up=False)
        assert (len(alone.ours), alone.linears, alone.stacked) == (3, (), ())
        for one, other in zip(alone.ours[0].arguments(), beside.ours[0].arguments(), strict=True):
            assert not isinstance(one, torch.Tensor) or one.shape == other.shape  # type: ignore[union-attr]


def test_a_record_has_speeds_and_the_ratio_to_the_better_peer() -> None:
    shape = Shape(name="gate_up", rows=(512, 512), columns=256)
    us = {"ours": 2.0, "bitsandbytes": 9.0, "bitsandbytes_stacked": 8.0}
    row: dict[str, Any] = record(shape, 4, us, copies=2, relative_error=1e-3)
    assert row["ratio"] == 4
    assert row["tb_per_s"]["ours"] == pytest.approx(shape.weight_bytes / 2e-6 / 1e12)
    assert json.loads(json.dumps(row))["rows"] == [512, 512]
    assert "1024×256 M 4: ours 2.0 µs" in describe("a-model", row)
    assert row["agrees"]
    assert "DIFFERS" not in describe("a-model", row)
    wrong = record(shape, 4, us, copies=2, relative_error=0.1)
    assert describe("a-model", wrong).endswith("× 4.00, DIFFERS by 1.0e-01")
    assert record(shape, 4, us, copies=2, relative_error=float("nan"))["agrees"] is False
    alone: dict[str, Any] = record(shape, 4, {"ours": 2.0}, copies=2, relative_error=None)
    assert alone["ratio"] is None
    assert "bitsandbytes is not here" in describe("a-model", alone)


@pytest.mark.gpu
@pytest.mark.parametrize("made_up", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 32])
def test_small_products_are_timed_beside_bitsandbytes(tokens: int, made_up: bool) -> None:
    device = torch.device("cuda", 0)
    prepare(torch.bfloat16, torch.uint8, device)
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        for shape in SMALL:
            copies = make_copies(shape, device, 2, made_up=made_up)
            row: dict[str, Any] = measure(copies, tokens, scratch)
            assert all(us > 0 for us in row["us"].values())
            assert row["agrees"] is (None if made_up else True)
            assert set(row["us"]) >= ({"ours"} if made_up else {"ours", "bitsandbytes"})
