"""Kernels for weights in tiles: on a GPU, or small in Triton's interpreter (test_interpreter)."""

from __future__ import annotations

import os

import pytest
import torch

from oomproof.formats import get_format
from oomproof.quantization import operators
from oomproof.quantization.handlers import handler
from oomproof.quantization.scratch import least_scratch_bytes
from oomproof.quantization.tiled_writer import TiledWriter, tiling_bytes
from tests.quantization.weights import (
    PRODUCT_ERRORS,
    empty_parts,
    encode_in_slices,
    random_input,
    random_weight,
    same_bits,
    tiled_set,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int4")
# fp4 differs from nf4 by the numbers in its table; the interpreter is slow.
DEQUANTIZED = ("nf4", "nf4-dq", "int4") if INTERPRETED else FORMATS
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Whole groups of scales, and last ones of two, four and six blocks.
SHAPES = ((32, 128), (16, 896)) if INTERPRETED else ((48, 128), (32, 512), (16, 640), (48, 1408))
SCRATCH_BYTES = 1 << 20

if INTERPRETED:
    from oomproof.quantization import products_cuda

    linear_4bit_tiled = products_cuda.linear_4bit_tiled
    gated_4bit_tiled = products_cuda.gated_4bit_tiled
else:
    linear_4bit_tiled = operators.linear_4bit_tiled
    gated_4bit_tiled = operators.gated_4bit_tiled


def scratch_of(size: int = SCRATCH_BYTES) -> torch.Tensor:
    return torch.full((size,), 0xA5, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize("format_name", DEQUANTIZED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_rows_are_dequantized_to_the_bits_of_row_major_weights(
    format_name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    from oomproof.quantization.dequantize_triton import FourBits, dequantize_4bit
    from oomproof.quantization.tiles_triton import dequantize_tiled

    rows, columns = shape
    encoded = [
        handler(format_name).encode(random_weight(shape, seed=seed).to(DEVICE)) for seed in (0, 1)
    ]
    weights = tiled_set(format_name, encoded, columns, in_turn=True)
    for segment, parts in zip(weights.segments, encoded, strict=True):
        row_major = FourBits(
            codes=parts["weight"].view(-1),
            scales=parts["scale" if format_name == "int4" else "absmax"],
            table=weights.quant_map,
            nested=segment.nested,
        )
        expected = torch.empty(shape, dtype=dtype, device=DEVICE)
        dequantize_4bit(row_major, 0, expected)
        for first, end in ((0, rows), (3, rows - 2), (7, 8)):
            found = torch.full((end - first + 2, columns), 7.0, dtype=dtype, device=DEVICE)
            dequantize_tiled(weights, segment, first, found[1:-1])
            assert same_bits(found[1:-1], expected[first:end]), (first, end)
            assert bool((found[[0, -1]] == 7).all())


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("tokens", [7] if INTERPRETED else [1, 7, 33, 100])
def test_a_sets_product_is_that_of_its_linears_side_by_side(format_name: str, tokens: int) -> None:
    columns = 640
    for rows, in_turn in (((32, 32, 16), False), ((32, 32), True)):
        weights = [random_weight((n, columns), seed=n + i) for i, n in enumerate(rows)]
        encoded = [handler(format_name).encode(weight.to(DEVICE)) for weight in weights]
        tiled = tiled_set(format_name, encoded, columns, in_turn=in_turn)
        exact = torch.cat(
            [
                handler(format_name).decode(parts, (n, columns), torch.float32).double()
                for n, parts in zip(rows, encoded, strict=True)
            ]
        )
        for dtype in (torch.bfloat16,) if INTERPRETED else DTYPES:
            x = random_input(tokens, columns, dtype).to(DEVICE)
            expected = x.double() @ exact.t()
            # All at once; in slices that end within a tile, and run over from linear to linear.
            for size in (SCRATCH_BYTES, 35 * columns * dtype.itemsize + 512):
                out = torch.full((tokens, sum(rows) + 4), float("nan"), dtype=dtype, device=DEVICE)
                linear_4bit_tiled(x, *tiled.arguments(), out[:, 2:-2], scratch_of(size))
                error = (out[:, 2:-2].double() - expected).norm() / expected.norm()
                assert float(error) < PRODUCT_ERRORS[dtype], (dtype, rows, size)
                assert bool(out[:, [0, 1, -2, -1]].isnan().all())


@pytest.mark.parametrize("format_name", DEQUANTIZED)
@pytest.mark.parametrize("tokens", [7] if INTERPRETED else [1, 33, 64, 65, 300])
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gate_and_up_are_multiplied_slice_by_slice(
    format_name: str, tokens: int, in_turn: bool, biased: bool
) -> None:
    width, columns = 48, 640
    encoded = [
        handler(format_name).encode(random_weight((width, columns), seed=n).to(DEVICE))
        for n in (0, 1)
    ]
    weights = tiled_set(format_name, encoded, columns, in_turn=in_turn)
    exact = [
        handler(format_name).decode(parts, (width, columns), torch.float32).double()
        for parts in encoded
    ]
    for dtype in (torch.bfloat16,) if INTERPRETED else DTYPES:
        x = random_input(tokens, columns, dtype).to(DEVICE)
        biases = [random_weight((1, width), dtype, seed=n)[0].to(DEVICE) for n in (2, 3) if biased]
        gate, up = (
            x.double() @ weight.t() + (biases[n].double() if biased else 0)
            for n, weight in enumerate(exact)
        )
        expected = gate / (1 + (-gate).exp()) * up
        arguments = (*weights.arguments(), biases)
        # All at once; in slices, that end within a tile and whose gates' places are others'.
        least = 20 * columns * dtype.itemsize + 4 * tokens * width * dtype.itemsize + 512
        for size in (SCRATCH_BYTES, least):
            out = torch.full((tokens, width + 4), float("nan"), dtype=dtype, device=DEVICE)
            gated_4bit_tiled(x, *arguments, out[:, 2:-2], scratch_of(size))
            error = (out[:, 2:-2].double() - expected).norm() / expected.norm()
            assert float(error) < 2 * PRODUCT_ERRORS[dtype], (dtype, size)
            assert bool(out[:, [0, 1, -2, -1]].isnan().all())


@pytest.mark.parametrize("format_name", DEQUANTIZED)
@pytest.mark.parametrize("tokens", [1, 65])
def test_the_least_scratch_is_enough(format_name: str, tokens: int) -> None:
    weight = random_weight((16, 256)).to(DEVICE)
    tiled = tiled_set(format_name, [handler(format_name).encode(weight)], 256, in_turn=False)
    x = random_input(tokens, 256, torch.bfloat16).to(DEVICE)
    outs = [torch.empty(tokens, 16, dtype=x.dtype, device=DEVICE) for _ in range(2)]
    least = least_scratch_bytes(format_name, tokens, 16, 256)
    for out, size in zip(outs, (least, SCRATCH_BYTES), strict=True):
        linear_4bit_tiled(x, *tiled.arguments(), out, scratch_of(size))
    torch.testing.assert_close(outs[0], outs[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_tiles_that_lie_apart_are_copied(dtype: torch.dtype) -> None:
    from oomproof.quantization.tiles_triton import copy_tiles

    source = torch.arange(6 * 1056).to(dtype).view(6, 1056).to(DEVICE)
    home = torch.zeros(9, 1056, dtype=dtype, pin_memory=not INTERPRETED)
    copy_tiles(source[1::2], home[0::3])
    if not INTERPRETED:
        torch.cuda.synchronize()
    assert torch.equal(home[0::3], source[1::2].cpu())
    assert not home[1::3].any()
    assert not home[2::3].any()


@on_a_gpu
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 14336), (3008, 2176)])
def test_large_weights_are_dequantized_to_the_bits_of_row_major_ones(
    format_name: str, shape: tuple[int, int]
) -> None:
    from oomproof.quantization.dequantize_triton import FourBits, dequantize_4bit
    from oomproof.quantization.tiles_triton import dequantize_tiled

    parts = handler(format_name).encode(random_weight(shape).cuda())
    weights = tiled_set(format_name, [parts], shape[1], in_turn=False)
    [segment] = weights.segments
    row_major = FourBits(
        codes=parts["weight"].view(-1),
        scales=parts["scale" if format_name == "int4" else "absmax"],
        table=weights.quant_map,
        nested=segment.nested,
    )
    for dtype in DTYPES:
        found, expected = (torch.empty(shape, dtype=dtype, device="cuda") for _ in range(2))
        dequantize_4bit(row_major, 0, expected)
        dequantize_tiled(weights, segment, 0, found)
        assert same_bits(found, expected), dtype


@on_a_gpu
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_comes_into_its_tiles_without_an_allocation(
    format_name: str, dtype: torch.dtype
) -> None:
    weight = random_weight((1024, 2176), dtype).cuda()
    found = handler(format_name)
    # By the kernels, too: on a GPU fp4's codes are bitsandbytes' own.
    expected = encode_in_slices(format_name, weight, 512)
    name = "scale" if format_name == "int4" else "absmax"
    parts = empty_parts(format_name, (1024, 2176), "cuda")
    parts |= {part: parts[part].view(64, -1) for part in ("weight", name)}
    size = found.workspace_numel((1024, 2176))
    size += tiling_bytes(get_format(format_name), (1024, 2176)) // 4
    workspace = torch.full((size,), float("nan"), device="cuda")
    writer = TiledWriter(found, parts, (1024, 2176), workspace)
    for _ in range(2):  # The first time loads kernels.
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for first in (0, 512):
            writer.encode_slice(weight[first : first + 512], first)
    assert torch.cuda.max_memory_allocated() == before
    writer.finish()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    whole = tiled_set(format_name, [expected], 2176, in_turn=False)
    assert same_bits(parts["weight"], whole.codes)
    assert same_bits(parts[name], whole.scales)
    for other in expected.keys() - {"weight", name}:
        assert same_bits(parts[other], expected[other]), other


@on_a_gpu
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 7, 33, 100])
def test_a_product_allocates_nothing_and_runs_in_a_graph(format_name: str, tokens: int) -> None:
    shape = (1024, 2176)
    parts = handler(format_name).encode(random_weight(shape).cuda())
    weights = tiled_set(format_name, [parts], shape[1], in_turn=False)
    x = random_input(tokens, shape[1], torch.bfloat16).cuda()
    out, eager = (torch.empty(tokens, shape[0], dtype=x.dtype, device="cuda") for _ in range(2))
    scratch = scratch_of()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear_4bit_tiled(x, *weights.arguments(), out, scratch)
        stream.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_4bit_tiled(x, *weights.arguments(), eager, scratch)
        stream.synchronize()
        assert torch.cuda.max_memory_allocated() == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        linear_4bit_tiled(x, *weights.arguments(), out, scratch)
    x *= -0.5
    graph.replay()
    linear_4bit_tiled(x, *weights.arguments(), eager, scratch)
    assert torch.equal(out, eager)
