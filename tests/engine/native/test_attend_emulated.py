"""The attention kernel in CUDA C++ on a CPU, its threads in shuffled orders (cuda_shim.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import oomproof
from oomproof.engine.native.attend_cuda import Params
from oomproof.kernels.source import Variant
from tests.engine.native.attend_cases import E4M3, FP16, Case, Step, same_bits

HERE = Path(__file__).parent
PACKAGE = Path(oomproof.__file__).parent
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

CASES = (
    Case(group=4, kv_heads=2, head_dim=128, positions=(0, 255, -1, 610)),
    Case(group=4, kv_heads=1, head_dim=128, positions=(1900,), normed=True),
    Case(group=3, kv_heads=1, head_dim=128, positions=(700, 15, 16), window=200),
    Case(group=9, kv_heads=1, head_dim=64, positions=(300, 1), dtype=FP16, kv_dtype=E4M3),
)


def built(variant: Variant, folder: Path) -> ctypes.CDLL:
    assert COMPILER is not None
    library = folder / "_".join(("attend", *map(str, variant.defines.values()), "emulated.so"))
    if library.exists():
        return ctypes.CDLL(str(library))
    defines = [f"-D{name}={value}" for name, value in variant.defines.items()]
    subprocess.run(
        [
            COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off",
            "-include", str(HERE / "cuda_shim.h"), *defines,
            "-I", str(PACKAGE / "engine/native/cuda"), "-I", str(PACKAGE / "kernels/cuda"),
            str(HERE / "attend_emulated.cpp"), "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


def emulate(step: Step, library: ctypes.CDLL, cluster: int, processors: int, seed: int) -> None:
    geometry = step.geometry(processors, (9, 0), cluster)
    params = step.params(geometry)
    assert isinstance(params, Params)
    library.run_attend(
        ctypes.byref(params),
        *geometry.grid,
        geometry.block[0],
        geometry.cluster,
        ctypes.c_long(geometry.shared_bytes),
        seed,
    )


@pytest.mark.parametrize("case", CASES)
def test_the_emulated_kernel_attends_as_plain_torch(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    library = built(case.variant, tmp_path_factory.getbasetemp())
    outs: dict[int, torch.Tensor] = {}
    for seed, cluster in enumerate((1, 1, 4, 4)):
        step = Step(case, torch.device("cpu"))
        emulate(step, library, cluster, 16, seed)
        step.check()
        # Whichever thread comes first, and however late copies arrive: the same bits.
        assert same_bits(outs.setdefault(cluster, step.out), step.out)
