"""Block scales that are searched for the least error."""

from __future__ import annotations

import pytest
import torch

from oomproof.formats import SEARCHED_FORMATS
from oomproof.quantization import reference
from oomproof.quantization.handlers import HANDLERS, handler
from oomproof.quantization.search import search_4bit, search_int4
from oomproof.quantization.tables import table_4bit, table_dynamic
from tests.quantization.weights import encode_in_slices, random_weight, same_bits

SHAPES = ((64, 192), (33, 21), (3, 64), (1, 1))


def heavy_tailed(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    degrees = torch.randn(4, *shape, generator=generator).square().mean(dim=0)
    return (0.02 * torch.randn(shape, generator=generator) / degrees.sqrt()).bfloat16()


def squared_error(format_name: str, weight: torch.Tensor, *, search: bool) -> float:
    held = handler(format_name, search=search)
    rows, columns = weight.shape
    decoded = held.decode(held.encode(weight), (rows, columns), torch.float32)
    return float((decoded.double() - weight.double()).square().sum())


@pytest.mark.parametrize(
    ("format_name", "most"),
    [
        ("nf4", 0.91),
        ("nf4-dq", 0.91),
        ("nf4-g16", 0.91),
        ("fp4", 0.95),
        ("fp4-dq", 0.95),
        ("int4", 0.75),
    ],
)
def test_searched_scales_lose_less_than_absmax(format_name: str, most: float) -> None:
    for weight in (random_weight((256, 512)), heavy_tailed((256, 512), 1)):
        plain = squared_error(format_name, weight, search=False)
        assert squared_error(format_name, weight, search=True) < most * plain


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_no_block_is_worse_than_with_its_absmax(quant_type: str) -> None:
    blocks = heavy_tailed((2048, 64), 2).float()
    table = table_4bit(quant_type)
    codes, scale = search_4bit(blocks, quant_type)
    searched = (table[codes.int()] * scale.unsqueeze(1) - blocks).square().sum(dim=1)
    packed, absmax = reference.quantize_4bit(blocks, quant_type)
    values = table[reference.unpack(packed).int()].view(-1, 64)
    plain = (values * absmax.unsqueeze(1) - blocks).square().sum(dim=1)
    # A scale that keeps the norm has so much more error than the least, to second order.
    whole = blocks.square().sum(dim=1)
    assert (searched <= plain * (1.001 + searched / whole)).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_block_keeps_its_norm(quant_type: str) -> None:
    blocks = heavy_tailed((2048, 64), 2).float()
    codes, scale = search_4bit(blocks, quant_type)
    values = table_4bit(quant_type)[codes.int()] * scale.unsqueeze(1)
    torch.testing.assert_close(values.norm(dim=1), blocks.norm(dim=1), rtol=2e-3, atol=0)


def test_the_8_bit_code_of_a_searched_scale_is_nearly_the_best_for_its_codes() -> None:
    weight = heavy_tailed((64, 1024), 3)
    parts = handler("nf4-dq", search=True).encode(weight)
    values = table_4bit("nf4")[reference.unpack(parts["weight"]).int()].view(-1, 64).double()
    blocks = weight.view(-1, 64).double()
    outer = parts["nested_absmax"].double().repeat_interleave(256)[: len(blocks)]
    every = table_dynamic().double()[None, :] * outer[:, None] + parts["nested_offset"].double()
    # |w - s t|² for each of the 256 scales that a block can have.
    errors = (
        blocks.square().sum(1)[:, None]
        - 2 * every * (blocks * values).sum(1)[:, None]
        + every.square() * values.square().sum(1)[:, None]
    )
    own = errors.gather(1, parts["absmax"].long()[:, None]).squeeze(1)
    # The scale that keeps the norm is near the least-squares one, and so are their codes.
    assert own.sum() <= errors.amin(dim=1).sum() * 1.005


@pytest.mark.parametrize("format_name", SEARCHED_FORMATS)
def test_a_searched_weight_in_slices_is_the_weight_at_once(format_name: str) -> None:
    for shape in SHAPES:
        weight = random_weight(shape, seed=sum(shape))
        held = handler(format_name, search=True)
        whole = held.encode(weight)
        parts = encode_in_slices(format_name, weight, 128, search=True)
        assert all(same_bits(part, whole[name]) for name, part in parts.items())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_blocks_that_no_scale_serves_keep_their_absmax(quant_type: str) -> None:
    blocks = torch.zeros(4, 64)
    blocks[1, 3], blocks[2, 5], blocks[3, 7] = float("inf"), float("nan"), 1e-40
    codes, scale = search_4bit(blocks, quant_type)
    packed, absmax = reference.quantize_4bit(blocks, quant_type)
    assert same_bits(scale, absmax)
    assert torch.equal(
        codes[[0, 3]].reshape(-1), reference.unpack(packed).view(4, 64)[[0, 3]].reshape(-1)
    )


def test_int4_of_zeros_and_of_what_is_not_finite_has_the_plain_scale() -> None:
    groups = torch.zeros(3, 64)
    groups[1, 3], groups[2, 5] = float("inf"), float("nan")
    codes, scale = search_int4(groups)
    assert scale[0] == 0
    assert scale[1].isinf()
    assert scale[2].isnan()
    assert (codes[0] == 8).all()


def test_a_negative_scale_of_int4_gives_the_eighth_step_to_the_largest_weight() -> None:
    group = 0.1 * torch.arange(-7, 9).repeat(4).float().unsqueeze(0)
    codes, scale = search_int4(group)
    assert float(scale[0]) == pytest.approx(-0.1, rel=0.004)
    assert ((codes.int() - 8) * scale.float() - group).abs().max() < 0.004


def test_formats_without_block_scales_are_quantized_as_ever() -> None:
    for name in HANDLERS.keys() - set(SEARCHED_FORMATS):
        assert handler(name, search=True) == handler(name)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_reads_searched_weights(nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight((64, 256), torch.float32)
    held = handler("nf4-dq" if nested else "nf4", search=True)
    parts = held.encode(weight)
    _, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    state.absmax = parts["absmax"]
    if nested:
        state.offset, state.state2.absmax = parts["nested_offset"], parts["nested_absmax"]
    found = functional.dequantize_4bit(parts["weight"].view(-1, 1), state)
    expected = held.decode(parts, (64, 256), torch.float32)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)
