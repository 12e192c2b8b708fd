"""On a GPU: the figures of the processor, in the memory that was planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import oomproof
from oomproof import evaluating
from oomproof.evaluation import run
from oomproof.evaluation.calibrate import sensitivities
from oomproof.evaluation.report import EvalReport
from oomproof.evaluation.variants import COMPARED
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.models.resolve import bundled_folder, resolve

pytestmark = pytest.mark.gpu

WORDS = "It was a dark night, and the rain fell upon the sea. The captain stood at the wheel. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS * 200)
    return path


def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the GPUs from what is evaluated from now on."""
    hardware = probe()
    processor = DeviceSpec(
        index=0,
        name="cpu",
        kind="cpu",
        total_bytes=hardware.host.total_ram_bytes,
        free_bytes=hardware.host.available_ram_bytes,
    )
    monkeypatch.setattr(
        evaluating,
        "probe",
        lambda: Hardware(devices=(processor,), host=hardware.host, source="probed"),
    )


def assert_alike(gpu: EvalReport, cpu: EvalReport) -> None:
    for here, there in zip(gpu.formats, cpu.formats, strict=True):
        assert (here.format, here.tensors) == (there.format, there.tensors)
        assert here.weight_bytes == there.weight_bytes
        assert here.kl.value == pytest.approx(there.kl.value, rel=0.1, abs=3e-4)
        assert here.bits_per_byte.value == pytest.approx(there.bits_per_byte.value, rel=0.01)
        for layer, other in zip(here.layers, there.layers, strict=True):
            assert layer.weight_error == pytest.approx(other.weight_error, rel=1e-3)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_figures_are_the_processors(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute_dtype: str
) -> None:
    monkeypatch.setenv("OOMPROOF_HOME", str(tmp_path))
    formats = "int8,nf4,nf4-dq,nf4-g16,fp4,int4,nf4-dq+search,nf4-g16+search,int4+search,fit:4MiB"
    options: dict[str, Any] = {
        "formats": formats + (",fp8" if compute_dtype == "bfloat16" else ""),
        "compute_dtype": compute_dtype,
        "context": 128,
        "tokens": 2048,
    }
    gpu = oomproof.evaluate("tiny", text, **options)
    assert gpu.device == max(probe().devices, key=lambda one: one.free_bytes).name
    on_the_processor(monkeypatch)
    cpu = oomproof.evaluate("tiny", text, **options)
    assert gpu.histogram.counts == pytest.approx(cpu.histogram.counts, abs=200)
    assert_alike(gpu, cpu)


def test_a_folder_in_4_bits_is_the_processors_too(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    oomproof.quantize("tiny", folder, device="cpu", search=False)
    options: dict[str, Any] = {"formats": ["nf4-dq", str(folder)], "context": 128, "tokens": 1024}
    gpu = oomproof.evaluate("tiny", text, **options)
    own, of_folder = gpu.formats
    assert of_folder.kl.value == pytest.approx(own.kl.value, rel=0.02)
    on_the_processor(monkeypatch)
    assert_alike(gpu, oomproof.evaluate("tiny", text, **options))


def test_sensitivities_are_the_processors(text: Path) -> None:
    spec = resolve("tiny")
    assert spec.forward is not None
    generator = torch.Generator().manual_seed(2)
    inputs: list[list[int]] = torch.randint(4, 2048, (4, 128), generator=generator).tolist()
    device = max(probe().devices, key=lambda one: one.free_bytes)
    gpu, cpu = (
        sensitivities(bundled_folder(), spec, spec.forward, inputs, device=one)
        for one in (device, None)
    )
    # Computed in bfloat16 there and in float32 here, with the same noise.
    assert gpu == {name: pytest.approx(cost, rel=0.1) for name, cost in cpu.items()}


def test_where_the_states_wait_changes_nothing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"formats": "nf4,int4", "context": 128, "tokens": 1024}
    here = oomproof.evaluate("tiny", text, **options)
    real = run.Job

    def on_host(**fields: Any) -> run.Job:
        return real(**{**fields, "states_on_device": False})

    monkeypatch.setattr(run, "Job", on_host)
    there = oomproof.evaluate("tiny", text, **options)
    assert [one.kl for one in here.formats] == [one.kl for one in there.formats]


def test_no_more_memory_is_taken_than_was_planned(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    oomproof.quantize("tiny", folder, device="cpu", search=False)
    device = max(probe().devices, key=lambda one: one.free_bytes).index
    oomproof.evaluate("tiny", text, context=64, tokens=64)  # what a process takes once
    torch.cuda.reset_peak_memory_stats(device)
    names = [*COMPARED, "nf4-g16+search", "fit:4MiB", str(folder)]
    report = oomproof.evaluate("tiny", text, formats=names, context=512, tokens=4096)
    assert torch.cuda.max_memory_reserved(device) <= report.peak_bytes
    assert resolve("tiny").num_hidden_layers == len(report.formats[0].layers)


def test_tokens_are_scored_as_on_the_processor_and_without_memory() -> None:
    with oomproof.load("tiny", format="bf16", engine="native", context=512) as model:
        tokens = model.tokenizer.encode(WORDS * 6)
        model.score(tokens, 1)
        reserved = torch.cuda.memory_reserved()
        allocated = torch.cuda.memory_allocated()
        found = model.score(tokens, 1)
        assert (torch.cuda.memory_reserved(), torch.cuda.memory_allocated()) == (
            reserved,
            allocated,
        )
        answer = model.stream(tokens[:40], temperature=0, max_new_tokens=4, logprobs=1)
        assert "".join(answer)
        again = model.score([*tokens[:40], *answer.tokens], 40)
        assert [one.logprob for one in again] == pytest.approx(
            [one.logprob for one in answer.logprobs], abs=0.05
        )
        assert len(found) == len(tokens) - 1
