"""On a GPU: the figures of the processor, in the memory that was planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import oomproof
from oomproof import evaluating
from oomproof.evaluation import run
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.models.resolve import resolve

pytestmark = pytest.mark.gpu

WORDS = "It was a dark night, and the rain fell upon the sea. The captain stood at the wheel. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS * 200)
    return path


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_figures_are_the_processors(
    text: Path, monkeypatch: pytest.MonkeyPatch, compute_dtype: str
) -> None:
    formats = "int8,nf4,nf4-dq,fp4,int4" + (",fp8" if compute_dtype == "bfloat16" else "")
    options: dict[str, Any] = {
        "formats": formats,
        "compute_dtype": compute_dtype,
        "context": 128,
        "tokens": 2048,
    }
    gpu = oomproof.evaluate("tiny", text, **options)
    hardware = probe()
    assert gpu.device == max(hardware.devices, key=lambda one: one.free_bytes).name
    processor = DeviceSpec(
        index=0,
        name="cpu",
        kind="cpu",
        total_bytes=hardware.host.total_ram_bytes,
        free_bytes=hardware.host.available_ram_bytes,
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            evaluating,
            "probe",
            lambda: Hardware(devices=(processor,), host=hardware.host, source="probed"),
        )
        cpu = oomproof.evaluate("tiny", text, **options)
    assert gpu.histogram.counts == pytest.approx(cpu.histogram.counts, abs=200)
    for here, there in zip(gpu.formats, cpu.formats, strict=True):
        assert here.format == there.format
        assert here.kl.value == pytest.approx(there.kl.value, rel=0.1, abs=3e-4)
        assert here.bits_per_byte.value == pytest.approx(there.bits_per_byte.value, rel=0.01)
        for layer, other in zip(here.layers, there.layers, strict=True):
            assert layer.weight_error == pytest.approx(other.weight_error, rel=1e-3)


def test_where_the_states_wait_changes_nothing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"formats": "nf4,int4", "context": 128, "tokens": 1024}
    here = oomproof.evaluate("tiny", text, **options)
    real = run.Job

    def on_host(**fields: Any) -> run.Job:
        return real(**{**fields, "states_on_device": False})

    monkeypatch.setattr(run, "Job", on_host)
    there = oomproof.evaluate("tiny", text, **options)
    assert [one.kl for one in here.formats] == [one.kl for one in there.formats]


def test_no_more_memory_is_taken_than_was_planned(text: Path) -> None:
    device = max(probe().devices, key=lambda one: one.free_bytes).index
    oomproof.evaluate("tiny", text, context=64, tokens=64)  # what a process takes once
    torch.cuda.reset_peak_memory_stats(device)
    report = oomproof.evaluate("tiny", text, context=512, tokens=4096)
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
