"""Training on a GPU: gradients are those of a CPU in float32, and memory is what was planned."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import oomproof
from oomproof.memory.training_shape import Kept
from oomproof.models.catalog import find
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.tuning.model import LoraSettings, TrainingModel, TrainingOptions, build_training_model
from tests.tuning.books import small_book
from tests.tuning.models import LORA, gradients, ours, tokens_of

pytestmark = pytest.mark.gpu
TINY = bundled_folder()
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"kept": Kept()},
    {"kept": Kept(attention=5, mid=3, qkv=4, gate_up=2)},
    {"scratch_bytes": 1},
    {"offload_checkpoints": True},
    {"attention": "cudnn"},
    {"attention": "flash"},
    {"format": "bf16"},
    {"format": "int4"},
)


def on_gpu(lora: LoraSettings = LORA, *, folder: Any = TINY, **options: Any) -> TrainingModel:
    return build_training_model(
        resolve("tiny"),
        folder,
        lora,
        device=torch.device("cuda"),
        compute_dtype=torch.bfloat16,
        options=TrainingOptions(**{"tokens": 256, **options}),
    )


def similarity(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients as one vector."""
    left, right = (
        torch.cat([one[name].cpu().double().view(-1) for name in expected])
        for one in (found, expected)
    )
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_are_those_of_a_cpu(options: dict[str, Any], packed: bool) -> None:
    exact = ours(TINY, format=options.get("format", "nf4-dq"))
    model = on_gpu(**options)
    with torch.no_grad():
        for mine, other in zip(model.parameters(), exact.parameters(), strict=True):
            mine.copy_(other)
    ids = tokens_of(exact.spec, 2, 60)
    labels = ids.clone()
    labels[0, :25] = -100
    positions = torch.cat((torch.arange(23), torch.arange(37))).repeat(2, 1) if packed else None
    expected = exact(ids, labels, positions).loss
    expected.backward()
    there = None if positions is None else positions.cuda()
    for _ in range(2):
        model.zero_grad()
        loss = model(ids.cuda(), labels.cuda(), there).loss
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0.01)
        assert similarity(gradients(model), gradients(exact)) > 0.995


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("limit", [None, 1, 40])
def test_a_step_takes_what_was_planned_and_little_less(
    rank: int, dropout: float, limit: int | None
) -> None:
    found = find("llama-3.2-1b")
    assert found is not None
    spec, lora = found.spec(), LoraSettings(rank=rank, dropout=dropout)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    options = TrainingOptions(
        tokens=4096, positions=2048, limit_bytes=None if limit is None else (limit + 3) * 10**9
    )
    model = build_training_model(
        spec,
        None,
        lora,
        device=torch.device("cuda"),
        compute_dtype=torch.bfloat16,
        options=options,
    )
    torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(5, 1000, (2, 2048), device="cuda")
    for _ in range(3):
        model(ids, ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before
    planned = model.memory().peak_bytes
    assert 0.95 * planned < peak <= planned


@pytest.mark.parametrize("checkpointing", ["auto", "layers", "offload"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_a_rehearsal_stays_within_its_plan(checkpointing: str, optimizer: str) -> None:
    found = oomproof.rehearse_tuning(
        "llama-3.2-1b",
        context=2048,
        batch_size=4,
        cap="8GiB",
        engine="native",
        checkpointing=checkpointing,
        optimizer=optimizer,
    )
    assert found.failed is None
    assert found.exceeded == ()
    assert found.kept_its_promise
    assert found.allocated_bytes > 0.85 * (found.predicted_bytes - found.plan.terms.cuda_context)


def test_a_run_takes_what_was_planned(tmp_path: Path) -> None:
    report = oomproof.tune(
        "tiny", small_book(tmp_path), tmp_path / "out", context=64, batch_size=4, max_steps=3
    )
    assert report.engine == "native"
    assert report.exceeded_bytes == 0
