"""The product for many tokens: when it is launched, and on a GPU what float64 computes."""

from __future__ import annotations

from itertools import product as combinations

import pytest
import torch

from oomproof.quantization import products_tiled
from oomproof.quantization.product_4bit_wide import PRODUCT_4BIT_WIDE, wide_variant
from oomproof.quantization.product_params import NormedInput
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tuned import Gpu
from oomproof.quantization.wide_launch import (
    WIDE_TEMPLATES,
    WideShape,
    warpgroups_of,
    wide_shape,
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
SHAPES = ((16, 128), (48, 640), (1040, 1152), (6144, 4096), (112, 896), (64, 11008), (4096, 14336))
TOKENS = (5, 7, 8, 13, 16, 31, 32)
SHARED_LIMIT = 227 << 10
HOPPER = Gpu(name="NVIDIA H200", capability=(9, 0))


def codes_of(rows: int, columns: int) -> TiledSet:
    """A set without its segments, whose shape is all that counts."""
    return TiledSet(
        codes=torch.empty(rows // 16, 8 * columns, dtype=torch.uint8),
        scales=torch.empty(rows // 16, columns // 4, dtype=torch.uint8),
        quant_map=None,
        codebook="nf4",
        segments=(),
    )


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_tiled, "limits_of", lambda _device: (132, SHARED_LIMIT))
    monkeypatch.setattr(products_tiled, "gpu_of", lambda _device: HOPPER)
    monkeypatch.setattr(products_tiled, "WIDE_TOKENS", 5)


def chosen(tokens: int, *, scratch_bytes: int = 1 << 24, columns: int = 4096) -> WideShape | None:
    x = torch.empty(tokens, columns, dtype=torch.bfloat16)
    return products_tiled._wide(x, codes_of(64, columns), scratch_bytes)


@pytest.mark.usefixtures("on_hopper")
def test_many_tokens_are_multiplied_at_once() -> None:
    assert chosen(4) is None
    assert [getattr(chosen(n), "template", None) for n in (5, 9, 32, 64, 65)] == [
        8,
        16,
        32,
        64,
        None,
    ]


@pytest.mark.usefixtures("on_hopper")
def test_what_it_has_no_room_for_is_multiplied_in_pieces() -> None:
    # So many splits that no cluster adds them up, and no scratch for their sums.
    assert chosen(32, columns=53_248, scratch_bytes=0) is None
    assert chosen(32, columns=53_248) is not None


@pytest.mark.usefixtures("on_hopper")
def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_tiled, "WIDE_TOKENS", None)
    assert chosen(32) is None


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_do_without_it(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Gpu(name="another", capability=capability)
    monkeypatch.setattr(products_tiled, "gpu_of", lambda _device: other)
    assert chosen(32) is None


@pytest.mark.usefixtures("on_hopper")
def test_what_is_normalised_is_not_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_tiled, "_wide", lambda *_: pytest.fail("it was asked for"))
    hidden = torch.empty(5, 128, dtype=torch.bfloat16)
    normed = NormedInput(
        hidden=hidden,
        update=None,
        weight=hidden[0],
        hidden_out=hidden.clone(),
        eps=1e-5,
        multiplier=1.0,
    )
    monkeypatch.setattr(products_tiled, "_pieces", lambda *_: [])
    products_tiled.multiply(normed, codes_of(16, 128), hidden, hidden)


def test_every_launch_by_rule_has_its_variant() -> None:
    for template, dtype, scales in combinations(
        WIDE_TEMPLATES, ERRORS, (torch.float32, torch.uint8, torch.bfloat16)
    ):
        variant = wide_variant(template, dtype, scales, warpgroups_of(template))
        assert variant in PRODUCT_4BIT_WIDE.variants


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels, compiled side by side."""
    if torch.cuda.get_device_capability(0) != HOPPER.capability:
        pytest.skip("the kernel is for compute capability 9.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products_tiled, "WIDE_TOKENS", 1)
        patch.setattr(products_tiled, "MAX_TOKENS", WIDE_TEMPLATES[-1])
        for dtype, scales in combinations(ERRORS, (torch.float32, torch.uint8, torch.bfloat16)):
            products_tiled.prepare(dtype, scales, torch.device(DEVICE, 0))


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch, compiled: None) -> list[WideShape]:
    """Launches of the kernel, which has all products from here on."""
    seen: list[WideShape] = []
    found = products_tiled._wide

    def noted(x: torch.Tensor, weights: TiledSet, scratch_bytes: int) -> WideShape | None:
        shape = found(x, weights, scratch_bytes)
        if shape is not None:
            seen.append(shape)
        return shape

    monkeypatch.setattr(products_tiled, "WIDE_TOKENS", 5)
    monkeypatch.setattr(products_tiled, "_wide", noted)
    return seen


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_products_are_exact_to_rounding_and_repeat_bit_for_bit(
    format_name: str, shape: tuple[int, int], kind: str, wide: list[WideShape]
) -> None:
    weights, scratch = weights_of(format_name, shape, kind), new_scratch()
    for dtype in ERRORS:
        check([p for n in TOKENS for p in products_of(weights, n, dtype, scratch)], scratch)
    assert {shape.template for shape in wide} == {8, 16, 32}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("clustered", [True, False])
@pytest.mark.parametrize("splits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(112, 4096), (208, 4352), (1040, 2176)])
def test_every_way_to_split_the_columns_is_the_same_product(
    shape: tuple[int, int], splits: int, clustered: bool, compiled: None
) -> None:
    weights, scratch = weights_of("nf4-dq", shape, "three"), new_scratch()
    rows = sum(weights.sizes)
    for tokens, processors in combinations((8, 21, 33, 64), (8, 132)):
        launch = wide_shape(
            tokens=tokens,
            columns=shape[1],
            tiles=rows // 16,
            processors=processors,
            shared_limit=SHARED_LIMIT,
            scratch_bytes=scratch.nbytes,
            splits=splits,
            clustered=clustered,
        )
        if launch is None:
            continue
        x = random_input(tokens, shape[1], torch.bfloat16).to(DEVICE)
        out = torch.full((tokens, rows), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        scratch.fill_(0xFF)
        products_tiled.launch_wide_product(x, weights.tiled, out, scratch, launch)
        expected = x.double() @ weights.exact.t()
        error = float((out.double() - expected).norm() / expected.norm())
        assert error < ERRORS[torch.bfloat16], (launch, error)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(48, 640), (4096, 14336)])
def test_with_no_scratch_it_is_right_too(shape: tuple[int, int], wide: list[WideShape]) -> None:
    weights = weights_of("nf4-dq", shape, "one")
    for tokens in (8, 32):
        scratch = new_scratch(1024)
        x = random_input(tokens, shape[1], torch.bfloat16).to(DEVICE)
        out = torch.empty(tokens, shape[0], dtype=torch.bfloat16, device=DEVICE)
        products_tiled.multiply(x, weights.tiled, out, scratch)
        expected = x.double() @ weights.exact.t()
        assert float((out.double() - expected).norm() / expected.norm()) < ERRORS[torch.bfloat16]
    assert wide
    assert all(shape.clustered for shape in wide)
