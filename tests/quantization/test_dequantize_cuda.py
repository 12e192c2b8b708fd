"""Tiles to rows in CUDA C++, against Triton's kernel, bit for bit."""

from __future__ import annotations

import pytest
import torch

from oomproof.quantization.dequantize_cuda import dequantize_tiles, supports_rows
from oomproof.quantization.handlers import handler
from tests.quantization.weights import random_weight, same_bits, tiled_set


def test_rows_that_are_no_whole_tiles_are_left_to_triton() -> None:
    assert not supports_rows(torch.empty(16, 128, dtype=torch.bfloat16), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("format_name", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 128), (48, 640), (96, 1408), (1024, 4096), (64, 11008)])
def test_the_bits_are_those_of_tritons_kernel(
    format_name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    from oomproof.quantization.tiles_triton import dequantize_tiled

    rows, columns = shape
    encoded = [
        handler(format_name).encode(random_weight(shape, seed=seed).cuda()) for seed in (0, 1)
    ]
    for in_turn in (False, True):
        weights = tiled_set(format_name, encoded, columns, in_turn=in_turn)
        for segment in weights.segments:
            for first, end in ((0, rows), (rows // 32 * 16, rows)):
                found, expected = (
                    torch.full((end - first, columns), float("nan"), dtype=dtype, device="cuda")
                    for _ in range(2)
                )
                assert supports_rows(found, first)
                dequantize_tiles(weights, segment, first, found)
                dequantize_tiled(weights, segment, first, expected)
                assert same_bits(found, expected)
