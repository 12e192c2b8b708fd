"""LoRA's kernels: in the interpreter and on a GPU what plain torch computes, for any GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.engine.native.lora_cases import GPU_CASES, Case, compare

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
MOST_SHARED_BYTES = 99 * 1024
"""Of a block on compute capability 8.6, 8.9 and 12.0."""


@needs_triton
def test_the_interpreted_kernels_compute_what_plain_torch_computes() -> None:
    # In a process of its own: triton reads the variable when it is imported.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engine.native.lora_cases"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_compile_for_old_and_new_gpus_within_their_shared_memory(
    capability: int, dtype: str
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from oomproof.engine.native import lora_triton as kernels

    constants: dict[str, Any] = {
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "DEPENDENT": capability >= 90,
        "BLOCK_M": 16,
        "BLOCK_R": 16,
        "BLOCK_K": 128,
        "BLOCK_N": 64,
        "SPLITS": 16,
    }
    pointers = dict.fromkeys(
        ("x", "a", "b0", "b1", "b2", "out", "gate_b", "up_b", "gate_up"), f"*{dtype}"
    ) | {"parts": "*fp32"}
    for kernel in (kernels._down, kernels._up, kernels._up_gated):
        names = kernel.arg_names
        signature = {name: pointers.get(name, "i32") for name in names if name not in constants}
        own = {name: value for name, value in constants.items() if name in names}
        source = ASTSource(kernel, signature | dict.fromkeys(own, "constexpr"), constexprs=own)
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4, "num_stages": 3 if kernel is kernels._down else 1},
        )
        assert compiled.metadata.shared <= MOST_SHARED_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_on_a_gpu_they_compute_what_plain_torch_computes(
    case: Case, dtype: torch.dtype, bound: float
) -> None:
    compare(case, torch.device("cuda"), dtype, bound)
