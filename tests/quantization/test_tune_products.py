"""Which launches tuning tries, which one it keeps, and that products use it and stay right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oomproof.quantization import products_tiled
from oomproof.quantization.gpus import gpu_of, limits_of
from oomproof.quantization.handlers import handler
from oomproof.quantization.product_4bit import INPUTS, PRODUCT_4BIT, SCALES, warps_choices
from oomproof.quantization.product_params import NormedInput, product_key
from oomproof.quantization.products_tiled import multiply
from oomproof.quantization.products_wide import is_wide, used_template
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiled_launch import TEMPLATES, LaunchShape, partial_bytes, warps_of
from oomproof.quantization.tune_products import (
    LEAST_GAIN,
    MAX_SPLITS,
    MAX_WIDE,
    LaunchTimer,
    ProductTiming,
    Shape,
    TimedLaunch,
    candidates,
    find_best,
    wide_candidates,
)
from oomproof.quantization.tuned import (
    Gpu,
    ProductKey,
    TunedLaunch,
    tuned_launches,
    write_launches,
)
from tests.quantization.weights import random_input, random_weight, same_bits, tiled_set

GPU = Gpu(name="NVIDIA H200", capability=(9, 0))
SHARED_LIMIT = 227 << 10
SCRATCH_BYTES = 32 << 20
DOWN = ProductKey(
    processors=132, scales="uint8", normed=False, template=1, columns=14336, tiles=256, unit=1
)
GATE_UP = ProductKey(
    processors=132, scales="uint8", normed=True, template=1, columns=4096, tiles=1792, unit=2
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    tuned_launches.cache_clear()
    yield
    tuned_launches.cache_clear()


def tried(key: ProductKey, **options: Any) -> list[LaunchShape]:
    given: dict[str, Any] = {
        "tokens": key.template,
        "warps_choices": warps_choices(key.template, torch.bfloat16, torch.uint8),
        "shared_limit": SHARED_LIMIT,
        "scratch_bytes": SCRATCH_BYTES,
    }
    return candidates(key, **(given | options))


# --- what there is to choose from


def test_every_choice_of_warps_is_declared_and_the_rules_is_the_first() -> None:
    declared = {tuple(variant.defines.values()) for variant in PRODUCT_4BIT.variants}
    assert len(declared) == len(PRODUCT_4BIT.variants)
    for template in TEMPLATES:
        for dtype in INPUTS:
            for scales in SCALES:
                first, *more = warps_choices(template, dtype, scales)
                assert first == warps_of(template)
                assert first not in more
                for warps in (first, *more):
                    # Sums of squares are added up four warps at a time.
                    assert warps % 4 == 0
                    numbers = (INPUTS.index(dtype), SCALES.index(scales))
                    assert (template, *numbers, warps, 1, 1) in declared


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("shared_limit", [99 << 10, SHARED_LIMIT])
@pytest.mark.parametrize("key", [DOWN, GATE_UP])
def test_candidates_differ_fit_and_begin_with_the_rules(
    key: ProductKey, shared_limit: int, tokens: int
) -> None:
    template = next(template for template in TEMPLATES if template >= tokens)
    key = replace(key, template=template, normed=False)
    choices = warps_choices(template, torch.bfloat16, torch.uint8)
    shapes = tried(key, tokens=tokens, warps_choices=choices, shared_limit=shared_limit)
    if template >= 8 and shared_limit < SHARED_LIMIT:
        # Its sums alone take more: it is multiplied in pieces.
        assert shapes == []
        return
    assert len(set(shapes)) == len(shapes) > 1
    assert shapes[0].warps == warps_of(template)
    assert shapes[0].splits == min(s.splits for s in shapes if s.warps == shapes[0].warps)
    assert {shape.warps for shape in shapes} <= set(choices)
    for shape in shapes:
        assert shape.template == template
        assert shape.shared_bytes <= shared_limit
        assert shape.splits <= max(MAX_SPLITS, shapes[0].splits)
        assert partial_bytes(shape, tokens, key.tiles) <= SCRATCH_BYTES


def test_a_product_that_is_normalised_is_never_split() -> None:
    assert {shape.splits for shape in tried(GATE_UP)} == {1}
    assert {shape.warps for shape in tried(GATE_UP)} == {8, 12}
    assert {shape.splits for shape in tried(replace(GATE_UP, normed=False))} > {1, 2}


def test_splits_whose_sums_have_no_room_are_not_tried() -> None:
    assert {shape.splits for shape in tried(DOWN, scratch_bytes=0)} == {1}
    assert {shape.splits for shape in tried(DOWN, scratch_bytes=2 * 4096 * 4)} == {1, 2}


def test_where_not_even_the_rules_launch_fits_nothing_is_tried() -> None:
    assert tried(DOWN, shared_limit=32 << 10) == []
    wide = replace(DOWN, columns=53_248)
    assert tried(wide, shared_limit=99 << 10)[0].splits > 1
    assert tried(wide, shared_limit=99 << 10, scratch_bytes=0) == []


@pytest.mark.parametrize(("scales", "warps"), [("float32", 12), ("uint8", 16), ("bfloat16", 16)])
def test_of_the_kernel_for_many_tokens_a_few_launches_are_tried(scales: str, warps: int) -> None:
    key = replace(DOWN, template=16, scales=scales, normed=False)
    shapes = wide_candidates(key, 12, SHARED_LIMIT, SCRATCH_BYTES)
    assert len({shape.splits for shape in shapes}) == len(shapes) == MAX_WIDE
    assert {(shape.template, shape.warps) for shape in shapes} == {(16, warps)}
    # A block has no room for x of more than a third of the columns, and all splits go to scratch.
    one_too_few = 3 * 12 * 16 * DOWN.tiles * 4 - 1
    assert wide_candidates(key, 12, SHARED_LIMIT, one_too_few) == []


# --- what is kept


def times_of(shapes: list[LaunchShape], *us: float) -> dict[LaunchShape, float]:
    return dict(zip(shapes, [*us, *[100.0] * len(shapes)], strict=False))


def test_the_fastest_is_kept_where_it_saves_enough() -> None:
    shapes = tried(DOWN)
    default, best = find_best(shapes, times_of(shapes, 10.0, 9.9, 9.0, 9.5).__getitem__)
    assert default == TimedLaunch(warps=shapes[0].warps, splits=shapes[0].splits, us=10.0)
    assert best == TimedLaunch(warps=shapes[2].warps, splits=shapes[2].splits, us=9.0)


def test_what_saves_next_to_nothing_is_not_kept() -> None:
    shapes = tried(DOWN)
    almost = 10.0 * (1 - LEAST_GAIN) + 1e-6
    default, best = find_best(shapes, times_of(shapes, 10.0, almost).__getitem__)
    assert default == best
    timing = ProductTiming(
        name="down", tokens=1, key=DOWN, default=default, best=best, candidates=len(shapes)
    )
    assert timing.tuned is None
    assert timing.gain == 0


def test_a_lucky_launch_must_be_lucky_twice() -> None:
    shapes = tried(DOWN)
    calls: list[LaunchShape] = []

    def time(shape: LaunchShape) -> float:
        calls.append(shape)
        return 8.0 if shape == shapes[1] and calls.count(shape) == 1 else 10.0

    default, best = find_best(shapes, time)
    assert default == best
    assert calls == [*shapes, shapes[0], shapes[1]]


def test_a_winner_is_what_the_table_holds() -> None:
    timing = ProductTiming(
        name="down",
        tokens=1,
        key=DOWN,
        default=TimedLaunch(warps=12, splits=1, us=10.0),
        best=TimedLaunch(warps=8, splits=2, us=8.0),
        candidates=20,
    )
    assert timing.tuned == TunedLaunch(product=DOWN, warps=8, splits=2, default_us=10.0, us=8.0)
    assert timing.gain == pytest.approx(0.2)
    assert timing.as_dict()["key"]["columns"] == 14336


# --- what products use


def weights_of(
    format_name: str, shape: tuple[int, int], *, in_turn: bool = False, device: str = "cpu"
) -> TiledSet:
    encoded = [
        handler(format_name).encode(random_weight(shape, seed=number).to(device))
        for number in range(2 if in_turn else 1)
    ]
    return tiled_set(format_name, encoded, shape[1], in_turn=in_turn)


def keep(key: ProductKey, *, warps: int, splits: int, gpu: Gpu = GPU) -> None:
    entry = TunedLaunch(product=key, warps=warps, splits=splits, default_us=2.0, us=1.0)
    write_launches(gpu, {key}, [entry], "torch 2")


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_tiled, "limits_of", lambda _device: (132, SHARED_LIMIT))
    monkeypatch.setattr(products_tiled, "gpu_of", lambda _device: GPU)


def launches(
    weights: TiledSet,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    normed: bool = False,
    scratch_bytes: int = SCRATCH_BYTES,
) -> list[tuple[int, int, int]]:
    """(Tokens, warps, splits) of each launch of a product."""
    x = torch.zeros(tokens, weights.columns, dtype=dtype)
    given: torch.Tensor | NormedInput = x
    if normed:
        given = NormedInput(
            hidden=x, update=None, weight=x[0], hidden_out=x.clone(), eps=1e-5, multiplier=1.0
        )
    return [
        (end - first, shape.warps, shape.splits)
        for first, end, shape in products_tiled._pieces(given, weights, scratch_bytes)
    ]


@pytest.mark.usefixtures("h200")
def test_products_are_launched_as_tuned_and_by_the_rule_where_they_are_not() -> None:
    weights = weights_of("nf4-dq", (48, 4096))
    key = product_key(2, weights, 132, normed=False)
    assert launches(weights, 2) == [(2, 12, 1)]
    keep(key, warps=16, splits=4)
    assert launches(weights, 2) == [(2, 16, 4)]
    assert launches(weights, 1) == [(1, 12, 1)]
    assert launches(weights, 2, normed=True) == [(2, 12, 1)]
    assert launches(weights_of("nf4", (48, 4096)), 2) == [(2, 12, 1)]
    assert launches(weights_of("nf4-dq", (64, 4096)), 2) == [(2, 12, 1)]


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    ("warps", "splits"),
    # No such variant; columns that do not divide so; more splits than there are columns.
    [(10, 1), (1024, 1), (16, 1), (8, 7), (8, 9), (8, 10**6)],
)
def test_an_entry_that_no_longer_fits_is_ignored(warps: int, splits: int) -> None:
    weights = weights_of("nf4-dq", (48, 4096))
    keep(
        product_key(4, weights, 132, normed=False),
        warps=warps,
        splits=splits,
    )
    assert launches(weights, 4) == [(4, 12, 1)]


@pytest.mark.usefixtures("h200")
def test_an_entry_that_shared_memory_has_no_room_for_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = weights_of("nf4-dq", (16, 16384))
    keep(product_key(4, weights, 132, normed=False), warps=8, splits=1)
    assert launches(weights, 4) == [(4, 8, 1)]
    monkeypatch.setattr(products_tiled, "limits_of", lambda _device: (132, 99 << 10))
    [(tokens, warps, splits)] = launches(weights, 4)
    assert (tokens, warps) == (4, 12)
    assert splits > 1


@pytest.mark.usefixtures("h200")
def test_an_entry_of_other_inputs_is_ignored_where_they_have_no_such_kernel() -> None:
    weights = weights_of("nf4-dq", (48, 4096))
    keep(product_key(1, weights, 132, normed=False), warps=8, splits=2)
    assert launches(weights, 1) == [(1, 8, 2)]
    assert launches(weights, 1, dtype=torch.float16) == [(1, 12, 1)]


@pytest.mark.usefixtures("h200")
def test_an_entry_whose_sums_find_no_scratch_is_ignored() -> None:
    weights = weights_of("nf4-dq", (48, 4096))
    keep(product_key(1, weights, 132, normed=False), warps=8, splits=2)
    assert launches(weights, 1, scratch_bytes=2 * 48 * 4) == [(1, 8, 2)]
    assert launches(weights, 1, scratch_bytes=2 * 48 * 4 - 1) == [(1, 12, 1)]


@pytest.mark.usefixtures("h200")
def test_a_normalised_product_is_not_split_whatever_an_entry_says() -> None:
    weights = weights_of("nf4-dq", (48, 4096))
    key = product_key(1, weights, 132, normed=True)
    keep(key, warps=8, splits=2)
    assert launches(weights, 1, normed=True) == [(1, 12, 1)]
    keep(key, warps=8, splits=1)
    assert launches(weights, 1, normed=True) == [(1, 8, 1)]
    assert launches(weights, 1) == [(1, 12, 1)]


@pytest.mark.usefixtures("h200")
def test_more_tokens_take_the_pieces_of_the_largest_template() -> None:
    weights = weights_of("nf4-dq", (48, 4096))
    assert launches(weights, 20) == [(16, 8, 1), (4, 8, 1)]
    keep(product_key(16, weights, 132, normed=False), warps=8, splits=2)
    assert launches(weights, 20) == [(16, 8, 2), (4, 8, 2)]


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 16, 32, 40])
@pytest.mark.parametrize("kind", ["plain", "norm", "gate"])
def test_every_candidate_computes_the_same_product_and_the_kept_one_is_used(
    format_name: str, tokens: int, kind: str
) -> None:
    device = torch.device("cuda", 0)
    in_turn, normed = kind == "gate", kind == "norm" and tokens <= products_tiled.MOST_NORMED
    weights = weights_of(format_name, (112, 4096), in_turn=in_turn, device="cuda")
    scales, gpu = weights.scales.dtype, gpu_of(device)
    products_tiled.prepare(torch.bfloat16, scales, device, every=True)
    if tokens > TEMPLATES[-1] and not is_wide(tokens, gpu):
        pytest.skip("this GPU multiplies so many tokens in pieces")
    processors, shared_limit = limits_of(device)
    key = product_key(used_template(tokens, gpu), weights, processors, normed=normed)
    shapes: Sequence[Shape]
    if is_wide(tokens, gpu):
        shapes = wide_candidates(key, tokens, shared_limit, SCRATCH_BYTES)
        assert len(shapes) > 1
    else:
        choices = warps_choices(key.template, torch.bfloat16, scales)
        shapes = candidates(key, tokens, choices, shared_limit, SCRATCH_BYTES)
        if not shapes:
            pytest.skip("this GPU multiplies so many tokens in pieces")
        assert len(shapes) >= len(choices)
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device)
    timer = LaunchTimer(
        [weights] * 3, tokens, torch.bfloat16, scratch, normed=normed, gated=in_turn
    )
    found = {}
    for shape in shapes:
        timer.out.fill_(float("nan"))
        assert 0 < timer(shape) < 1e5
        found[shape] = timer.out.clone()
    expected = found[shapes[0]].double()
    assert bool(expected.isfinite().all())
    for shape, out in found.items():
        error = float((out.double() - expected).norm() / expected.norm())
        assert error < 1e-2, shape
    default, best = find_best(shapes, timer)
    assert best.us <= default.us
    # Whichever is kept, `multiply` launches it from then on: its bits, eager and in a graph.
    for shape in (shapes[0], shapes[-1]):
        keep(key, warps=shape.warps, splits=shape.splits, gpu=gpu)
        out = torch.full_like(timer.out, float("nan"))
        multiply(timer.x, weights, out, scratch, gated=in_turn)
        assert same_bits(out, found[shape]), shape


@pytest.mark.gpu
def test_what_tuning_chose_is_compiled_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    weights = weights_of("nf4-dq", (48, 640), device="cuda")
    processors, _ = limits_of(device)
    key = product_key(1, weights, processors, normed=False)
    keep(key, warps=8, splits=2, gpu=gpu_of(device))
    products_tiled.prepare(torch.bfloat16, torch.uint8, device)

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a kernel is compiled after loading")

    monkeypatch.setattr("oomproof.kernels.module.images", refuse)
    out = torch.empty(1, 48, dtype=torch.bfloat16, device=device)
    scratch = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    multiply(random_input(1, 640, torch.bfloat16).to(device), weights, out, scratch)
    assert bool(out.isfinite().all())
