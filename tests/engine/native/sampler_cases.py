"""Samplers to compare with each other, and what they are compared on.

Run as a module, it compares the kernels with plain torch on a CPU, in Triton's interpreter
(TRITON_INTERPRET=1, a process of its own: triton reads it when it is imported).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from oomproof.engine.messages import SamplingOptions
from oomproof.engine.native.sampler import Sampler
from oomproof.engine.sampling import Settings, draw

CPU = torch.device("cpu")
GREEDY = SamplingOptions(temperature=0)


def sampler_of(slots: int, vocab_size: int, device: torch.device = CPU) -> Sampler:
    """A sampler in memory that held something else before."""

    def take(_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, 77, dtype=dtype, device=device)

    return Sampler(slots, vocab_size, device, take)


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """A request for a slot."""

    options: SamplingOptions
    seed: int
    prompt: tuple[int, ...]


def some_admission(chooser: random.Random, vocab_size: int) -> Admission:
    """Any mix of options, each off as often as not."""
    options = SamplingOptions(
        temperature=chooser.choice((0, 0.3, 1, 1, 2, 100, 1e-40)),
        top_k=chooser.choice((0, 0, 1, 5, 50, 10**6)),
        top_p=chooser.choice((1, 1, 0.95, 0.5, 0.01)),
        min_p=chooser.choice((0, 0, 0.1, 1)),
        repetition_penalty=chooser.choice((1, 1, 1.3, 0.5)),
        presence_penalty=chooser.choice((0, 0, 0.5)),
        frequency_penalty=chooser.choice((0, 0, -0.5, 2)),
        logprobs=chooser.choice((None, 0, 3, 20)),
    )
    prompt = tuple(chooser.randrange(vocab_size) for _ in range(chooser.choice((1, 30))))
    return Admission(options=options, seed=chooser.getrandbits(63), prompt=prompt)


def some_logits(chooser: random.Random, rows: int, vocab_size: int) -> torch.Tensor:
    """Flat or steep, with ties now and then, and with tokens that are impossible."""
    generator = torch.Generator().manual_seed(chooser.getrandbits(32))
    logits = torch.randn(rows, vocab_size, generator=generator) * chooser.choice((0.1, 2, 5))
    if chooser.random() < 0.3:
        logits = logits.round()
    if chooser.random() < 0.3:
        logits[:, torch.randperm(vocab_size, generator=generator)[vocab_size // 3 :]] = -torch.inf
    return logits


def borderline(
    admission: Admission, logits: torch.Tensor, counts: torch.Tensor, number: int
) -> set[int]:
    """Tokens that may be drawn where float32 sums decide what top-p keeps."""
    settings = Settings.of(admission.options, admission.seed)
    seen = counts if settings.has_penalties else None
    return {
        draw(logits, seen, replace(settings, top_p=p), number).token
        for p in (settings.top_p * (1 - 1e-5), settings.top_p * (1 + 1e-5))
    }


Draw = Callable[[Sampler, torch.Tensor, torch.Tensor, torch.Tensor], None]


def compare(
    chooser: random.Random, vocab_size: int, steps: int, device: torch.device, kernels: Draw
) -> int:
    """Checks the kernels against plain torch, a few steps of six rows; how many rows."""
    slots = [3, -1, 0, 4, 1, 5]
    plain, fast = sampler_of(6, vocab_size), sampler_of(6, vocab_size, device)
    admissions = [some_admission(chooser, vocab_size) for _ in range(6)]
    for slot, one in enumerate(admissions):
        plain.admit(slot, one.options, one.seed, one.prompt)
        fast.admit(slot, one.options, one.seed, one.prompt)
    expected, found = torch.full((6,), -5), torch.full((6,), -5, device=device)
    on_device = torch.tensor(slots, dtype=torch.int32)
    for step in range(steps):
        logits = some_logits(chooser, 6, vocab_size)
        before = plain._counts.clone()
        plain.sample(logits, on_device, expected)
        kernels(fast, logits.to(device), on_device.to(device), found)
        for row, slot in enumerate(slots):
            drawn = int(found[row])
            if drawn != expected[row]:
                one = admissions[slot]
                possible = borderline(one, logits[row], before[slot], step)
                assert drawn in possible, (vocab_size, step, row, one)
                return 5 * step
        _assert_same_state(plain, fast, [one.options for one in admissions], slots)
    return 5 * steps


def _assert_same_state(
    plain: Sampler, fast: Sampler, options: Sequence[SamplingOptions], slots: Sequence[int]
) -> None:
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        if options[slot].has_penalties:
            assert torch.equal(plain._counts[slot], fast._counts[slot].cpu())
        wanted = options[slot].logprobs
        if wanted is None:
            continue
        torch.testing.assert_close(
            fast.logprobs[row].cpu(), plain.logprobs[row], atol=2e-5, rtol=1e-5, equal_nan=True
        )
        assert torch.equal(plain.top_tokens[row, :wanted], fast.top_tokens[row, :wanted].cpu())
        torch.testing.assert_close(
            fast.top_logprobs[row, :wanted].cpu(),
            plain.top_logprobs[row, :wanted],
            atol=2e-5,
            rtol=1e-5,
        )


def interpreted(
    sampler: Sampler, logits: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor
) -> None:
    """The kernels on CPU tensors."""
    from oomproof.engine.native import sampler_triton

    sampler_triton.sample(logits, slots, tokens, *sampler._state)


def _compare_in_the_interpreter() -> None:
    from oomproof.engine.native import sampler_triton

    chooser = random.Random(0)
    for vocab_size in (1, 2, 33, 1000, 1000, 1000, 1000, 4097, 9000):
        compare(chooser, vocab_size, 2, CPU, interpreted)
    for vocab_size in (1, 1000, 4100):
        logits = some_logits(chooser, 3, vocab_size)
        logits[1, 0] = torch.nan
        sampler, slots = sampler_of(3, vocab_size), torch.tensor([2, 0, -1], dtype=torch.int32)
        tokens, expected = torch.full((3,), -5), torch.full((3,), -5)
        sampler.sample_greedy(logits, slots, expected)
        sampler_triton.sample_greedy(logits, slots, tokens, *sampler._chunks)
        assert torch.equal(tokens, expected)
    flagged, expected = torch.zeros(2, 1000, dtype=torch.int32)
    prompt = torch.tensor([5, 999, 5, 7, 123], dtype=torch.int32)
    sampler_triton.flag_prompt(prompt, 4, flagged)
    torch.ops.oomproof.flag_prompt(prompt, 4, expected)
    assert torch.equal(flagged, expected)
    sampler_triton.count_answer(prompt, 4, flagged)
    torch.ops.oomproof.count_answer(prompt, 4, expected)
    assert torch.equal(flagged, expected)
    assert int(flagged[5]) & 0xFF == 2


if __name__ == "__main__":
    _compare_in_the_interpreter()
