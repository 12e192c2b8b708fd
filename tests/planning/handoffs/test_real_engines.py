"""Hand-offs against the engines' own code, each in an environment of its own.

vLLM is not among them: its wheels bring several gigabytes of CUDA packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oomproof.hardware.describe import describe
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.planning.handoffs import hand_off
from oomproof.planning.handoffs.llama_cpp import BLOCKS
from oomproof.planning.handoffs.mlx import mlx_bytes
from oomproof.planning.request import PlanRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def environment(folder: Path, *packages: str) -> Path:
    """A fresh virtual environment with these packages; its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [str(python), "-m", "pip", "install", "--quiet", *packages]
    subprocess.run(command, check=True)
    return python


def ask(python: Path, program: str, *arguments: str) -> object:
    """What a program prints as JSON."""
    command = [str(python), "-c", program, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_block_sizes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "gguf")
    program = (
        "import json, gguf;"
        "print(json.dumps({t.name: list(s) for t, s in gguf.GGML_QUANT_SIZES.items()}))"
    )
    theirs = ask(python, program)
    assert isinstance(theirs, dict)
    for name, block in BLOCKS.items():
        assert tuple(theirs[name]) == block, name


def test_mlx_lm_takes_our_commands_and_stores_our_bytes(tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "mlx-lm", "mlx[cpu]")
    spec = resolve("tiny")
    found = hand_off("mlx", spec, describe("M2 Ultra 192GB"), PlanRequest(), format_name="int4")
    convert, serve = (line.split() for line in found.commands)
    assert convert[0] == "mlx_lm.convert"
    out = tmp_path / "made"
    arguments = [*convert[1:], "--mlx-path", str(out)]
    assert str(bundled_folder()) in arguments
    subprocess.run([str(python), "-m", "mlx_lm", "convert", *arguments], check=True)
    header = ask(
        python,
        "import json, struct, sys;"
        "f = open(sys.argv[1], 'rb'); n = struct.unpack('<Q', f.read(8))[0];"
        "print(json.dumps(json.loads(f.read(n))))",
        str(out / "model.safetensors"),
    )
    assert isinstance(header, dict)
    stored = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    )
    assert stored == sum(mlx_bytes(tensor, 4) for tensor in spec.tensors)
    help_text = subprocess.run(
        [str(python), "-m", "mlx_lm", "server", "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert serve[0] == "mlx_lm.server"
    for word in serve[1:]:
        if word.startswith("--"):
            assert word in help_text
