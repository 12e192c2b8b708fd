"""A LoRA adapter in the native engine on a GPU: every path of a layer, and memory that stays."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from oomproof.engine.native.engine import NativeEngine
from oomproof.models.resolve import resolve
from oomproof.session import plan
from tests.compat.checkpoints import random_checkpoint
from tests.engine.native.test_engine import prompts, reference_model, request, run
from tests.engine.native.test_lora import engine_with
from tests.models.adapters import ALL, ATTENTION, write_adapter

pytestmark = pytest.mark.gpu
MODULES = {
    "all": ALL,
    "queries and values": ATTENTION,
    "gate": ("gate_proj",),
    "up and keys": ("up_proj", "k_proj"),
    "output": ("o_proj",),
    "down": ("down_proj",),
}
# One path each: a norm in the product, few tokens, a chain of 5 to 64, and what is beyond it.
ROWS = (1, 4, 5, 8, 17, 32, 64, 70)
PROMPT = list(range(100, 140))
SHAPE: dict[str, Any] = {
    # Of whole tiles, so that decode steps take their fused products.
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
FLOAT32: dict[str, Any] = {"compute_dtype": "float32", "kv_format": "fp32"}


def folders(
    tmp_path: Path, modules: Sequence[str] = ALL, family: str = "llama", **options: Any
) -> tuple[Path, Path]:
    model = random_checkpoint(tmp_path / "model", family, std=0.02, **SHAPE)
    return model, write_adapter(tmp_path / "adapter", resolve(str(model)), modules, **options)


@torch.inference_mode()
def step_logits(engine: NativeEngine, rows: int, *, eager: bool = False) -> torch.Tensor:
    """float32 [rows, vocab] of a decode step of equal requests, after their prompt."""
    pipeline = engine._running
    for device in pipeline.devices:
        assert device.pool is not None
        for slot in range(rows):
            pages = {
                window: range(slot * table.shape[1], (slot + 1) * table.shape[1])
                for window, table in device.pool.tables.items()
            }
            device.pool.assign(slot, pages)
    if eager:
        pipeline._steps, pipeline._graphs, pipeline._draw_graphs = {}, {}, {}
    with pipeline.streams():
        for slot in range(rows):
            pipeline.prefill(PROMPT[:-1], 0, slot, draws=False, greedy=True)
        pipeline.decode(
            PROMPT[-1:] * rows, [len(PROMPT) - 1] * rows, list(range(rows)), greedy=True
        )
        pipeline.wait()
    return pipeline._head.logits[:rows].cpu().clone()


@torch.inference_mode()
def reference_logits(model: Path, adapter: Path, format_name: str) -> torch.Tensor:
    adapted = peft.PeftModel.from_pretrained(reference_model(model, format_name), str(adapter))
    found: torch.Tensor = adapted.eval()(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a row."""
    return float(((found - expected).norm(dim=1) / expected.norm()).max())


@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("format_name", ["bf16", "nf4-dq", "int4", "int8"])
def test_steps_of_any_number_of_requests_are_those_of_a_float32_reference(
    modules: str, format_name: str, tmp_path: Path
) -> None:
    model, adapter = folders(tmp_path, MODULES[modules])
    engine = engine_with(adapter, model, format=format_name, context=256, concurrency=max(ROWS))
    expected = reference_logits(model, adapter, format_name)
    for rows in ROWS:
        found = error(step_logits(engine, rows), expected)
        print(f"{format_name} {modules} {rows} {found:.2e}")
        assert found < 2e-2, rows
    engine.close()


@pytest.mark.parametrize("modules", ["all", "queries and values"])
def test_in_float32_they_are_the_references_to_rounding(modules: str, tmp_path: Path) -> None:
    model, adapter = folders(tmp_path, MODULES[modules], rank=12)
    engine = engine_with(adapter, model, format="nf4-dq", context=256, concurrency=70, **FLOAT32)
    expected = reference_logits(model, adapter, "nf4-dq")
    for rows in (1, 8, 70):
        assert error(step_logits(engine, rows), expected) < 1e-4
    engine.close()


@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("format_name", ["bf16", "nf4-dq"])
def test_a_replayed_step_is_the_eager_one_bit_for_bit(
    modules: str, format_name: str, tmp_path: Path
) -> None:
    # The first layer has no adapter: what the others launch is brought in all the same.
    model, adapter = folders(tmp_path, MODULES[modules], config={"layers_to_transform": [1]})
    engine = engine_with(adapter, model, format=format_name, context=256, concurrency=32)
    recorded = {rows: step_logits(engine, rows) for rows in (1, 2, 8, 32)}
    for rows, logits in recorded.items():
        assert torch.equal(step_logits(engine, rows, eager=True), logits)
    engine.close()


@pytest.mark.parametrize("family", ["granite", "qwen2", "qwen3", "llama, tied"])
def test_every_family_adds_it_where_peft_does(family: str, tmp_path: Path) -> None:
    model, adapter = folders(tmp_path, ALL, family)
    engine = engine_with(adapter, model, format="nf4-dq", context=256, concurrency=8)
    expected = reference_logits(model, adapter, "nf4-dq")
    for rows in (1, 8):
        assert error(step_logits(engine, rows), expected) < 2e-2
    engine.close()


def test_requests_that_join_and_leave_answer_as_each_alone(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", resolve("tiny"), ALL)
    asked = prompts(24, 2048, 150)
    options: dict[str, Any] = {"format": "fp32", "context": 256}
    together = engine_with(adapter, concurrency=7, **options)
    answers = run(together, [request(str(n), prompt, 5 + 3 * n) for n, prompt in enumerate(asked)])
    together.close()
    alone = engine_with(adapter, **options)
    for number, prompt in enumerate(asked):
        answer = run(alone, [request("x", prompt, 5 + 3 * number)])["x"]
        assert answer == answers[str(number)]
    alone.close()


@pytest.mark.parametrize("format_name", ["bf16", "nf4-dq"])
def test_memory_does_not_move(format_name: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", resolve("tiny"), ALL, rank=20)
    engine = engine_with(adapter, format=format_name, context=1024, concurrency=7)
    chooser = random.Random(0)
    before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    torch.cuda.reset_peak_memory_stats()
    requests = [
        request(
            str(number),
            [chooser.randrange(4, 2048) for _ in range(chooser.choice((1, 3, 20, 70, 200, 900)))],
            chooser.randrange(1, 12),
        )
        for number in range(200)
    ]
    run(engine, requests)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert torch.cuda.max_memory_allocated() == before[0]
    [planned], measured = engine._plan.devices_in_use, engine.measured_terms()[0]
    assert measured.weights <= planned.terms.weights
    assert measured.peak_bytes <= planned.peak_bytes - planned.terms.margin
    engine.close()


@pytest.mark.parametrize("format_name", ["fp32", "nf4-dq"])
def test_streamed_layers_answer_as_resident_ones(format_name: str, tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", **{**SHAPE, "num_hidden_layers": 8})
    adapter = write_adapter(tmp_path / "adapter", resolve(str(model)), ALL)
    requests = [request(str(n), one, 12) for n, one in enumerate(prompts(3, 2048, 80))]
    compute = {} if format_name == "fp32" else FLOAT32
    options: dict[str, Any] = {"format": format_name, "context": 256, "concurrency": 3, **compute}
    whole = engine_with(adapter, model, **options)
    expected = run(whole, requests)
    [device] = whole._plan.devices_in_use
    limit = device.peak_bytes - device.terms.weights // 3
    whole.close()
    streamed = engine_with(
        adapter, model, offload="cpu", force=True, max_memory={0: limit}, **options
    )
    assert streamed._plan.devices_in_use[0].streamed_layers is not None
    assert run(streamed, requests) == expected
    streamed.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_answer_as_one(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", num_hidden_layers=6)
    adapter = write_adapter(tmp_path / "adapter", resolve(str(model)), ALL)
    requests = [request(str(n), one, 40) for n, one in enumerate(prompts(6, 2048, 150))]
    options: dict[str, Any] = {"format": "fp32", "context": 256, "concurrency": 3}
    whole = engine_with(adapter, model, **options)
    expected = run(whole, requests)
    whole.close()
    [device] = plan(model, engine="native", adapter=adapter, **options).devices_in_use
    limit = device.peak_bytes - device.terms.weights // 4
    split = engine_with(adapter, model, max_memory={0: limit, 1: limit}, **options)
    assert len(split.measured_terms()) == 2
    assert run(split, requests) == expected
    split.close()
