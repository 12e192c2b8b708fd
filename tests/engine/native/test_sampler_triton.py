"""The sampling kernels: in the interpreter and on a GPU what plain torch draws, for any GPU."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys

import pytest
import torch

from oomproof.engine.messages import SamplingOptions
from oomproof.engine.native.sampler import Sampler
from tests.engine.native.sampler_cases import (
    CPU,
    GREEDY,
    compare,
    sampler_of,
    some_admission,
    some_logits,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
MOST_SHARED_BYTES = 99 * 1024
"""Of a block on compute capability 8.6, 8.9 and 12.0."""


@needs_triton
def test_the_interpreted_kernels_draw_what_plain_torch_draws() -> None:
    # In a process of its own: triton reads the variable when it is imported.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.engine.native.sampler_cases"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("capability", [80, 120])
def test_the_kernels_compile_for_old_and_new_gpus_within_their_shared_memory(
    capability: int,
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from oomproof.engine.native import sampler_filters_triton, sampler_triton

    given = sampler_filters_triton.Given(
        "*fp32", "i32", "i32", "i32", "*i32", "*fp32", "*i64", "*i32"
    )
    scratch = sampler_filters_triton.Scratch("*fp32", "*i32", "*i32", "*fp32", "*i32")
    both = {"given": given, "scratch": scratch}
    drawn = {"tokens": "*i64", "logprobs": "*fp32", "top_tokens": "*i32", "top_logprobs": "*fp32"}
    chunks, groups = {"CHUNKS": 128}, {"GROUPS": 16384}
    counted = {"tokens": "*i32", "count": "i32", "counts": "*i32", "vocab": "i32"}
    for kernel, signature, constants in (
        (sampler_triton._measure, both, {}),
        (sampler_filters_triton.find_limit, both, groups | chunks),
        (sampler_triton._draw, both, chunks),
        (sampler_triton._finish, both | drawn, chunks),
        (sampler_triton._flag_prompt, counted, {"BLOCK": 1024}),
        (sampler_triton._count_answer, counted, {"BLOCK": 1024}),
    ):
        source = ASTSource(
            kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
        )
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 8, "enable_fp_fusion": False},
        )
        assert compiled.metadata.shared <= MOST_SHARED_BYTES


def on_gpu(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "vocab_size", [1, 2, 33, 1000, 4096, 4097, 32_000, 50_257, 151_936, 262_144, 300_001]
)
def test_a_gpu_draws_what_plain_torch_draws(vocab_size: int) -> None:
    chooser, rows = random.Random(vocab_size), 0
    for _ in range(12):
        rows += compare(chooser, vocab_size, 3, torch.device("cuda"), Sampler.sample)
    assert rows >= 170


@pytest.mark.gpu
def test_random_bits_on_a_gpu_are_those_of_plain_torch() -> None:
    """Without filters the largest noise wins: one wrong bit would show in some draw."""
    logits = torch.zeros(1, 200_000)
    plain, fast = sampler_of(1, 200_000), sampler_of(1, 200_000, torch.device("cuda"))
    for sampler in (plain, fast):
        sampler.admit(0, SamplingOptions(), 2**63 - 1, [1])
    slots, expected, found = torch.zeros(1, dtype=torch.int32), torch.zeros(1).long(), on_gpu(0)
    found = found.long()
    for _ in range(50):
        plain.sample(logits, slots, expected)
        fast.sample(logits.cuda(), slots.cuda(), found)
        assert int(expected) == int(found)


@pytest.mark.gpu
def test_one_graph_serves_any_mix_and_nothing_is_allocated() -> None:
    vocab_size, slots = 32_000, 6
    device, chooser = torch.device("cuda"), random.Random(8)
    plain, fast = sampler_of(slots, vocab_size), sampler_of(slots, vocab_size, device)
    logits = torch.zeros(4, vocab_size, device=device)
    rows, tokens = on_gpu(-1, -1, -1, -1), torch.zeros(4, dtype=torch.int64, device=device)
    host_logits = torch.zeros(4, vocab_size).pin_memory()
    host_rows = torch.zeros(4, dtype=torch.int32).pin_memory()
    fast.admit(0, SamplingOptions(repetition_penalty=1.1), 0, [1])
    fast.sample(logits, on_gpu(0, -1, -1, -1), tokens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fast.sample(logits, rows, tokens)
    expected = torch.zeros(4, dtype=torch.int64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        chosen = chooser.sample(range(slots), 3)
        order = [chosen[0], -1, *chosen[1:]]
        for slot in chosen:
            one = some_admission(chooser, vocab_size)
            prompt = [*one.prompt, *range(10_000)]
            resumed = chooser.choice((0, 6000))
            for sampler in (plain, fast):
                # The first is overtaken before the GPU has read its options.
                sampler.admit(slot, GREEDY, 1, prompt)
                sampler.admit(slot, one.options, one.seed, prompt, resumed)
        for _ in range(3):
            host_logits.copy_(some_logits(chooser, 4, vocab_size))
            host_rows.copy_(torch.tensor(order, dtype=torch.int32))
            logits.copy_(host_logits, non_blocking=True)
            rows.copy_(host_rows, non_blocking=True)
            graph.replay()
            plain.sample(host_logits, host_rows, expected)
            torch.cuda.synchronize()
            agreed = [int(expected[row]) == int(tokens[row]) for row in (0, 2, 3)]
            assert all(agreed)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_the_cheap_path_takes_the_first_of_the_largest_on_a_gpu_and_in_a_graph() -> None:
    for vocab_size in (1, 7, 4096, 128_256):
        sampler = sampler_of(5, vocab_size, torch.device("cuda"))
        logits = some_logits(random.Random(1), 5, vocab_size).round().cuda()
        logits[1, 0] = torch.nan
        rows, tokens = on_gpu(4, 0, -1, 2, 1), torch.full((5,), -7, device="cuda")
        expected = torch.full((5,), -7)
        sampler.sample_greedy(logits, rows, tokens)
        sampler_of(5, vocab_size).sample_greedy(logits.cpu(), rows.cpu(), expected)
        assert torch.equal(tokens.cpu(), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sampler.sample_greedy(logits, rows, tokens)
        logits.copy_(logits.flip(1))
        graph.replay()
        sampler_of(5, vocab_size).sample_greedy(logits.cpu(), rows.cpu(), expected)
        assert torch.equal(tokens.cpu(), expected)


@pytest.mark.gpu
def test_a_row_on_a_gpu_draws_alike_alone_and_among_others() -> None:
    device, chooser, vocab_size = torch.device("cuda"), random.Random(5), 50_257
    for _ in range(10):
        one = some_admission(chooser, vocab_size)
        logits = some_logits(chooser, 16, vocab_size).to(device)
        alone, among = sampler_of(1, vocab_size, device), sampler_of(16, vocab_size, device)
        for slot in range(16):
            other = some_admission(chooser, vocab_size)
            among.admit(slot, other.options, other.seed, other.prompt)
        alone.admit(0, one.options, one.seed, one.prompt)
        among.admit(11, one.options, one.seed, one.prompt)
        order = chooser.sample(range(16), 16)
        row = order.index(11)
        tokens = torch.zeros(16, dtype=torch.int64, device=device)
        token = torch.zeros(1, dtype=torch.int64, device=device)
        for _ in range(4):
            among.sample(logits, on_gpu(*order), tokens)
            alone.sample(logits[row : row + 1], on_gpu(0), token)
            assert tokens[row] == token


def test_the_cases_compare_more_than_themselves() -> None:
    """The comparison fails where a sampler ignores its seeds."""

    def wrong(
        sampler: Sampler, logits: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        sampler._state[1][:, 0] += 1
        sampler.sample(logits, slots, tokens)

    with pytest.raises(AssertionError):
        compare(random.Random(0), 500, 3, CPU, wrong)
