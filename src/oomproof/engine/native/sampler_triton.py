"""The CUDA kernels behind sampler.py, in Triton; `engine.sampling` says what they compute.

Four launches a step: what every chunk of a row holds; how far the row's filters let a token lie
from the best one; the draw in every chunk; the draw of the row. Sums run in an order that depends
on the vocabulary alone, so a row's token does not depend on the rows beside it.
"""

# Triton's language is not typed, and its constants are spelled in capitals.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from oomproof.engine.native import sampler
from oomproof.engine.native.sampler_filters_triton import (
    BEST,
    CHUNK_GROUPS,
    DRAWN,
    LIMIT,
    LOGIT_MASS,
    MASS,
    TOP_LOGIT,
    TOP_P,
    VALUES,
    Given,
    Scratch,
    distances_of,
    find_limit,
    keys_of,
    load_chunks,
    load_logits,
    load_scores,
    row_of,
    weights_of,
)
from oomproof.engine.sampling import PROMPT_FLAG
from oomproof.memory.sampler import CHUNK_PICKS, CHUNK_TOKENS, GROUP_TOKENS, MAX_ALTERNATIVES

_CHUNK = tl.constexpr(CHUNK_TOKENS)
_GROUP = tl.constexpr(GROUP_TOKENS)
_PICKS = tl.constexpr(CHUNK_PICKS)
_DRAWN_TOKEN, _TOP_TOKEN = tl.constexpr(0), tl.constexpr(1)
_SEED = tl.constexpr(sampler.SEED)
_ALTERNATIVES = tl.constexpr(sampler.ALTERNATIVES)
_DRAWS = tl.constexpr(sampler.DRAWS)
_TOP = tl.constexpr(MAX_ALTERNATIVES)
_FLAG = tl.constexpr(PROMPT_FLAG)

# Products and sums are rounded one by one, as torch rounds them.
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    floats: torch.Tensor,
    integers: torch.Tensor,
    counts: torch.Tensor,
    group_best: torch.Tensor,
    group_list: torch.Tensor,
    candidates: torch.Tensor,
    chunk_values: torch.Tensor,
    chunk_tokens: torch.Tensor,
    logprobs: torch.Tensor,
    top_tokens: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """Four launches; see `engine.native.sampler.sample`."""
    rows, vocab = logits.shape
    chunks = chunk_values.shape[2]
    padded = {"CHUNKS": triton.next_power_of_2(chunks)}
    groups = triton.next_power_of_2(group_best.shape[1])
    given = Given(logits, logits.stride(0), vocab, chunks, slots, floats, integers, counts)
    scratch = Scratch(group_best, group_list, candidates, chunk_values, chunk_tokens)
    drawn = (tokens, logprobs, top_tokens, top_logprobs)
    _measure[(rows, chunks)](given, scratch, num_warps=8, **_EXACT)
    find_limit[(rows,)](given, scratch, GROUPS=groups, num_warps=8, **padded, **_EXACT)
    _draw[(rows, chunks)](given, scratch, num_warps=8, **padded, **_EXACT)
    _finish[(rows,)](given, scratch, *drawn, num_warps=8, **padded, **_EXACT)


def sample_greedy(
    logits: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    chunk_values: torch.Tensor,
    chunk_tokens: torch.Tensor,
) -> None:
    """Two launches; see `engine.native.sampler.sample_greedy`."""
    rows, vocab = logits.shape
    chunks = chunk_values.shape[2]
    given = Given(logits, logits.stride(0), vocab, chunks, slots, None, None, None)
    scratch = Scratch(None, None, None, chunk_values, chunk_tokens)
    _chunk_argmax[(rows, chunks)](given, scratch, num_warps=8)
    padded = triton.next_power_of_2(chunks)
    _row_argmax[(rows,)](given, scratch, tokens, CHUNKS=padded, num_warps=1)


def flag_prompt(tokens: torch.Tensor, count: int, counts: torch.Tensor) -> None:
    """One launch; see `engine.native.sampler.flag_prompt`."""
    block = 1024
    _flag_prompt[(triton.cdiv(count, block),)](tokens, count, counts, counts.numel(), BLOCK=block)


def count_answer(tokens: torch.Tensor, count: int, counts: torch.Tensor) -> None:
    """One launch; see `engine.native.sampler.count_answer`."""
    block = 1024
    _count_answer[(triton.cdiv(count, block),)](tokens, count, counts, counts.numel(), BLOCK=block)


@triton.jit
def _store_chunk(scratch, number, chunks, chunk, VALUE: tl.constexpr, PICK: tl.constexpr, best):
    """Stores a chunk's largest value and its token, `best` being the value and its place."""
    value, place = best
    tl.store(scratch.chunk_values + (number * VALUES + VALUE) * chunks + chunk, value)
    token = chunk * _CHUNK + place
    tl.store(scratch.chunk_tokens + (number * _PICKS + PICK) * chunks + chunk, token)


@triton.jit
def _measure(given, scratch):
    """Best score, best token and mass of a chunk, and the best score of each group in it."""
    number, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(given.slots + number)
    if slot < 0:
        return
    row = row_of(given, number, slot)
    chunks = given.chunks
    masses = scratch.chunk_values + number * VALUES * chunks + chunk
    tokens = chunk * _CHUNK + tl.arange(0, _CHUNK)
    inside = tokens < given.vocab
    scores = load_scores(row, tokens, inside)
    group = (number * chunks + chunk) * CHUNK_GROUPS + tl.arange(0, CHUNK_GROUPS)
    bests = tl.max(tl.reshape(scores, [CHUNK_GROUPS, _GROUP]), axis=1)
    tl.store(scratch.group_best + group, bests)
    best = tl.max(scores, axis=0)
    tl.store(masses + BEST * chunks, best)
    if row.inverse_temperature == 0:
        first = tl.max(scores, axis=0, return_indices=True)
        _store_chunk(scratch, number, chunks, chunk, DRAWN, _DRAWN_TOKEN, first)
    elif tl.load(row.floats + TOP_P) < 1:
        mass = tl.sum(weights_of(scores, best, row.inverse_temperature), axis=0)
        tl.store(masses + MASS * chunks, mass)
    if tl.load(row.integers + _ALTERNATIVES) >= 0:
        logits = load_logits(row.logits, tokens, inside)
        first = tl.max(logits, axis=0, return_indices=True)
        _store_chunk(scratch, number, chunks, chunk, TOP_LOGIT, _TOP_TOKEN, first)
        tl.store(masses + LOGIT_MASS * chunks, tl.sum(weights_of(logits, first[0], 1.0), axis=0))


@triton.jit
def _draw(given, scratch, CHUNKS: tl.constexpr):
    """The largest value of a chunk, noise less distance, and its token."""
    number, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(given.slots + number)
    if slot < 0:
        return
    row = row_of(given, number, slot)
    if row.inverse_temperature == 0:
        return
    chunks = given.chunks
    bests = scratch.chunk_values + (number * VALUES + BEST) * chunks
    best = tl.max(load_chunks(bests, chunks, float("-inf"), CHUNKS), axis=0)
    nearest = distances_of(tl.load(bests + chunk), best, row.inverse_temperature)
    limit = tl.load(row.integers + LIMIT).to(tl.int32)
    if keys_of(nearest) <= limit:
        tokens = chunk * _CHUNK + tl.arange(0, _CHUNK)
        scores = load_scores(row, tokens, tokens < given.vocab)
        distances = distances_of(scores, best, row.inverse_temperature)
        draws = tl.load(row.integers + _DRAWS)
        noise = _gumbel(_random_bits(tl.load(row.integers + _SEED), draws, tokens))
        values = tl.where(keys_of(distances) <= limit, noise - distances, float("-inf"))
        first = tl.max(values, axis=0, return_indices=True)
        _store_chunk(scratch, number, chunks, chunk, DRAWN, _DRAWN_TOKEN, first)
    else:
        _store_chunk(scratch, number, chunks, chunk, DRAWN, _DRAWN_TOKEN, (float("-inf"), 0))


@triton.jit
def _random_bits(seed, draws, tokens):
    """uint32 [n]; see `engine.sampling.random_bits`."""
    words = tl.philox(seed, tokens, draws.to(tl.int32), 0, 0)
    return words[0]


@triton.jit
def _gumbel(bits):
    """float32 [n]; see `engine.sampling.gumbel`."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-8)
    series = u * (1 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1 - u)))


@triton.jit
def _finish(given, scratch, tokens, logprobs, top_tokens, top_logprobs, CHUNKS: tl.constexpr):
    """The row's token, its log-probabilities, and what the next draw needs to know of it."""
    number = tl.program_id(0).to(tl.int64)
    slot = tl.load(given.slots + number)
    if slot < 0:
        return
    row = row_of(given, number, slot)
    token = _winner(scratch, number, given.chunks, CHUNKS)
    tl.store(tokens + number, token.to(tl.int64))
    tl.store(row.integers + _DRAWS, tl.load(row.integers + _DRAWS) + 1)
    if row.penalises:
        tl.store(row.counts + token, tl.load(row.counts + token) + 1)
    alternatives = tl.load(row.integers + _ALTERNATIVES).to(tl.int32)
    if alternatives >= 0:
        values = scratch.chunk_values + number * VALUES * given.chunks
        logits = load_chunks(values + TOP_LOGIT * given.chunks, given.chunks, float("-inf"), CHUNKS)
        mass = load_chunks(values + LOGIT_MASS * given.chunks, given.chunks, 0.0, CHUNKS)
        largest = tl.max(logits, axis=0)
        total = largest + tl.log(tl.sum(mass * weights_of(logits, largest, 1.0), axis=0))
        tl.store(logprobs + number, load_logits(row.logits, token, True) - total)
        top_tokens += number * _TOP
        top_logprobs += number * _TOP
        _list_likely(row, scratch, number, given.chunks, logits, total, top_tokens, top_logprobs,
                     alternatives, CHUNKS)  # fmt: skip


@triton.jit
def _list_likely(
    row, scratch, number, chunks, logits, total, top_tokens, top_logprobs, alternatives,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Writes the tokens of the largest logits; `logits` [CHUNKS] has the largest of each chunk."""
    chunk = tl.arange(0, CHUNKS)
    firsts = scratch.chunk_tokens + (number * _PICKS + _TOP_TOKEN) * chunks
    firsts = tl.load(firsts + chunk, mask=chunk < chunks, other=0)
    for rank in range(alternatives):
        value, place = tl.max(logits, axis=0, return_indices=True)
        token = tl.sum(tl.where(chunk == place, firsts, 0), axis=0)
        possible = value > float("-inf")
        tl.store(top_tokens + rank, tl.where(possible, token, -1))
        tl.store(top_logprobs + rank, tl.where(possible, value - total, float("-inf")))
        # The next one of this chunk is smaller, or as large and behind.
        members = place * _CHUNK + tl.arange(0, _CHUNK)
        others = load_logits(row.logits, members, members < row.vocab)
        left = (others < value) | ((others == value) & (members > token))
        following, behind = tl.max(
            tl.where(left, others, float("-inf")), axis=0, return_indices=True
        )
        logits = tl.where(chunk == place, following, logits)
        firsts = tl.where(chunk == place, place * _CHUNK + behind, firsts)


@triton.jit
def _winner(scratch, number, chunks, CHUNKS: tl.constexpr):
    """The token of the chunk with the largest value, the first of equals."""
    values = scratch.chunk_values + (number * VALUES + DRAWN) * chunks
    place = tl.argmax(load_chunks(values, chunks, float("-inf"), CHUNKS), axis=0)
    return tl.load(scratch.chunk_tokens + (number * _PICKS + _DRAWN_TOKEN) * chunks + place)


@triton.jit
def _chunk_argmax(given, scratch):
    number, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(given.slots + number) < 0:
        return
    tokens = chunk * _CHUNK + tl.arange(0, _CHUNK)
    logits = load_logits(given.logits + number * given.stride, tokens, tokens < given.vocab)
    first = tl.max(logits, axis=0, return_indices=True)
    _store_chunk(scratch, number, given.chunks, chunk, DRAWN, _DRAWN_TOKEN, first)


@triton.jit
def _row_argmax(given, scratch, tokens, CHUNKS: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    if tl.load(given.slots + number) < 0:
        return
    token = _winner(scratch, number, given.chunks, CHUNKS)
    tl.store(tokens + number, token.to(tl.int64))


@triton.jit
def _flag_prompt(tokens, count, counts, vocab, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + entry, mask=entry < count, other=-1)
    tl.store(counts + token, _FLAG, mask=(token >= 0) & (token < vocab))


@triton.jit
def _count_answer(tokens, count, counts, vocab, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + entry, mask=entry < count, other=-1)
    tl.atomic_add(counts + token, 1, mask=(token >= 0) & (token < vocab), sem="relaxed")
