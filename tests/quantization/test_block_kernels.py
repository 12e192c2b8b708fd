"""CUDA kernels of fp8-block against the references: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from oomproof.formats import ceil_div
from oomproof.quantization import operators, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ERRORS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SHAPES = ((64, 64), (130, 136), (200, 300), (300, 1024), (9, 21))
SCRATCH_BYTES = 1 << 22


def blocks_of(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, every one of e4m3 among them where there is room, and scales far apart."""
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(0, 127, (rows, columns), generator=generator, dtype=torch.uint8)
    codes += 128 * torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (ceil_div(rows, 128), ceil_div(columns, 128))
    scale = 2.0 ** (-10 * torch.rand(shape, generator=generator)) / 448
    return codes.view(torch.float8_e4m3fn).to(DEVICE), scale.to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_rows_are_dequantized_as_the_reference_does(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    from oomproof.quantization.blocks_triton import dequantize_blocks

    codes, scale = blocks_of(*shape)
    expected = reference.dequantize_blocks(codes, scale, 0, shape[0], dtype)
    for first, end in ((0, shape[0]), (3, shape[0] - 1)):
        out = torch.empty(end - first, shape[1], dtype=dtype, device=DEVICE)
        dequantize_blocks(codes, scale, first, out)
        if INTERPRETED and dtype == torch.bfloat16:  # it does not round to the nearest
            assert torch.allclose(out.float(), expected[first:end].float(), rtol=2**-7)
        else:
            assert torch.equal(out, expected[first:end])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_into_part_of_a_wider_tensor_is_exact_to_rounding(
    dtype: torch.dtype, tokens: int, shape: tuple[int, int]
) -> None:
    from oomproof.quantization.products_cuda import linear_fp8_block

    if INTERPRETED and dtype == torch.bfloat16 and 1 < tokens <= 64:
        pytest.skip("the interpreter multiplies matrices of bfloat16 as if they were integers")
    rows, columns = shape
    codes, scale = blocks_of(rows, columns)
    x = torch.randn(tokens, columns, device=DEVICE).to(dtype)
    wide = torch.zeros(tokens, rows + 7, dtype=dtype, device=DEVICE)
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=DEVICE)
    linear_fp8_block(x, codes, scale, wide[:, 3 : 3 + rows], scratch)
    weight = reference.dequantize_blocks(codes, scale, 0, rows, torch.float32)
    expected = x.double() @ weight.double().t()
    error = (wide[:, 3 : 3 + rows].double() - expected).norm() / expected.norm()
    assert error < ERRORS[dtype]
    assert not wide[:, :3].any()
    assert not wide[:, 3 + rows :].any()


@on_a_gpu
@pytest.mark.parametrize("tokens", [1, 8, 64, 2048])
def test_a_product_allocates_nothing_and_is_captured(tokens: int) -> None:
    codes, scale = blocks_of(1024, 4096)
    x = torch.randn(tokens, 4096, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty(tokens, 1024, device=DEVICE, dtype=torch.bfloat16)
    scratch = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
    operators.linear_fp8_block(x, codes, scale, out, scratch)
    expected = out.clone()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    operators.linear_fp8_block(x, codes, scale, out, scratch)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operators.linear_fp8_block(x, codes, scale, out, scratch)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
