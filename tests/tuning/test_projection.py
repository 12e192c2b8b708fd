"""A product beside adapters: what they add survives 16 bits, as autograd's gradients do."""

from __future__ import annotations

import pytest
import torch

from oomproof.memory.training_shape import Kept
from oomproof.models.resolve import bundled_folder
from oomproof.tuning.layer import LayerPasses
from oomproof.tuning.projection import Product
from tests.tuning.models import gradients, largest_error, ours, tokens_of

TINY = bundled_folder()
TOKENS = 512


def product(kind: str, scale: float) -> tuple[LayerPasses, Product]:
    """(passes, a product of the first layer whose adapters add a little)."""
    model = ours(TINY, dtype=torch.bfloat16, tokens=TOKENS)
    passes = model._core._passes
    passes._scale = scale
    ids = tokens_of(model.spec, 1, TOKENS)
    model(ids, ids)
    weights = model._core._model.layers[0]
    passes._buffers["adapters"].copy_(passes._adapters.values[0])
    step = model._core._step
    assert step is not None
    return passes, passes._made(kind, 0, weights, step, None)


@pytest.mark.parametrize("kind", ["qkv", "o", "down"])
def test_what_adapters_add_is_not_lost_beside_what_it_is_added_to(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    little = 1e-3
    passes, with_low = product(kind, little)
    columns = with_low._weight.columns
    x = torch.randn((TOKENS, columns), generator=generator).bfloat16()
    out = torch.empty(TOKENS, with_low._weight.rows, dtype=torch.bfloat16)
    with_low.forward(x, out)
    whole = torch.empty(with_low._weight.rows, columns, dtype=torch.bfloat16)
    with_low._weight.write(0, with_low._weight.rows, whole)
    base = x.double() @ whole.double().t()
    low = passes._lows[kind]
    left = (x.double() @ low.a.double().t()).chunk(len(low.b), dim=1)
    added = torch.cat(
        [little * one @ b.double().t() for one, (_, _, b) in zip(left, low.b, strict=True)],
        dim=1,
    )
    # Less than half a unit in the last place of most of the sums, and yet it is there on average.
    assert float((added.abs() < base.abs() * 2**-9).double().mean()) > 0.8
    found = ((out.double() - base) * added).sum() / (added * added).sum()
    assert float(found) == pytest.approx(1, abs=0.1)


def test_gradients_in_16_bits_are_those_of_32_but_for_rounding() -> None:
    """With adapters as young as after some steps, whose part is small."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = ours(TINY, dtype=dtype, kept=Kept(attention=2, mid=1))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.05)
        ids = tokens_of(model.spec, 2, 60)
        model(ids, ids).loss.backward()
        found[dtype] = gradients(model)
    assert largest_error(found[torch.bfloat16], found[torch.float32]) < 0.06


def test_hidden_states_add_up_in_float32() -> None:
    model = ours(TINY, dtype=torch.bfloat16)
    assert model._core._stream.dtype is torch.float32
    assert model._core._rounded.dtype is torch.bfloat16
