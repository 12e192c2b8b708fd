"""Hand-offs against the engines' own code, each in an environment of its own.

vLLM's wheel is read and not installed: what it needs are several gigabytes of CUDA packages.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import zipfile
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


def test_vllms_own_parser_has_our_options_and_its_core_our_methods(tmp_path: Path) -> None:
    platforms = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")
    where = [word for name in platforms for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    only = ["--only-binary", ":all:", "--python-version", "3.12"]
    subprocess.run([*command, str(tmp_path), *only, *where, "vllm>=0.28"], check=True)
    [wheel] = tmp_path.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as files:
        options = files.read("vllm/engine/arg_utils.py").decode()
        methods = files.read("vllm/model_executor/layers/quantization/__init__.py").decode()
        cache = files.read("vllm/config/cache.py").decode()
    for request, gpus in (
        (PlanRequest(kv_format="fp8", concurrency=4), "4xA100-80GB"),
        (PlanRequest(context=4096), "RTX 4090"),
    ):
        found = hand_off("vllm", resolve("llama-3.1-70b"), describe(gpus), request)
        for word in shlex.split(" ".join(found.commands)):
            if word.startswith("--"):
                assert f'"{word}"' in options, word
    for method in ("fp8", "awq", "gptq", "compressed-tensors", "fbgemm_fp8"):
        assert f'"{method}"' in methods
    assert "bitsandbytes" not in methods
    assert '"fp8"' in cache
