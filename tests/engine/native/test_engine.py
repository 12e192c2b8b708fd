"""The native engine on a CPU: transformers' tokens in float32, whatever the company and chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from oomproof.engine.messages import Request, SamplingOptions, TokenEvent
from oomproof.engine.native.engine import NativeEngine
from oomproof.engine.native.load import load_engine
from oomproof.formats import get_format
from oomproof.hardware.probe import probe
from oomproof.models.resolve import bundled_folder, resolve, with_checkpoint
from oomproof.quantization.handlers import handler
from oomproof.session import plan
from tests.compat.checkpoints import WINDOW, random_checkpoint

GREEDY = SamplingOptions(temperature=0)
FAMILIES = (
    "llama",
    "llama, tied",
    "llama, stretched",
    "granite",
    "mistral",
    "qwen2",
    "qwen2, sliding",
    "qwen2, yarn",
    "qwen3",
)
FORMATS = ("fp32", "int8", "int4", "nf4", "nf4-dq", "fp4", "fp4-dq")


def engine_of(folder: Path, **options: Any) -> NativeEngine:
    spec = with_checkpoint(resolve(str(folder)))
    planned = plan(folder, engine="native", **options)
    return load_engine(planned, spec, probe(), folder)


def request(
    name: str, prompt: Sequence[int], new_tokens: int, sampling: SamplingOptions = GREEDY
) -> Request:
    return Request(
        id=name, prompt_tokens=tuple(prompt), max_new_tokens=new_tokens, sampling=sampling
    )


def run(engine: NativeEngine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Each request's answer, all submitted at once."""
    answers: dict[str, list[int]] = {}
    for one in requests:
        answers[one.id] = []
        engine.submit(one)
    while not engine.idle:
        for event in engine.step():
            if isinstance(event, TokenEvent):
                answers[event.request_id].append(event.token)
    return answers


def prompts(count: int, vocab_size: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        torch.randint(4, vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]


def reference_model(folder: Path, format_name: str) -> Any:
    """transformers' float32 model with the weights that the format stands for."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if get_format(format_name).is_quantized:
        handled = handler(format_name)
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    weight = module.weight.data.bfloat16()
                    shape = (weight.shape[0], weight.shape[1])
                    module.weight.data = handled.decode(
                        handled.encode(weight), shape, torch.float32
                    )
    return model.eval()


@torch.inference_mode()
def assert_greedy(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Each token of the answer is the most likely one after what comes before it.

    That is what greedy generation means, and one forward shows it. A tie to within rounding may go
    either way.
    """
    whole = torch.tensor([[*prompt, *answer]])
    logits = model(whole).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    behind = (logits.max(dim=1).values - chosen) / logits.std(dim=1)
    assert float(behind.max()) < 1e-4


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_bundled_models_greedy_tokens_are_those_of_transformers(format_name: str) -> None:
    compute = {} if format_name == "fp32" else {"compute_dtype": "float32", "kv_format": "fp32"}
    engine = engine_of(bundled_folder(), format=format_name, context=512, concurrency=20, **compute)
    asked = prompts(20, 2048, 100)
    answers = run(engine, [request(str(n), prompt, 200) for n, prompt in enumerate(asked)])
    model = reference_model(bundled_folder(), format_name)
    for number, prompt in enumerate(asked):
        assert len(answers[str(number)]) == 200
        assert_greedy(model, prompt, answers[str(number)])
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", family)
    engine = engine_of(folder, format="fp32", context=256, concurrency=3)
    asked = prompts(5, 2048, 3 * WINDOW)
    answers = run(engine, [request(str(n), prompt, 100) for n, prompt in enumerate(asked)])
    model = reference_model(folder, "fp32")
    for number, prompt in enumerate(asked):
        assert_greedy(model, prompt, answers[str(number)])
    engine.close()
