"""Tests of kernels in Triton's interpreter, where no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["test_kernels.py", "test_tiled_kernels.py", "test_block_kernels.py"]
)
def test_the_kernels_agree_with_the_references(name: str) -> None:
    # In a process of its own: triton reads the variable when it is imported.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            str(Path(__file__).with_name(name)),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
