"""transformers as an engine: what is loaded is what was planned, and what it says is the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import oomproof
from oomproof.compat.verify import verify_parameters
from oomproof.engine.messages import Request, SamplingOptions
from oomproof.engine.model import Model
from oomproof.errors import PlanMismatchError, RequestError
from oomproof.models.resolve import bundled_folder, resolve
from oomproof.session import from_pretrained, load, plan

PROMPTS = ("It was a dark night", "The king said unto him,", "Fellow citizens, our country")
LONG_PROMPT = "Who goes there? " * 24
"""Longer than the sliding windows below, and than several prefill chunks."""
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 3,
    "bos_token_id": 0,
    "pad_token_id": 3,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 64}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 64}),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    ),
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[Model]:
    with load("tiny", engine="transformers", format="bf16", concurrency=3) as model:
        yield model


def _random_checkpoint(family: str, folder: Path) -> Path:
    config_class, fields = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**SHAPE, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(bundled_folder() / name, folder / name)
    return folder


def _regret(folder: Path, prompt: tuple[int, ...], answer: list[int]) -> float:
    """How far below the best token a greedy answer ever is, in standard deviations of the logits.

    The judge is transformers' own loader and forward in float32, over prompt and answer at once.
    Tokens themselves may differ where bfloat16 cannot tell two apart.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    return float(((logits.amax(dim=1) - chosen) / logits.std(dim=1)).max())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_transformers_in_float32(prompt: str, tiny: Model) -> None:
    stream = tiny.stream(prompt, raw=True, temperature=0, max_new_tokens=40)
    list(stream)
    assert _regret(bundled_folder(), tiny.tokenizer.encode(prompt), stream.tokens) < 0.05
    assert stream.finish_reason == "stop" or len(stream.tokens) == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_loaded_as_planned_and_answers_as_transformers_does(
    family: str, tmp_path: Path
) -> None:
    folder = _random_checkpoint(family, tmp_path)
    made = plan(folder, engine="transformers", format="bf16")
    with load(replace(made, prefill_chunk_tokens=40)) as model:
        stream = model.stream(LONG_PROMPT, raw=True, temperature=0, max_new_tokens=12)
        list(stream)
        prompt = model.tokenizer.encode(LONG_PROMPT)
    # A router may choose another expert where bfloat16 cannot tell two apart.
    bound = 0.5 if "experts" in str(FAMILIES[family][1]) else 0.05
    assert _regret(folder, prompt, stream.tokens) < bound


@pytest.mark.parametrize("weight_format", ["nf4", "nf4-dq", "fp4", "fp4-dq", "llm-int8"])
def test_each_quantized_format_is_loaded_as_planned_and_answers(weight_format: str) -> None:
    with load("tiny", engine="transformers", format=weight_format) as model:
        assert model.generate("It was a dark night", seed=1, max_new_tokens=8)
        measured = model.measured_terms()[0]
        planned = model.plan.devices[0].terms
        assert measured.weights <= planned.weights <= measured.weights * 1.02
        assert measured.kv_cache <= planned.kv_cache


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_stay_in_16_bits_and_the_plan_knows(family: str, tmp_path: Path) -> None:
    folder = _random_checkpoint(family, tmp_path)
    spec = resolve(str(folder))
    experts = sum(t.numel for t in spec.tensors if len(t.shape) == 3)
    with load(folder, engine="transformers", format="nf4") as model:
        assert model.plan.devices[0].terms.weights > 2 * experts
        assert model.measured_terms()[0].weights > 2 * experts


def test_a_long_prompt_in_chunks_answers_as_in_one_piece(tiny: Model) -> None:
    prompt = "And it came to pass that the king arose. " * 12
    whole = tiny.generate(prompt, raw=True, temperature=0, max_new_tokens=20)
    guarded: Any = tiny._engine
    engine = guarded.inner.engine
    planned = engine._plan
    engine._plan = replace(planned, prefill_chunk_tokens=48)
    try:
        chunked = tiny.generate(prompt, raw=True, temperature=0, max_new_tokens=20)
    finally:
        engine._plan = planned
    assert chunked == whole


def test_three_requests_together_answer_as_each_alone(tiny: Model) -> None:
    options: dict[str, Any] = {"raw": True, "temperature": 0, "max_new_tokens": 16}
    alone = [tiny.generate(prompt, **options) for prompt in PROMPTS]
    assert tiny.generate_all(PROMPTS, **options) == alone
    assert tiny.generate_all(PROMPTS * 2, **options) == alone * 2


def test_a_seed_repeats_an_answer_and_a_cancelled_one_leaves_no_trace(tiny: Model) -> None:
    first = tiny.generate(PROMPTS[0], seed=5, max_new_tokens=24)
    stream = tiny.stream(PROMPTS[1], seed=6)
    next(stream)
    stream.cancel()
    assert "".join(stream) in stream.text
    assert stream.finish_reason == "cancelled"
    assert tiny.generate(PROMPTS[0], seed=5, max_new_tokens=24) == first


def test_a_request_that_can_never_fit_is_refused_in_tokens(tiny: Model) -> None:
    with pytest.raises(RequestError, match=r"planned context of 1,024.*that fits here is 1,024"):
        tiny.stream("a", raw=True, max_new_tokens=1033 - len(tiny.tokenizer.encode("a")))
    strange = Request(id="x", prompt_tokens=(99_999,), max_new_tokens=1, sampling=SamplingOptions())
    with pytest.raises(RequestError, match="outside the vocabulary"):
        tiny._engine.submit(strange)


def test_a_parameter_that_differs_from_the_plan_is_named() -> None:
    made = plan("tiny", engine="transformers", format="nf4-dq")
    spec = resolve("tiny")
    model = from_pretrained(made)
    verify_parameters(model, made, spec)
    name = "model.layers.2.mlp.down_proj"
    shape = spec.hidden_size, spec.intermediate_size
    replaced = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    model.set_submodule(name, replaced)
    with pytest.raises(PlanMismatchError, match=rf"{name}.weight: planned .* uint8 on cpu, found"):
        verify_parameters(model, made, spec)


def test_from_pretrained_returns_an_ordinary_transformers_model() -> None:
    model = oomproof.from_pretrained("tiny", format="nf4")
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.generation_config.eos_token_id == 3
    out = model.generate(torch.tensor([[0, 10, 11]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 7


def test_a_plan_of_another_model_is_not_loaded() -> None:
    made = plan("tiny", engine="transformers", format="bf16")
    with pytest.raises(PlanMismatchError, match="another model"):
        load(replace(made, fingerprint="0" * 16))
