"""Scoring given tokens: transformers' log-probabilities, whatever chunks and concurrency."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import oomproof
from oomproof.engine.native.engine import NativeEngine
from oomproof.engine.native.load import load_engine
from oomproof.errors import NotRunnableError, RequestError
from oomproof.hardware.probe import probe
from oomproof.models.resolve import bundled_folder, resolve, with_checkpoint
from oomproof.session import plan
from tests.compat.checkpoints import random_checkpoint


def engine_of(folder: Path, concurrency: int, context: int = 128) -> NativeEngine:
    spec = with_checkpoint(resolve(str(folder)))
    planned = plan(folder, engine="native", format="fp32", context=context, concurrency=concurrency)
    return load_engine(planned, spec, probe(), folder)


def expected(folder: Path, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0], dim=1)
    wanted = torch.tensor(tokens[1:])
    return logprobs.gather(1, wanted.unsqueeze(1)).squeeze(1), logprobs.argmax(dim=1) == wanted


def some_tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 2048, (count,), generator=generator).tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2, sliding", "granite"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_scores_are_transformers(tmp_path: Path, family: str, concurrency: int) -> None:
    folder = random_checkpoint(tmp_path, family)
    engine = engine_of(folder, concurrency)
    tokens = some_tokens(100)
    logprobs, most = expected(folder, tokens)
    for first in (1, 50, 99):
        found = engine.score(tokens, first)
        assert [one.logprob for one in found] == pytest.approx(
            logprobs[first - 1 :].tolist(), abs=2e-3
        )
        assert [one.is_most_likely for one in found] == most[first - 1 :].tolist()
    engine.close()


def test_a_text_longer_than_a_chunk_is_scored_as_one(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path)
    engine = engine_of(folder, 2)
    tokens = some_tokens(90)
    whole = engine.score(tokens, 20)
    engine._chunk = 32
    cut = engine.score(tokens, 20)
    assert [one.logprob for one in cut] == pytest.approx([one.logprob for one in whole], abs=1e-3)


def test_the_last_token_takes_no_room_and_one_more_is_refused(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path)
    engine = engine_of(folder, 1)
    assert len(engine.score(some_tokens(129), 128)) == 1
    with pytest.raises(RequestError, match=r"129 tokens to score do not fit in .* 128"):
        engine.score(some_tokens(130), 1)
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.score([5, 2048], 1)


def test_answers_are_the_same_after_scoring_and_tokens_are_scored_between_them() -> None:
    with oomproof.load("tiny", format="fp32", engine="native", context=128) as model:
        before = model.generate("It was a dark night", raw=True, temperature=0, max_new_tokens=8)
        prompt = model.tokenizer.encode("It was a dark night")
        answer = model.stream(prompt, temperature=0, max_new_tokens=8, logprobs=1)
        text = "".join(answer)
        assert text == before
        found = model.score([*prompt, *answer.tokens], len(prompt))
        assert all(one.is_most_likely for one in found)
        assert [one.logprob for one in found] == pytest.approx(
            [one.logprob for one in answer.logprobs], abs=1e-3
        )
        assert "".join(model.stream(prompt, temperature=0, max_new_tokens=8)) == before


def test_what_cannot_be_scored_is_refused() -> None:
    with oomproof.load("tiny", format="fp32", engine="native", context=128) as model:
        for tokens, first in (([5, 6], 0), ([5, 6], 2), ([5], 1)):
            with pytest.raises(RequestError, match="cannot be scored"):
                model.score(tokens, first)
        stream = model.stream("It was", raw=True, max_new_tokens=4)
        with pytest.raises(RequestError, match="1 answers are on their way"):
            model.score([5, 6], 1)
        assert list(stream)
    with (
        oomproof.load(bundled_folder(), format="bf16", engine="transformers") as model,
        pytest.raises(NotRunnableError, match="does not tell how likely"),
    ):
        model.score([5, 6], 1)
