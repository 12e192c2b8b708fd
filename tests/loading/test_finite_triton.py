"""The kernel that finds NaN and infinity, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

_SCRIPT = """
import torch
from oomproof.loading.finite_triton import mark_non_finite

for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    most = torch.finfo(dtype)
    cases = [(1, 0), (3, 2), (8191, 8190), (8192, 8191), (8193, 8192), (16384, 100), (20000, 9999)]
    for count, at in cases:
        for value, expected in {
            float("nan"): 1, float("inf"): 1, float("-inf"): 1,
            most.max: 0, most.min: 0, most.tiny / 2: 0, 0.0: 0,
        }.items():
            values = torch.randn(count + 1).to(dtype)
            values[count] = float("nan")  # beyond the end
            values[at] = value
            flags = torch.zeros(3, dtype=torch.int32)
            mark_non_finite(values[:count], flags, 1)
            assert flags.tolist() == [0, expected, 0], (dtype, count, value)
bytes_ = torch.arange(256, dtype=torch.uint8)
for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
    flags = torch.zeros(256, dtype=torch.int32)
    for byte in range(256):
        mark_non_finite(bytes_[byte : byte + 1].view(dtype), flags, byte)
    assert torch.equal(flags == 0, torch.isfinite(bytes_.view(dtype).float())), dtype
flags = torch.tensor([1], dtype=torch.int32)
mark_non_finite(torch.ones(5), flags, 0)
assert flags.tolist() == [1], "a later slice must not clear what an earlier one set"
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_marks_nan_and_infinity_and_nothing_else() -> None:
    # In a process of its own: triton reads the variable when it is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
