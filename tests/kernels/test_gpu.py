"""A small kernel on a GPU: loaded, launched, captured (make test-gpu)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from oomproof.errors import CudaError
from oomproof.kernels import source
from oomproof.kernels.module import Kernel, launch, load_modules
from oomproof.kernels.source import Source, Variant
from tests.kernels.programs import SCALE, Params

pytestmark = pytest.mark.gpu

VARIANT = Variant(defines={"FACTOR": 2}, shared_bytes=64 * 1024)
SCALES = Source(path="scale.cu", headers=("params.cuh",), variants=(VARIANT,))


@pytest.fixture
def scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    for name, text in ((SCALE.name, SCALE.text), *SCALE.headers.items()):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(source, "files", lambda package: tmp_path)
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    source._read.cache_clear()
    [loaded] = load_modules(SCALES, [VARIANT], torch.cuda.get_device_capability())
    yield loaded.kernel("scale", Params)
    source._read.cache_clear()


def multiply(kernel: Kernel, values: torch.Tensor, *, shared_bytes: int = 1024) -> None:
    """Values · 0.5 · FACTOR + 3, so + 3."""
    arguments = Params(values=values.data_ptr(), count=values.numel(), scale=0.5, flag=3)
    grid = ((values.numel() + 255) // 256, 1, 1)
    stream = torch.cuda.current_stream().cuda_stream
    launch(kernel, grid, (256, 1, 1), shared_bytes, arguments, stream, dependent=True)


def test_a_launch_computes_what_its_parameters_say(scale: Kernel) -> None:
    values = torch.arange(1000, dtype=torch.float32, device="cuda")
    for _ in range(10):
        multiply(scale, values)
    assert torch.equal(values.cpu(), torch.arange(1000, dtype=torch.float32) + 30)


def test_more_than_48_kib_of_shared_memory_can_be_had(scale: Kernel) -> None:
    scale.prepare(VARIANT.shared_bytes)
    values = torch.zeros(300, device="cuda")
    multiply(scale, values, shared_bytes=VARIANT.shared_bytes)
    assert values.eq(3).all()
    with pytest.raises(CudaError, match=r"cuKernelSetAttribute.*CUDA_ERROR_INVALID_VALUE"):
        multiply(scale, values, shared_bytes=10 * 1024 * 1024)


def test_launches_are_captured_and_replayed_with_what_they_depend_on(scale: Kernel) -> None:
    values = torch.zeros(1000, device="cuda")
    multiply(scale, values)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            multiply(scale, values)
    values.zero_()
    for _ in range(20):
        graph.replay()
    assert values.eq(300).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_kernel_runs_on_every_gpu_of_its_capability(scale: Kernel) -> None:
    for device in range(2):
        with torch.cuda.device(device):
            values = torch.zeros(1000, device=f"cuda:{device}")
            multiply(scale, values, shared_bytes=VARIANT.shared_bytes)
            assert values.eq(3).all()
