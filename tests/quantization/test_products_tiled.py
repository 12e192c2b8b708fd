"""The product of few tokens in CUDA C++: its codebooks, and on a GPU what float64 computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product as combinations

import pytest
import torch

from oomproof.quantization import operators, products_tiled
from oomproof.quantization.handlers import handler
from oomproof.quantization.product_params import scaled_levels
from oomproof.quantization.products_tiled import normalises
from oomproof.quantization.scratch import least_scratch_bytes
from oomproof.quantization.step_operators import step_linear_4bit
from oomproof.quantization.tables import codebook_of
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiled_launch import LEAST_SHARED_BYTES
from tests.quantization.weights import random_input, random_weight, same_bits, tiled_set

DEVICE = "cuda"
FORMATS = ("nf4", "nf4-dq", "fp4-dq", "int4")
ERRORS = {torch.bfloat16: 5e-3, torch.float16: 2e-3}
TOKENS = (1, 2, 3, 5, 7, 8, 9, 16, 17, 32, 64)
SHAPES = ((16, 128), (48, 640), (6144, 4096), (112, 896), (64, 11008), (4096, 14336))
SETS = ("one", "three", "in turn")
SCRATCH_BYTES = 1 << 24
EPS = 1e-5
BEFORE, AFTER = 3, 5
"""Columns of others around a result."""


def levels_of(codebook: str, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """The scaled levels as float64, and what undoes the scale."""
    bits, scale = scaled_levels(codebook, dtype)
    return torch.tensor(list(bits)).to(torch.uint16).view(dtype).double(), scale


def relative_errors(found: torch.Tensor, codebook: str) -> torch.Tensor:
    levels = codebook_of(codebook).double()
    return ((found - levels) / levels)[levels != 0].abs()


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_levels_are_rounded_less_than_unscaled_ones(
    codebook: str, dtype: torch.dtype
) -> None:
    levels, scale = levels_of(codebook, dtype)
    scaled = relative_errors(levels * scale, codebook)
    unscaled = relative_errors(codebook_of(codebook).to(dtype).double(), codebook)
    assert float(scaled.square().mean()) < 0.5 * float(unscaled.square().mean())
    assert float(scaled.max()) < float(unscaled.max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_levels_of_int4_are_exact(dtype: torch.dtype) -> None:
    assert codebook_of("int4").tolist() == list(range(-8, 8))
    levels, scale = levels_of("int4", dtype)
    torch.testing.assert_close(levels * scale, codebook_of("int4").double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_undoes_the_factor_of_the_levels(codebook: str, dtype: torch.dtype) -> None:
    levels, scale = levels_of(codebook, dtype)
    assert 1 <= scale < 2
    # No further off than half a unit in the last place; 0 stays 0, and signs stay.
    half_a_unit = torch.finfo(dtype).eps / 2
    expected = codebook_of(codebook).double()
    torch.testing.assert_close(levels * scale, expected, rtol=1.01 * half_a_unit, atol=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A set of linears."""

    tiled: TiledSet
    exact: torch.Tensor
    """float64 [rows of all, columns]."""
    in_turn: bool

    @property
    def sizes(self) -> list[int]:
        """Rows of each linear."""
        return [segment.rows for segment in self.tiled.segments]


def weights_of(format_name: str, shape: tuple[int, int], kind: str) -> Weights:
    """One linear; three, the others with about a quarter of the rows; or gate and up."""
    rows, columns = shape
    fewer = max(16, rows // 64 * 16)
    sizes = {"one": (rows,), "three": (rows, fewer, fewer), "in turn": (rows, rows)}[kind]
    encoded, decoded = [], []
    for number, size in enumerate(sizes):
        # Of different magnitudes, so that a scale of another linear shows.
        weight = (1 + number) * random_weight((size, columns), seed=number).to(DEVICE)
        encoded.append(handler(format_name).encode(weight))
        whole = handler(format_name).decode(encoded[-1], (size, columns), torch.float32)
        decoded.append(whole.double())
    in_turn = kind == "in turn"
    tiled = tiled_set(format_name, encoded, columns, in_turn=in_turn)
    return Weights(tiled=tiled, exact=torch.cat(decoded), in_turn=in_turn)


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A call, and what is right."""

    name: str
    run: Callable[[], None]
    wide: torch.Tensor
    """What it writes to a part of: the result, between columns of others."""
    expected: torch.Tensor
    """float64 [tokens, rows]."""
    most_error: float
    """Norm of the difference over the norm."""
    hidden: tuple[torch.Tensor, torch.Tensor] | None = None
    """(The sum that is written, its right bits)."""

    def forget(self) -> None:
        """Makes sure that what is found afterwards was written afterwards."""
        for tensor in (self.wide, *(self.hidden or ())[:1]):
            tensor.fill_(float("nan"))

    def check(self) -> torch.Tensor:
        """A copy of the result."""
        out = self.wide[:, BEFORE:-AFTER]
        error = float((out.double() - self.expected).norm() / self.expected.norm())
        assert error < self.most_error, (self.name, error)
        assert bool(self.wide[:, :BEFORE].isnan().all()), self.name
        assert bool(self.wide[:, -AFTER:].isnan().all()), self.name
        assert self.hidden is None or same_bits(*self.hidden), self.name
        return out.clone()


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """What is fused in front of a product."""

    hidden: torch.Tensor
    update: torch.Tensor | None
    weight: torch.Tensor
    multiplier: float = 1.0

    def total(self) -> torch.Tensor:
        """With no multiplier but a power of two is it rounded once, however it is computed."""
        if self.update is None:
            return self.hidden
        return (self.hidden.float() + self.multiplier * self.update.float()).to(self.hidden.dtype)


def step(
    name: str,
    weights: Weights,
    x: torch.Tensor | Norm,
    scratch: torch.Tensor,
    *,
    biases: Sequence[torch.Tensor] = (),
    gated: bool = False,
) -> Product:
    """A call of step_linear_4bit."""
    hidden = None
    if isinstance(x, Norm):
        total, given = x.total(), x.hidden
        hidden = (torch.empty_like(total), total)
        wide = total.double()
        scale = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + EPS)
        source = wide * scale * x.weight.double()
        update, norm_weight, multiplier = x.update, x.weight, x.multiplier
    else:
        given, source = x, x.double()
        update, norm_weight, multiplier = None, None, 1.0
    expected = source @ weights.exact.t()
    if biases:
        expected += torch.cat(list(biases)).double()
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
    tokens, rows = expected.shape
    out = torch.empty(tokens, BEFORE + rows + AFTER, dtype=given.dtype, device=DEVICE)
    arguments = weights.tiled.arguments()

    def run() -> None:
        step_linear_4bit(
            given,
            update,
            norm_weight,
            hidden[0] if hidden is not None else None,
            EPS,
            multiplier,
            *arguments,
            biases,
            gated,
            out[:, BEFORE:-AFTER],
            scratch,
        )

    return Product(
        name=f"{name}, {tokens} tokens",
        run=run,
        wide=out,
        expected=expected,
        most_error=ERRORS[given.dtype] * (2 if gated else 1),
        hidden=hidden,
    )


def plain(weights: Weights, x: torch.Tensor, scratch: torch.Tensor) -> Product:
    """A call of linear_4bit_tiled."""
    expected = x.double() @ weights.exact.t()
    tokens, rows = expected.shape
    out = torch.empty(tokens, BEFORE + rows + AFTER, dtype=x.dtype, device=DEVICE)
    arguments = weights.tiled.arguments()

    def run() -> None:
        operators.linear_4bit_tiled(x, *arguments, out[:, BEFORE:-AFTER], scratch)

    return Product(
        name=f"linear_4bit_tiled, {tokens} tokens",
        run=run,
        wide=out,
        expected=expected,
        most_error=ERRORS[x.dtype],
    )


def vector(size: int, dtype: torch.dtype, mean: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return (mean + 0.5 * torch.randn(size, generator=generator)).to(dtype).to(DEVICE)


def products_of(
    weights: Weights, tokens: int, dtype: torch.dtype, scratch: torch.Tensor
) -> Iterator[Product]:
    """Every call there is, with so many tokens."""
    columns = weights.tiled.columns
    # Parts of wider tensors, as an update is; hidden states have their rows close together.
    x = random_input(tokens, columns + 16, dtype).to(DEVICE)[:, 8:-8]
    update = random_input(tokens + 40, columns + 16, dtype).to(DEVICE)[:tokens, 8:-8]
    hidden = random_input(tokens + 80, columns, dtype).to(DEVICE)[:tokens].contiguous()
    norm_weight = vector(columns, dtype, 1.0)
    sizes = weights.sizes
    biases = [vector(size + n, dtype, 0.0)[:size].contiguous() for n, size in enumerate(sizes)]
    yield plain(weights, x, scratch)
    yield step("not fused", weights, x, scratch)
    yield step("biases", weights, x, scratch, biases=biases)
    if weights.in_turn:
        yield step("gate", weights, x, scratch, gated=True)
        yield step("gate and biases", weights, x, scratch, biases=biases, gated=True)
    if normalises(tokens, weights.tiled, torch.device(DEVICE, 0)):
        alone = Norm(hidden=hidden, update=None, weight=norm_weight)
        updated = Norm(hidden=hidden, update=update, weight=norm_weight)
        half = Norm(hidden=hidden, update=update, weight=norm_weight, multiplier=0.5)
        yield step("norm", weights, alone, scratch)
        yield step("norm and update", weights, updated, scratch)
        yield step("norm and half an update", weights, half, scratch, biases=biases)
        if weights.in_turn:
            yield step("norm and gate", weights, half, scratch, gated=True)
    else:
        # Few tokens of what is not too wide always are.
        assert tokens > 1 or columns > 16_384


def check(products: Sequence[Product], scratch: torch.Tensor) -> None:
    """Results are right, and the same bits again when all of them are replayed in a graph."""

    def forget() -> None:
        # As float32 it is NaN.
        scratch.fill_(0xFF)
        for product in products:
            product.forget()

    forget()
    for product in products:
        product.run()
    found = [product.check() for product in products]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product.run()
    for _ in range(2):
        forget()
        graph.replay()
        for product, expected in zip(products, found, strict=True):
            assert same_bits(product.check(), expected), product.name


def new_scratch(size: int = SCRATCH_BYTES) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=DEVICE)


@pytest.fixture(scope="module")
def compiled() -> None:
    """All kernels, compiled side by side."""
    for dtype, scales in combinations(ERRORS, (torch.float32, torch.uint8, torch.bfloat16)):
        products_tiled.prepare(dtype, scales, torch.device(DEVICE, 0))


@pytest.fixture
def for_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper leaves many tokens to this kernel, too; for its own see test_products_wide."""
    monkeypatch.setattr(products_tiled, "wide_pieces", lambda *_: [])


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("compiled", "for_every_gpu")
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_products_are_exact_to_rounding_and_repeat_bit_for_bit(
    format_name: str, shape: tuple[int, int], kind: str
) -> None:
    weights, scratch = weights_of(format_name, shape, kind), new_scratch()
    for dtype in ERRORS:
        check([p for n in TOKENS for p in products_of(weights, n, dtype, scratch)], scratch)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("compiled", "for_every_gpu")
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("shape", [(112, 896), (512, 14336), (64, 28672)])
@pytest.mark.parametrize("format_name", ["nf4-dq", "int4"])
def test_products_are_the_same_on_the_smallest_gpu(
    format_name: str, shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There columns are split, and blocks have many tiles.
    monkeypatch.setattr(products_tiled, "limits_of", lambda _device: (20, LEAST_SHARED_BYTES))
    weights, scratch = weights_of(format_name, shape, kind), new_scratch()
    for dtype in ERRORS:
        check([p for n in TOKENS for p in products_of(weights, n, dtype, scratch)], scratch)


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", [(48, 640), (4096, 14336), (8192, 28672)])
def test_the_least_scratch_only_makes_pieces_smaller(shape: tuple[int, int]) -> None:
    weights = weights_of("nf4-dq", shape, "one")
    for tokens in (1, 8, 64):
        scratch = new_scratch(least_scratch_bytes("nf4-dq", tokens, *shape))
        x = random_input(tokens, shape[1], torch.bfloat16).to(DEVICE)
        check([plain(weights, x, scratch)], scratch)


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
def test_more_tokens_than_it_normalises_are_refused() -> None:
    weights, scratch = weights_of("nf4", (48, 640), "one"), new_scratch()
    hidden = random_input(9, 640, torch.bfloat16).to(DEVICE).contiguous()
    norm = Norm(hidden=hidden, update=None, weight=vector(640, torch.bfloat16, 1.0))
    assert not normalises(9, weights.tiled, torch.device(DEVICE, 0))
    with pytest.raises(ValueError, match="no kernel normalises 9 tokens"):
        step("norm", weights, norm, scratch).run()
