"""The native engine on a GPU: logits, company, and memory that does not move (make test-gpu)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from oomproof.engine.messages import Request, SamplingOptions, TokenEvent
from oomproof.engine.native.engine import NativeEngine
from oomproof.models.resolve import bundled_folder
from oomproof.session import plan
from tests.compat.checkpoints import random_checkpoint
from tests.engine.native.test_engine import (
    FAMILIES,
    assert_greedy,
    engine_of,
    prompts,
    reference_model,
    request,
    run,
)
from tests.quantization.weights import encode_in_slices

pytestmark = pytest.mark.gpu
FORMATS = ("bf16", "fp16", "int8", "fp8", "int4", "nf4", "nf4-dq", "nf4-g16", "fp4", "fp4-dq")


@torch.inference_mode()
def logits_of(engine: NativeEngine, tokens: list[int]) -> torch.Tensor:
    """float32 [tokens, vocab], each token's from a decode step of its own after a prompt of one."""
    pipeline = engine._running
    found = []
    for device in pipeline.devices:
        assert device.pool is not None
        device.pool.assign(0, {w: range(t.shape[1]) for w, t in device.pool.tables.items()})
    with pipeline.streams():
        half = len(tokens) // 2
        pipeline.prefill(tokens[:half], 0, 0, draws=True, greedy=True)
        pipeline.wait()
        found.append(pipeline._head.logits[0].cpu().clone())
        for position in range(half, len(tokens)):
            pipeline.decode([tokens[position]], [position], [0], greedy=True)
            pipeline.wait()
            found.append(pipeline._head.logits[0].cpu().clone())
    return torch.stack(found)


@torch.inference_mode()
def error_of(engine: NativeEngine, folder: Path, format_name: str) -> float:
    """Relative error of logits against transformers' float32 model of the same weights."""
    tokens = prompts(1, 2048, 1)[0] + torch.arange(4, 104).tolist()
    found = logits_of(engine, tokens)
    # On a GPU fp4's codes are those of bitsandbytes' kernels, which divide approximately.
    encode = _encoded_on_a_gpu if format_name.startswith("fp4") else None
    logits = reference_model(folder, format_name, encode)(torch.tensor([tokens])).logits[0]
    expected = logits[len(tokens) // 2 - 1 :]
    return float((found - expected).norm() / expected.norm())


def _encoded_on_a_gpu(format_name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = encode_in_slices(format_name, weight.cuda(), len(weight))
    return {name: part.cpu() for name, part in parts.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_logits_are_those_of_a_float32_reference(
    family: str, format_name: str, tmp_path: Path
) -> None:
    folder = random_checkpoint(tmp_path / "model", family, std=0.02)
    engine = engine_of(folder, format=format_name, context=256)
    error = error_of(engine, folder, format_name)
    print(f"{format_name} {family} {error:.2e}")
    # W8A8 rounds activations to the 3 bits of e4m3's fraction, which is in no weight.
    assert error < (5e-2 if format_name == "fp8" else 1e-2)
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "format_name", ["fp32", "int8", "int4", "nf4", "nf4-dq", "nf4-g16", "fp4", "fp4-dq"]
)
def test_in_float32_logits_are_the_references_to_rounding(
    family: str, format_name: str, tmp_path: Path
) -> None:
    folder = random_checkpoint(tmp_path / "model", family)
    options = {} if format_name == "fp32" else {"compute_dtype": "float32", "kv_format": "fp32"}
    engine = engine_of(folder, format=format_name, context=256, **options)
    assert error_of(engine, folder, format_name) < 1e-4
    engine.close()


@pytest.mark.parametrize("family", ["llama", "qwen2, sliding"])
@pytest.mark.parametrize("format_name", ["bf16", "nf4-dq", "int8"])
@torch.inference_mode()
def test_recorded_pieces_of_a_prompt_are_what_was_recorded(
    family: str, format_name: str, tmp_path: Path
) -> None:
    folder = random_checkpoint(tmp_path / "model", family, std=0.02)
    engine = engine_of(folder, format=format_name, context=256)
    pipeline = engine._running
    recorded = pipeline._prompts
    assert list(recorded) == [64, 256]
    prompt = torch.randint(4, 2048, (255,), generator=torch.Generator().manual_seed(1)).tolist()
    for tokens in (3, 64, 100, 255):
        found = []
        for graphs in (recorded, {}):
            pipeline._prompts = graphs
            run(engine, [request("x", prompt[:tokens], 1)])
            found.append(pipeline._head.logits[0].double().cpu())
        # Products of more rows are cut otherwise, and a prompt of other pieces rounds otherwise.
        assert (found[0] - found[1]).norm() / found[1].norm() < 1e-2
    engine.close()


def test_thirty_two_together_answer_as_each_alone() -> None:
    asked = prompts(32, 2048, 150)
    together = engine_of(bundled_folder(), format="fp32", context=256, concurrency=32)
    answers = run(together, [request(str(n), prompt, 100) for n, prompt in enumerate(asked)])
    together.close()
    alone = engine_of(bundled_folder(), format="fp32", context=256)
    model = reference_model(bundled_folder(), "fp32")
    for number, prompt in enumerate(asked):
        assert run(alone, [request("x", prompt, 100)])["x"] == answers[str(number)]
        assert_greedy(model, prompt, answers[str(number)])
    alone.close()


@pytest.mark.parametrize("format_name", ["bf16", "nf4-dq", "fp8"])
@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_memory_does_not_move_over_a_thousand_requests(format_name: str, kv_format: str) -> None:
    engine = engine_of(
        bundled_folder(), format=format_name, kv_format=kv_format, context=1024, concurrency=7
    )
    chooser = random.Random(0)
    before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    torch.cuda.reset_peak_memory_stats()
    answered = 0
    for number in range(1000):
        prompt = [chooser.randrange(4, 2048) for _ in range(chooser.choice((1, 3, 20, 200, 900)))]
        options = SamplingOptions(
            temperature=chooser.choice((0.0, 0.7, 1.3)),
            top_k=chooser.choice((0, 1, 40)),
            top_p=chooser.choice((1.0, 0.9)),
            min_p=chooser.choice((0.0, 0.05)),
            repetition_penalty=chooser.choice((1.0, 1.2)),
            logprobs=chooser.choice((None, 0, 5)),
            seed=number,
        )
        engine.submit(
            Request(
                id=str(number),
                prompt_tokens=tuple(prompt),
                max_new_tokens=chooser.randrange(1, 12),
                sampling=options,
            )
        )
    while not engine.idle:
        answered += sum(isinstance(event, TokenEvent) for event in engine.step())
    assert answered >= 1000
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert torch.cuda.max_memory_allocated() == before[0]
    assert torch.cuda.max_memory_reserved() == before[1]
    engine.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["llama", "llama, tied", "qwen2, sliding"])
def test_two_gpus_answer_as_one(family: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", family, num_hidden_layers=6)
    asked = prompts(6, 2048, 150)
    requests = [request(str(number), prompt, 60) for number, prompt in enumerate(asked)]
    whole = engine_of(folder, format="fp32", context=256, concurrency=3)
    expected = run(whole, requests)
    whole.close()
    # A little less than everything on either GPU.
    [device] = plan(
        folder, engine="native", format="fp32", context=256, concurrency=3
    ).devices_in_use
    limit = device.peak_bytes - device.terms.weights // 4
    split = engine_of(
        folder,
        format="fp32",
        context=256,
        concurrency=3,
        max_memory={0: limit, 1: limit},
    )
    assert len(split.measured_terms()) == 2
    assert run(split, requests) == expected
    split.close()
