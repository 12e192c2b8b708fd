"""The product for many tokens: when it is launched, and on a GPU what float64 computes."""

from __future__ import annotations

from itertools import product as combinations
from pathlib import Path

import pytest
import torch

from oomproof.kernels.source import SM_90A
from oomproof.quantization import products_tiled
from oomproof.quantization.chained_operators import chained_linear_4bit, squares_numel
from oomproof.quantization.product_4bit_wide import PRODUCT_4BIT_WIDE, wide_variant
from oomproof.quantization.product_params import NormedInput, product_key
from oomproof.quantization.products_wide import (
    WIDE_TOKENS,
    chains,
    launch_wide_product,
    used_template,
    wide_pieces,
)
from oomproof.quantization.tiled import Segment, TiledSet
from oomproof.quantization.tuned import Gpu, TunedLaunch, tuned_launches, write_launches
from oomproof.quantization.wide_launch import (
    WIDE_TEMPLATES,
    WideShape,
    warpgroups_of,
    wide_shapes,
)
from tests.quantization.test_products_tiled import (
    DEVICE,
    ERRORS,
    SETS,
    check,
    new_scratch,
    products_of,
    weights_of,
)
from tests.quantization.weights import random_input

FORMATS = ("nf4", "nf4-dq", "int4")
STORED = (torch.float32, torch.uint8, torch.bfloat16)
SHAPES = ((16, 128), (48, 640), (1040, 1152), (6144, 4096), (112, 896), (64, 11008), (4096, 14336))
TOKENS = (5, 8, 9, 13, 16, 17, 31, 32, 33, 63, 64)
SHARED_LIMIT = 227 << 10
HOPPER = Gpu(name="NVIDIA H200", capability=(9, 0))


def set_of(rows: int, columns: int, scales: torch.dtype = torch.uint8) -> TiledSet:
    """A set whose shape is all that counts."""
    return TiledSet(
        codes=torch.empty(rows // 16, 8 * columns, dtype=torch.uint8),
        scales=torch.empty(rows // 16, columns // 4, dtype=scales),
        quant_map=None,
        codebook="nf4",
        segments=(Segment(rows=rows, first_tile=0, tile_stride=1, nested=None),),
    )


def launches(
    tokens: int, weights: TiledSet, *, scratch_bytes: int = 1 << 24, gpu: Gpu = HOPPER
) -> list[tuple[int, int, int]]:
    """(Tokens, template, splits) of each launch."""
    pieces = wide_pieces(tokens, weights, gpu, 132, SHARED_LIMIT, scratch_bytes)
    return [(end - first, shape.template, shape.splits) for first, end, shape in pieces]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    tuned_launches.cache_clear()


def test_many_tokens_are_multiplied_at_once() -> None:
    weights = set_of(64, 4096)
    assert launches(WIDE_TOKENS - 1, weights) == launches(65, weights) == []
    templates = [(5, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)]
    for tokens, template in templates:
        [(multiplied, found, _)] = launches(tokens, weights)
        assert (multiplied, found) == (tokens, template) == (tokens, used_template(tokens, HOPPER))
    assert used_template(WIDE_TOKENS - 1, HOPPER) == 4


def test_what_scratch_has_no_room_for_is_multiplied_in_pieces() -> None:
    weights, of_a_token = set_of(6144, 4096), 6144 * 4
    # Shared memory has room for all columns of 16 tokens, half of those of 32, a quarter of 64's:
    # so many splits there are at least, and with scratch for more there are more.
    assert launches(64, weights, scratch_bytes=256 * of_a_token) == [(64, 64, 4)]
    assert launches(64, weights, scratch_bytes=256 * of_a_token - 1) == [(32, 32, 4)] * 2
    assert launches(40, weights, scratch_bytes=64 * of_a_token) == [(32, 32, 2), (8, 32, 2)]
    assert launches(40, weights, scratch_bytes=64 * of_a_token - 1) == [
        *[(16, 16, 2)] * 2,
        (8, 16, 2),
    ]
    assert launches(40, weights, scratch_bytes=8 * of_a_token) == [(8, 8, 1)] * 5
    assert launches(40, weights, scratch_bytes=8 * of_a_token - 1) == []


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_do_without_it(capability: tuple[int, int]) -> None:
    other = Gpu(name="another", capability=capability)
    assert launches(16, set_of(64, 4096), gpu=other) == []
    assert used_template(16, other) == 16


def test_a_tuned_launch_is_used_where_it_is_one_of_this_kernel() -> None:
    weights = set_of(6144, 4096)
    assert launches(16, weights) == [(16, 16, 8)]

    def keep(template: int, warps: int, splits: int) -> None:
        key = product_key(template, weights, 132, normed=False)
        entry = TunedLaunch(product=key, warps=warps, splits=splits, default_us=2.0, us=1.0)
        write_launches(HOPPER, {key}, [entry], "torch 2")

    keep(16, 16, 4)
    assert launches(16, weights) == [(16, 16, 4)]
    # The other kernel's, columns that do not divide so, and splits without scratch.
    for warps, splits in ((8, 4), (16, 7), (16, 10**6)):
        keep(16, warps, splits)
        assert launches(16, weights) == [(16, 16, 8)]
    keep(16, 16, 4)
    assert launches(16, weights, scratch_bytes=3 * 16 * 6144 * 4) == [(16, 16, 2)]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_tiled, "limits_of", lambda _device: (132, SHARED_LIMIT))
    monkeypatch.setattr(products_tiled, "gpu_of", lambda _device: HOPPER)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("scratch_bytes", "wide"), [(1 << 20, [64]), (16 << 10, [32, 32]), (0, [])]
)
def test_a_product_takes_the_one_kernel_or_the_other(
    scratch_bytes: int, wide: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    others: list[int] = []
    monkeypatch.setattr(
        products_tiled, "launch_wide_product", lambda x, *_, **__: seen.append(len(x))
    )
    monkeypatch.setattr(products_tiled, "launch_product", lambda x, *_, **__: others.append(len(x)))
    x, out = torch.empty(64, 4096, dtype=torch.bfloat16), torch.empty(64, 48, dtype=torch.bfloat16)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8)
    products_tiled.multiply(x, set_of(48, 4096), out, scratch)
    assert seen == wide
    assert others == ([] if wide else [16] * 4)


@pytest.mark.usefixtures("on_hopper")
def test_what_is_normalised_is_not_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_tiled, "wide_pieces", lambda *_: pytest.fail("it was asked for"))
    hidden = torch.empty(9, 128, dtype=torch.bfloat16)
    normed = NormedInput(
        hidden=hidden,
        update=None,
        weight=hidden[0],
        hidden_out=hidden.clone(),
        eps=1e-5,
        multiplier=1.0,
    )
    monkeypatch.setattr(products_tiled, "_pieces", lambda *_: [])
    products_tiled.multiply(normed, set_of(16, 128), hidden, hidden)


def test_every_launch_has_its_variant_and_every_variant_is_launched() -> None:
    wanted = [
        wide_variant(template, dtype, scales)
        for template, dtype, scales in combinations(WIDE_TEMPLATES, ERRORS, STORED)
    ]
    for variant in wanted:
        assert variant in PRODUCT_4BIT_WIDE.variants
    assert len(wanted) == len(PRODUCT_4BIT_WIDE.variants)
    assert [used_template(tokens, HOPPER) for tokens in (WIDE_TOKENS, 64)] == [8, 64]


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels, compiled side by side."""
    if torch.cuda.get_device_capability(0) != SM_90A.capability:
        pytest.skip("the kernel is for compute capability 9.0")
    for dtype, scales in combinations(ERRORS, STORED):
        products_tiled.prepare(dtype, scales, torch.device(DEVICE, 0))


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch, compiled: None) -> list[WideShape]:
    """Launches of the kernel; it compiles nothing from here on."""
    seen: list[WideShape] = []

    def noted(*given: object) -> list[tuple[int, int, WideShape]]:
        pieces = wide_pieces(*given)  # type: ignore[arg-type]
        seen.extend(shape for _, _, shape in pieces)
        return pieces

    monkeypatch.setattr(products_tiled, "wide_pieces", noted)
    monkeypatch.setattr(
        "oomproof.kernels.module.images", lambda *_: pytest.fail("a kernel was not prepared")
    )
    return seen


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_products_are_exact_to_rounding_and_repeat_bit_for_bit(
    format_name: str, shape: tuple[int, int], kind: str, wide: list[WideShape]
) -> None:
    weights, scratch = weights_of(format_name, shape, kind), new_scratch(1 << 26)
    for dtype in ERRORS:
        check([p for n in TOKENS for p in products_of(weights, n, dtype, scratch)], scratch)
    assert {shape.template for shape in wide} == set(WIDE_TEMPLATES)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", [(112, 4096), (208, 4352), (1040, 2176)])
def test_every_way_to_split_the_columns_is_the_same_product(
    shape: tuple[int, int], compiled: None
) -> None:
    weights, scratch = weights_of("nf4-dq", shape, "three"), new_scratch(1 << 26)
    rows = sum(weights.sizes)
    for tokens, processors in combinations((7, 9, 21, 33, 64), (8, 132)):
        shapes = wide_shapes(
            tokens=tokens,
            columns=shape[1],
            tiles=rows // 16,
            warpgroups=warpgroups_of(used_template(tokens, HOPPER), 1),
            processors=processors,
            shared_limit=SHARED_LIMIT,
            scratch_bytes=scratch.nbytes,
        )
        assert len(shapes) > 1
        x = random_input(tokens, shape[1], torch.bfloat16).to(DEVICE)
        expected = x.double() @ weights.exact.t()
        for launch in shapes:
            out = torch.full((tokens, rows), float("nan"), dtype=torch.bfloat16, device=DEVICE)
            scratch.fill_(0xFF)
            launch_wide_product(x, weights.tiled, out, scratch, launch)
            error = float((out.double() - expected).norm() / expected.norm())
            assert error < ERRORS[torch.bfloat16], (launch, error)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("shape", [(128, 896), (4096, 14336), (1152, 1152)])
def test_a_chain_updates_and_normalises_hidden_states_exactly_to_rounding(
    format_name: str, shape: tuple[int, int], compiled: None
) -> None:
    rows, columns = shape
    update = weights_of(format_name, shape, "one")
    after = weights_of(format_name, (96, rows), "three")
    many = sum(after.sizes)
    scratch, counters = new_scratch(1 << 26), torch.zeros(256, dtype=torch.int32, device=DEVICE)
    for dtype, tokens in combinations(ERRORS, (5, 8, 9, 16, 21, 32, 33, 64)):
        assert chains(tokens, update.tiled, torch.device(DEVICE, 0), scratch.nbytes)
        x = random_input(tokens, columns, dtype).to(DEVICE)
        wide = torch.randn(tokens, rows + 16, device=DEVICE).to(dtype)
        before, weight = wide.clone(), (1 + 0.1 * torch.randn(rows, device=DEVICE)).to(dtype)
        squares = torch.full((squares_numel(rows, tokens),), float("nan"), device=DEVICE)
        out = torch.empty(tokens, many, dtype=dtype, device=DEVICE)
        found = []
        for _ in range(3):
            scratch.fill_(0xFF)
            wide.copy_(before)
            hidden = wide[:, 8:-8]
            for given, norm_weight, target, product in (
                (x, None, hidden, update),
                (hidden, weight, out, after),
            ):
                chained_linear_4bit(
                    given,
                    norm_weight,
                    1e-5,
                    0.5,
                    *product.tiled.arguments(),
                    [],
                    False,
                    norm_weight is None,
                    target,
                    squares,
                    counters,
                    scratch,
                )
            found.append((wide.clone(), out.clone()))
        assert all(
            torch.equal(one, two)
            for again in found[1:]
            for one, two in zip(found[0], again, strict=True)
        )
        assert torch.equal(wide[:, :8], before[:, :8])
        assert torch.equal(wide[:, -8:], before[:, -8:])
        assert not counters.any()
        expected = before[:, 8:-8].double() + 0.5 * (x.double() @ update.exact.t())
        assert float((hidden.double() - expected).norm() / expected.norm()) < ERRORS[dtype]
        states = hidden.double()
        normed = states * torch.rsqrt(states.square().mean(dim=1, keepdim=True) + 1e-5)
        multiplied = (normed * weight.double()) @ after.exact.t()
        # Rounded twice on its way in.
        assert float((out.double() - multiplied).norm() / multiplied.norm()) < 2 * ERRORS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(48, 640), (4096, 14336)])
def test_with_little_scratch_it_is_right_too(shape: tuple[int, int], wide: list[WideShape]) -> None:
    weights = weights_of("nf4-dq", shape, "one")
    # For a piece of 16 tokens and its fewest splits; and for none.
    splits = -(-shape[1] // 4096)
    for scratch_bytes, expects in ((splits * 16 * shape[0] * 4, True), (1024, False)):
        scratch = new_scratch(scratch_bytes)
        wide.clear()
        x = random_input(40, shape[1], torch.bfloat16).to(DEVICE)
        out = torch.empty(40, shape[0], dtype=torch.bfloat16, device=DEVICE)
        products_tiled.multiply(x, weights.tiled, out, scratch)
        expected = x.double() @ weights.exact.t()
        assert float((out.double() - expected).norm() / expected.norm()) < ERRORS[torch.bfloat16]
        assert bool(wide) == expects
