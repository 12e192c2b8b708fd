"""The decoder's kernels: in the interpreter and on a GPU what plain torch computes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.engine.native.kernel_cases import (
    GPU_CASES,
    Case,
    bound_of,
    compare_attention,
    compare_e4m3,
    compare_elementwise,
    compare_next_inputs,
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_interpreted_kernels_compute_what_plain_torch_computes() -> None:
    # In a process of its own: triton reads the variable when it is imported.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engine.native.kernel_cases"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_attention_on_a_gpu_is_the_references(case: Case) -> None:
    compare_attention(case, torch.device("cuda"), bound_of(case))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_norm_and_gate_on_a_gpu_are_the_references(dtype: torch.dtype, bound: float) -> None:
    compare_elementwise(torch.device("cuda"), dtype, bound)


@pytest.mark.gpu
def test_the_next_steps_rows_on_a_gpu_are_the_references() -> None:
    compare_next_inputs(torch.device("cuda"))


@pytest.mark.gpu
def test_e4m3_on_a_gpu_is_torchs() -> None:
    compare_e4m3(torch.device("cuda"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("dtype", "block", "capability", "float8", "expected"),
    [
        (torch.bfloat16, 128, (9, 0), False, (128, 3, False)),
        (torch.float16, 64, (9, 0), False, (128, 3, False)),
        # e4m3 pages take registers to be converted.
        (torch.bfloat16, 128, (9, 0), True, (64, 3, True)),
        (torch.bfloat16, 256, (9, 0), False, (64, 2, False)),
        (torch.bfloat16, 128, (10, 0), False, (64, 3, False)),
        (torch.bfloat16, 128, (8, 0), False, (64, 3, False)),
        (torch.float32, 128, (9, 0), False, (32, 1, False)),
    ],
)
def test_a_chunks_attention_is_cut_for_the_gpu(
    dtype: torch.dtype,
    block: int,
    capability: tuple[int, int],
    float8: bool,
    expected: tuple[int, int, bool],
) -> None:
    from oomproof.engine.native.attend_triton import prefill_tiles

    found = prefill_tiles(dtype, block, capability, float8=float8)
    assert (found.keys, found.stages, found.overlaps) == expected
