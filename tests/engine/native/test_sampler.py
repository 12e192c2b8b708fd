"""Drawing for many requests at once: each as if it were alone, in the memory that was planned."""

from __future__ import annotations

import random

import pytest
import torch

from oomproof.engine.messages import SamplingOptions
from oomproof.engine.native.sampler import Sampler
from oomproof.engine.sampling import RequestSampler
from oomproof.formats import DType
from oomproof.memory.sampler import STAGED_TOKENS, sampler_buffers
from tests.engine.native.sampler_cases import (
    CPU,
    GREEDY,
    sampler_of,
    some_admission,
    some_logits,
)

MIXED = SamplingOptions(
    temperature=0.9,
    top_k=200,
    top_p=0.95,
    min_p=0.001,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logprobs=5,
)


def slots_of(*slots: int) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int32)


@pytest.mark.parametrize(("slots", "vocab_size"), [(1, 1), (3, 1000), (64, 128_256)])
def test_the_buffers_taken_are_those_that_are_planned(slots: int, vocab_size: int) -> None:
    taken: list[tuple[str, tuple[int, ...], DType]] = []

    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        taken.append((name, shape, DType(str(dtype).removeprefix("torch."))))
        return torch.empty(shape, dtype=dtype, device="meta")

    Sampler(slots, vocab_size, CPU, take)
    assert tuple(taken) == sampler_buffers(slots, vocab_size)


def test_each_row_draws_what_its_request_would_draw_alone_from_any_slot() -> None:
    chooser = random.Random(3)
    vocab_size, steps = 700, 4
    admissions = [some_admission(chooser, vocab_size) for _ in range(12)]
    logits = [some_logits(chooser, 12, vocab_size) for _ in range(steps)]
    together = sampler_of(12, vocab_size)
    order = chooser.sample(range(12), 12)
    for slot, number in enumerate(order):
        one = admissions[number]
        together.admit(slot, one.options, one.seed, one.prompt)
    alone = [
        RequestSampler(replace_seed(one.options, one.seed), CPU, one.prompt) for one in admissions
    ]
    tokens = torch.zeros(12, dtype=torch.int64)
    for rows in logits:
        together.sample(rows[order], slots_of(*range(12)), tokens)
        for slot, number in enumerate(order):
            drawn = alone[number].draw(rows[number])
            assert drawn.token == tokens[slot]
            if drawn.logprob is not None:
                torch.testing.assert_close(
                    together.logprobs[slot], torch.tensor(drawn.logprob), equal_nan=True
                )
                wanted = admissions[number].options.logprobs
                pairs = zip(
                    together.top_tokens[slot, :wanted].tolist(),
                    together.top_logprobs[slot, :wanted].tolist(),
                    strict=True,
                )
                assert tuple(pair for pair in pairs if pair[0] >= 0) == drawn.top_logprobs


def replace_seed(options: SamplingOptions, seed: int) -> SamplingOptions:
    fields = {name: getattr(options, name) for name in options.__dataclass_fields__}
    return SamplingOptions(**{**fields, "seed": seed})


def test_a_row_left_out_is_left_as_it_is_and_its_request_goes_on_later() -> None:
    sampler, other = sampler_of(2, 500), sampler_of(1, 500)
    for slot in range(2):
        sampler.admit(slot, MIXED, slot, [1, 2])
    other.admit(0, MIXED, 1, [1, 2])
    logits = some_logits(random.Random(1), 2, 500)
    tokens, expected = torch.full((2,), -7), torch.zeros(1, dtype=torch.int64)
    sampler.sample(logits, slots_of(0, -1), tokens)
    assert tokens[1] == -7
    for _ in range(3):
        sampler.sample(logits, slots_of(-1, 1), tokens)
        other.sample(logits[1:], slots_of(0), expected)
        assert tokens[1] == expected


@pytest.mark.parametrize("repetition", [1.0, 1.3])
def test_a_resumed_request_draws_on_as_if_it_had_never_stopped(repetition: float) -> None:
    fields = {name: getattr(MIXED, name) for name in MIXED.__dataclass_fields__}
    options = SamplingOptions(**{**fields, "repetition_penalty": repetition, "seed": 5})
    prompt, chooser = list(range(50)), random.Random(2)
    logits = [some_logits(chooser, 1, 60) for _ in range(STAGED_TOKENS // 100 + 8)]
    whole, tokens = sampler_of(1, 60), torch.zeros(1, dtype=torch.int64)
    whole.admit(0, options, 5, prompt)
    answer = []
    for row in logits:
        whole.sample(row, slots_of(0), tokens)
        answer.append(int(tokens))
    for cut in (1, len(logits) // 2, len(logits) - 1):
        given = [*prompt, *answer[:cut]]
        resumed = sampler_of(1, 60)
        resumed.admit(0, options, 5, given, cut)
        alone = RequestSampler(options, CPU, given, cut)
        for row, expected in zip(logits[cut:], answer[cut:], strict=True):
            resumed.sample(row, slots_of(0), tokens)
            assert int(tokens) == alone.sample(row[0]) == expected


def test_a_slot_forgets_its_last_request() -> None:
    sampler, fresh = sampler_of(1, 300), sampler_of(1, 300)
    logits = some_logits(random.Random(2), 1, 300)
    tokens, expected = torch.zeros(2, 1, dtype=torch.int64)
    sampler.admit(0, MIXED, 5, list(range(100)))
    for _ in range(3):
        sampler.sample(logits, slots_of(0), tokens)
    for one in (sampler, fresh):
        one.admit(0, MIXED, 9, [7])
    for _ in range(3):
        sampler.sample(logits, slots_of(0), tokens)
        fresh.sample(logits, slots_of(0), expected)
        assert torch.equal(tokens, expected)


def test_a_prompt_longer_than_is_staged_at_once_is_flagged_whole() -> None:
    prompt = [*range(0, 3 * STAGED_TOKENS, 2), 1]
    sampler = sampler_of(1, 3 * STAGED_TOKENS)
    sampler.admit(0, SamplingOptions(temperature=0, repetition_penalty=2.0), 0, prompt)
    logits = torch.ones(1, 3 * STAGED_TOKENS)
    tokens = torch.zeros(1, dtype=torch.int64)
    sampler.sample(logits, slots_of(0), tokens)
    assert tokens == 3
    assert (sampler._counts[0] != 0).sum() == len(prompt) + 1


def test_the_cheap_path_takes_the_first_of_the_largest_and_touches_no_state() -> None:
    sampler = sampler_of(3, 6)
    logits = torch.tensor([[0.0, 5, 5, 1, 2, 3], [torch.nan, -1, -2, -1, -9, -9], [9.0] * 6])
    before, tokens = [part.clone() for part in sampler._state], torch.full((3,), -7)
    sampler.sample_greedy(logits, slots_of(2, 0, -1), tokens)
    assert tokens.tolist() == [1, 1, -7]
    for part, earlier in zip(sampler._state, before, strict=True):
        assert torch.equal(part, earlier)


def test_both_paths_agree_on_a_plain_argmax() -> None:
    assert GREEDY.is_plain_argmax
    sampler, logits = sampler_of(4, 900), some_logits(random.Random(4), 4, 900).round()
    tokens, expected = torch.zeros(2, 4, dtype=torch.int64)
    for slot in range(4):
        sampler.admit(slot, GREEDY, None, [1])
    sampler.sample(logits, slots_of(0, 1, 2, 3), tokens)
    sampler.sample_greedy(logits, slots_of(0, 1, 2, 3), expected)
    assert torch.equal(tokens, expected)


def test_without_a_seed_a_slot_draws_afresh() -> None:
    sampler, tokens = sampler_of(1, 100_000), torch.zeros(1, dtype=torch.int64)
    found = set()
    for _ in range(5):
        sampler.admit(0, SamplingOptions(), None, [1])
        sampler.sample(torch.zeros(1, 100_000), slots_of(0), tokens)
        found.add(int(tokens))
    assert len(found) == 5
