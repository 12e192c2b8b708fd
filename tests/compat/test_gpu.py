"""The contract on a GPU: `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oomproof.errors import CheckpointError, PlanDoesNotFitError
from oomproof.hardware.probe import probe
from oomproof.loading.reader import STAGING_BUFFER_BYTES, CheckpointReader
from oomproof.models.headers import read_header
from oomproof.models.spec import CheckpointSpec
from oomproof.session import load, plan

pytestmark = pytest.mark.gpu


def test_nvml_and_cuda_agree_on_what_is_free() -> None:
    for device in probe().devices:
        free, total = torch.cuda.mem_get_info(device.index)
        assert device.kind == "cuda"
        assert device.compute_capability == torch.cuda.get_device_capability(device.index)
        assert abs(device.total_bytes - total) < 2**30
        assert device.free_bytes >= free


@pytest.mark.parametrize("weight_format", ["bf16", "nf4", "nf4-dq", "llm-int8"])
def test_no_measured_peak_is_above_its_prediction(weight_format: str) -> None:
    with load("tiny", engine="transformers", format=weight_format, cap="2GiB") as model:
        assert model.generate("It was a dark night", seed=1, max_new_tokens=32)
        [device] = model.plan.devices_in_use
        measured = model.measured_terms()[device.index]
    assert measured.weights <= device.terms.weights
    assert measured.kv_cache <= device.terms.kv_cache
    assert measured.peak_bytes <= device.peak_bytes


def test_a_plan_beyond_the_free_memory_is_refused_before_loading() -> None:
    made = plan("tiny", engine="transformers", format="nf4-dq")
    # The tests before this one capped the process; closing their models lifted the caps.
    hoard = torch.empty(torch.cuda.mem_get_info()[0] - 2**28, dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(PlanDoesNotFitError, match="free now"):
            load(made)
    finally:
        del hoard
        torch.cuda.empty_cache()


def test_tensors_larger_than_the_staging_buffers_arrive_exactly(tmp_path: Path) -> None:
    count = STAGING_BUFFER_BYTES + 12_345
    values = {
        "big": torch.randn(count, dtype=torch.float32).bfloat16(),
        "small": torch.arange(7, dtype=torch.int16),
        "bad": torch.full((1000,), float("nan")),
    }
    path = tmp_path / "model.safetensors"
    save_file(values, path)
    checkpoint = CheckpointSpec(tensors=read_header(path), files=((path.name, 0),))
    reader = CheckpointReader(tmp_path, checkpoint, lambda _: torch.device("cuda", 0))
    with reader.open() as tensors:
        for name in ("big", "small"):
            assert torch.equal(tensors[name][...].cpu(), values[name])
    tensor = {entry.name: entry for entry in checkpoint.tensors}["bad"]

    def read_bad() -> None:
        with reader.open():
            reader.read(tensor)

    with pytest.raises(CheckpointError, match="'bad' holds a value that is not finite"):
        read_bad()
