"""A layer's weights in tiles compute what they compute row-major, from wherever they came."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from oomproof.engine.native.layout import lay_out_block
from oomproof.engine.native.linears import Chain, TiledLinears
from oomproof.engine.native.weights import LayerWeights, Parameter, StepProducts
from oomproof.formats import DType
from oomproof.models.resolve import bundled_folder
from oomproof.quantization.tiles import untile_codes, untile_scale_rows
from tests.engine.native.layers import Shape, fill, layer_tensors
from tests.engine.native.test_engine import engine_of, prompts, request, run
from tests.quantization.weights import same_bits

TILED = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int4")
SHAPES: tuple[Shape, ...] = ((256, 128, 256, 384), (48, 16, 128, 48), (64, 24, 128, 192))
"""One stream a projection; scales that alignment parts; linears that cannot be tiled."""
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("format_name", TILED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", DEVICES)
def test_projections_compute_what_they_do_row_major(
    format_name: str, shape: Shape, where: str
) -> None:
    layers = []
    for tiled in (False, True):
        tensors = layer_tensors(shape, format_name, biased=True)
        block = lay_out_block(tensors, format_name, tiled=tiled)
        memory = torch.full((block.size_bytes,), 0xA5, dtype=torch.uint8, device=where)
        fill(block, memory)
        layers.append(LayerWeights(block, memory))
    in_tiles = layers[1]
    if shape == SHAPES[0]:
        assert in_tiles.qkv.tiled is not None
        assert in_tiles.gate_up.tiled is not None
    queries, kv, hidden, width = shape
    scratch = torch.empty(1 << 20, dtype=torch.uint8, device=where)
    for tokens in (1, 7, 33, 100):
        for name, columns, rows in (
            ("qkv", hidden, queries + 2 * kv),
            ("o", queries, hidden),
            ("gate_up", hidden, 2 * width),
            ("down", width, hidden),
        ):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(where)
            outs = [torch.full((tokens, rows), float("nan"), device=where) for _ in layers]
            for layer, out in zip(layers, outs, strict=True):
                getattr(layer, name).multiply(x, out, scratch)
            torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_name", ["bf16", "int8", "fp8", *TILED])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", DEVICES)
def test_gate_and_slices_of_up_are_gate_and_up(
    format_name: str, tiled: bool, shape: Shape, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 128 rows of 128 columns or more: whole blocks of 256 scales.
    monkeypatch.setattr("oomproof.memory.slices.UP_ROWS", 128)
    tensors = layer_tensors(shape, format_name, biased=True, compute=DType.BFLOAT16)
    block = lay_out_block(tensors, format_name, tiled=tiled)
    memory = torch.full((block.size_bytes,), 0xA5, dtype=torch.uint8, device=where)
    fill(block, memory)
    layer = LayerWeights(block, memory)
    _, _, hidden, width = shape
    assert [part.rows for part in layer.up] == [min(128, width - a) for a in range(0, width, 128)]
    scratch = torch.empty(1 << 20, dtype=torch.uint8, device=where)
    x = torch.randn(70, hidden, generator=torch.Generator().manual_seed(1)).bfloat16().to(where)
    whole = torch.full((70, 2 * width), float("nan"), dtype=x.dtype, device=where)
    layer.gate_up.multiply(x, whole, scratch)
    found = torch.full_like(whole, float("nan"))
    first = 0
    for part in (layer.gate, *layer.up):
        part.multiply(x, found[:, first : first + part.rows], scratch)
        first += part.rows
    torch.testing.assert_close(found, whole, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("format_name", TILED)
@pytest.mark.parametrize("where", DEVICES)
def test_a_layer_keeps_the_bits_of_every_part_and_travels_home(
    format_name: str, where: str
) -> None:
    shape = SHAPES[0]
    rows = lay_out_block(layer_tensors(shape, format_name), format_name)
    # By the kernels of that device, too: on a GPU fp4's codes are bitsandbytes' own.
    expected = torch.zeros(rows.size_bytes, dtype=torch.uint8, device=where)
    fill(rows, expected)
    expected = expected.cpu()
    block = lay_out_block(layer_tensors(shape, format_name), format_name, tiled=True)
    memory = torch.full((block.size_bytes,), 0xA5, dtype=torch.uint8, device=where)
    home = torch.zeros(block.size_bytes, dtype=torch.uint8, pin_memory=where == "cuda")
    fill(block, memory, home)
    if where == "cuda":
        torch.cuda.synchronize()
    originals = {placed.spec.name: Parameter(placed, expected) for placed in rows.placed}
    for placed in block.placed:
        if not placed.held.quantized:
            continue
        original = originals[placed.spec.name].parts
        for name, part in Parameter(placed, home).parts.items():
            found = part
            if name in {"weight", "absmax", "scale"}:
                found = torch.empty_like(original[name]).view(placed.spec.shape[0], -1)
                (untile_codes if name == "weight" else untile_scale_rows)(part, found)
            assert same_bits(found, original[name]), (placed.spec.name, name)


def test_biases_that_are_neighbours_are_added_at_once() -> None:
    block = lay_out_block(layer_tensors(SHAPES[0], "nf4", biased=True), "nf4", tiled=True)
    memory = torch.zeros(block.size_bytes, dtype=torch.uint8)
    product = LayerWeights(block, memory).qkv.tiled
    assert isinstance(product, TiledLinears)
    assert [(first, end) for first, end, _ in product.biases] == [(0, 512)]


@pytest.mark.parametrize("format_name", TILED)
def test_an_engine_answers_the_same_from_tiles(
    format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"compute_dtype": "float32", "kv_format": "fp32", "context": 256, "concurrency": 3}
    asked = [request(str(n), prompt, 12) for n, prompt in enumerate(prompts(3, 2048, 60))]
    row_major = engine_of(bundled_folder(), format=format_name, **options)
    expected = run(row_major, asked)
    row_major.close()
    monkeypatch.setattr(
        "oomproof.engine.native.device.lay_out_block",
        lambda unit, name, **_: lay_out_block(unit, name, tiled=True),
    )
    in_tiles = engine_of(bundled_folder(), format=format_name, **options)
    layers = in_tiles._running.devices[0].layers
    assert layers is not None
    assert layers._weights(0).qkv.tiled is not None
    assert run(in_tiles, asked) == expected
    in_tiles.close()


@pytest.mark.parametrize(
    ("normalises", "chains"),
    [
        ((False,), (False,)),
        ((True,), (False,)),
        ((True, False, False), (False,)),
        ((False,), (True,)),
        # A layer's products are a chain or not, whatever the one before it was.
        ((True,), (True, False)),
        ((True, False, False), (False, True, True)),
    ],
)
def test_an_engine_answers_the_same_in_fused_steps(
    normalises: tuple[bool, ...], chains: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of a GPU by the operators' references, fused in each way or by turns."""
    options = {"compute_dtype": "float32", "kv_format": "fp32", "context": 256, "concurrency": 3}
    asked = [request(str(n), prompt, 12) for n, prompt in enumerate(prompts(3, 2048, 60))]
    row_major = engine_of(bundled_folder(), format="nf4-dq", **options)
    expected = run(row_major, asked)
    row_major.close()

    def in_steps(layer: LayerWeights) -> StepProducts:
        qkv, o, gate_up, down = (
            part.tiled for part in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
        assert qkv is not None
        assert o is not None
        assert gate_up is not None
        assert down is not None
        return StepProducts(qkv=qkv, o=o, gate_up=gate_up, down=down)

    turns = cycle(normalises)
    steps: list[int] = []

    def normalises_now(_product: TiledLinears, tokens: int) -> bool:
        steps.append(tokens)
        return next(turns)

    monkeypatch.setattr(
        "oomproof.engine.native.device.lay_out_block",
        lambda unit, name, **_: lay_out_block(unit, name, tiled=True),
    )
    monkeypatch.setattr(LayerWeights, "_step_products", in_steps)
    monkeypatch.setattr(TiledLinears, "normalises", normalises_now)
    chained = cycle(chains)

    def chains_now(_products: StepProducts, tokens: int, _chain: Chain) -> bool:
        steps.append(tokens)
        return next(chained)

    monkeypatch.setattr(StepProducts, "chains", chains_now)
    monkeypatch.setattr("oomproof.engine.native.stage.may_wait", lambda *_: True)
    fused = engine_of(bundled_folder(), format="nf4-dq", **options)
    assert run(fused, asked) == expected
    assert steps
    fused.close()
