"""How far from the best token the filters of a row let a token lie: a search, not a sort.

Distances are not negative, so their bits, as integers, are ordered as they are: a key. A filter is
the smallest key within which there are enough tokens, or enough of their mass. The search looks
only at groups of tokens whose best one may be kept, which are few unless the distribution is flat,
and ends as soon as no more than one token lies between its bounds.
"""

# Triton's language is not typed, and its constants are spelled in capitals.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from oomproof.engine.native import sampler
from oomproof.engine.sampling import PROMPT_FLAG
from oomproof.memory.sampler import (
    CHUNK_TOKENS,
    CHUNK_VALUES,
    FLOAT_OPTIONS,
    GROUP_TOKENS,
    INTEGER_OPTIONS,
)

CHUNK_GROUPS = tl.constexpr(CHUNK_TOKENS // GROUP_TOKENS)
VALUES = tl.constexpr(CHUNK_VALUES)
BEST, MASS, DRAWN, LARGEST_LOGIT, LOGIT_MASS = (tl.constexpr(i) for i in range(CHUNK_VALUES))
FLOATS = tl.constexpr(FLOAT_OPTIONS)
INVERSE_TEMPERATURE = tl.constexpr(sampler.INVERSE_TEMPERATURE)
TOP_P = tl.constexpr(sampler.TOP_P)
REACH = tl.constexpr(sampler.REACH)
REPETITION = tl.constexpr(sampler.REPETITION)
INVERSE_REPETITION = tl.constexpr(sampler.INVERSE_REPETITION)
PRESENCE = tl.constexpr(sampler.PRESENCE)
FREQUENCY = tl.constexpr(sampler.FREQUENCY)
INTEGERS = tl.constexpr(INTEGER_OPTIONS)
TOP_K = tl.constexpr(sampler.TOP_K)
HAS_PENALTIES = tl.constexpr(sampler.HAS_PENALTIES)
LIMIT = tl.constexpr(sampler.LIMIT)

_GROUP = tl.constexpr(GROUP_TOKENS)
_FLAG = tl.constexpr(PROMPT_FLAG)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_FARTHEST = tl.constexpr(0x7F800000)
"""The bits of infinity: the key of a token that cannot be drawn."""
_TILE_GROUPS = tl.constexpr(64)
_TILE = tl.constexpr(64 * GROUP_TOKENS)
_THRESHOLDS = tl.constexpr(8)
import os

STAGES = tl.constexpr(int(os.environ.get("STAGES", "1")))


class Given(NamedTuple):
    """What a step brings, and the state of every slot; see `sampler.sample`."""

    logits: Any
    stride: Any
    """Elements from a row of logits to the next."""
    vocab: Any
    chunks: Any
    """Of a row."""
    slots: Any
    floats: Any
    integers: Any
    counts: Any


class Scratch(NamedTuple):
    """What the launches of a step tell each other; see `memory.sampler.sampler_buffers`."""

    group_best: Any
    group_list: Any
    chunk_values: Any
    chunk_tokens: Any


class Row(NamedTuple):
    """One row's part of what is given."""

    logits: Any
    counts: Any
    floats: Any
    integers: Any
    vocab: Any
    inverse_temperature: Any
    """0 takes the best token."""
    penalises: Any
    """Whether counts change the scores."""


@triton.jit
def row_of(given, row, slot):
    """A row's pointers and the options that all launches need."""
    slot = slot.to(tl.int64)
    floats = given.floats + slot * FLOATS
    integers = given.integers + slot * INTEGERS
    return Row(
        given.logits + row * given.stride,
        given.counts + slot * given.vocab,
        floats,
        integers,
        given.vocab,
        tl.load(floats + INVERSE_TEMPERATURE),
        tl.load(integers + HAS_PENALTIES) != 0,
    )


@triton.jit
def load_logits(logits, tokens, inside):
    """Logits [n] as `engine.sampling.without_nan` has them; -inf outside the vocabulary."""
    values = tl.load(logits + tokens, mask=inside, other=float("-inf"))
    values = tl.where(values == values, values, float("-inf"))  # noqa: PLR0124
    return tl.minimum(values, _LARGEST)


@triton.jit
def load_scores(row, tokens, inside):
    """Logits [n] after penalties; -inf outside the vocabulary."""
    scores = load_logits(row.logits, tokens, inside)
    if row.penalises:
        seen = tl.load(row.counts + tokens, mask=inside, other=0)
        answered = seen & (_FLAG - 1)
        dividing = tl.load(row.floats + INVERSE_REPETITION)
        factor = tl.where(scores > 0, dividing, tl.load(row.floats + REPETITION))
        scores = tl.where(seen != 0, scores * factor, scores)
        scores = scores - tl.load(row.floats + FREQUENCY) * answered.to(tl.float32)
        scores = tl.where(answered > 0, scores - tl.load(row.floats + PRESENCE), scores)
    return scores


@triton.jit
def distances_of(scores, best, inverse_temperature):
    """How far scores [n] lie below the best, over the temperature; inf for -inf."""
    gaps = (best - scores) * inverse_temperature
    return tl.where(scores == float("-inf"), float("inf"), gaps)


@triton.jit
def keys_of(distances):
    """Their bits."""
    return distances.to(tl.int32, bitcast=True)


@triton.jit
def weights_of(values, largest, scale):
    """exp of what lies below the largest; 0 for -inf, even where that is the largest."""
    return tl.where(values == float("-inf"), 0.0, tl.exp((values - largest) * scale))


@triton.jit
def load_chunks(values, chunks, CHUNKS: tl.constexpr):
    """One value of each chunk; -inf for what fills up the power of two."""
    chunk = tl.arange(0, CHUNKS)
    return tl.load(values + chunk, mask=chunk < chunks, other=float("-inf"))


@triton.jit
def find_limit(given, scratch, GROUPS: tl.constexpr, CHUNKS: tl.constexpr):
    """Stores the largest key that a row's filters keep."""
    number = tl.program_id(0).to(tl.int64)
    slot = tl.load(given.slots + number)
    if slot < 0:
        return
    row = row_of(given, number, slot)
    if row.inverse_temperature == 0:
        return
    limit = tl.full((), _FARTHEST, tl.int32)
    top_k = tl.load(row.integers + TOP_K)
    top_p = tl.load(row.floats + TOP_P)
    counts = (top_k > 0) & (top_k < given.vocab)
    if counts | (top_p < 1):
        groups = given.chunks * CHUNK_GROUPS
        group_list = scratch.group_list + number * groups
        bests = load_chunks(scratch.group_best + number * groups, groups, GROUPS)
        best = tl.max(bests, axis=0)
        distances = distances_of(bests, best, row.inverse_temperature)
        need = top_k.to(tl.float32)
        shares = tl.full((GROUPS,), 1.0, tl.float32)
        if not counts:
            values = scratch.chunk_values + number * VALUES * given.chunks
            tops = load_chunks(values + BEST * given.chunks, given.chunks, CHUNKS)
            mass = load_chunks(values + MASS * given.chunks, given.chunks, CHUNKS)
            parts = mass * weights_of(tops, best, row.inverse_temperature)
            need = top_p * tl.sum(tl.where(tops == float("-inf"), 0.0, parts), axis=0)
            shares = tl.exp(-distances)
        # What the best tokens of the groups make up alone, all tokens make up no farther away.
        limit = _reach(keys_of(distances), shares, need)
        listed = _list_groups(group_list, keys_of(distances) <= limit, GROUPS)
        if counts:
            limit = _search(row, best, group_list, listed, limit, need, False)
            if top_p < 1:
                need = top_p * _mass_within(row, best, group_list, listed, limit)
        if top_p < 1:
            limit = _search(row, best, group_list, listed, limit, need, True)
    limit = tl.minimum(limit, keys_of(tl.load(row.floats + REACH)))
    tl.store(row.integers + LIMIT, limit.to(tl.int64))


@triton.jit
def _reach(keys, shares, need):
    """The smallest key within which the shares sum to what is needed; the farthest if none."""
    low = tl.full((), -1, tl.int32)
    high = tl.full((), _FARTHEST, tl.int32)
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(keys <= middle, shares, 0.0), axis=0) >= need
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    return high


@triton.jit
def _list_groups(group_list, chosen, GROUPS: tl.constexpr):
    """Writes the chosen groups' numbers in order; how many they are."""
    chosen = chosen.to(tl.int32)
    place = tl.cumsum(chosen, axis=0) - 1
    tl.store(group_list + place, tl.arange(0, GROUPS), mask=chosen != 0)
    # Other threads read what this one wrote.
    tl.debug_barrier()
    return tl.sum(chosen, axis=0)


@triton.jit
def _tile(row, best, group_list, listed, start):
    """Distances [_TILE] of the tokens in the listed groups from `start` on."""
    lane = tl.arange(0, _TILE)
    entry = start + lane // _GROUP
    group = tl.load(group_list + entry, mask=entry < listed, other=0)
    tokens = group * _GROUP + lane % _GROUP
    scores = load_scores(row, tokens, (entry < listed) & (tokens < row.vocab))
    return distances_of(scores, best, row.inverse_temperature)


@triton.jit
def _mass_within(row, best, group_list, listed, limit):
    masses = tl.zeros((_TILE,), tl.float32)
    for start in tl.range(0, listed, _TILE_GROUPS):
        distances = _tile(row, best, group_list, listed, start)
        masses += tl.where(keys_of(distances) <= limit, tl.exp(-distances), 0.0)
    return tl.sum(masses, axis=0)


@triton.jit
def _search(row, best, group_list, listed, high, need, BY_MASS: tl.constexpr):
    """The smallest key, at most `high`, within which tokens or their mass are what is needed.

    Any key that keeps the same tokens does. Each round looks at _THRESHOLDS keys at once, `high`
    being the last of them.
    """
    rank = tl.arange(0, _THRESHOLDS)
    low = tl.full((), -1, tl.int32)
    below = tl.full((), 0, tl.int32)
    within = tl.full((), _FARTHEST, tl.int32)
    while (high - low > 1) & (within - below > 1):
        step = tl.maximum((high - low) // _THRESHOLDS, 1)
        between = tl.minimum(low + step * (rank + 1), high - 1)
        keys = tl.where(rank == _THRESHOLDS - 1, high, between)
        tokens = tl.zeros((_TILE, _THRESHOLDS), tl.int32)
        mass = tl.zeros((_TILE, _THRESHOLDS), tl.float32)
        for start in tl.range(0, listed, _TILE_GROUPS, num_stages=STAGES):
            distances = _tile(row, best, group_list, listed, start)
            kept = keys_of(distances)[:, None] <= keys[None, :]
            tokens += kept.to(tl.int32)
            if BY_MASS:
                mass += tl.where(kept, tl.exp(-distances)[:, None], 0.0)
        numbers = tl.sum(tokens, axis=0)
        found = tl.sum(mass, axis=0) if BY_MASS else numbers.to(tl.float32)
        enough = found >= need
        raised = tl.max(tl.where(enough, low, keys), axis=0)
        high = tl.min(tl.where(enough, keys, high), axis=0)
        within = tl.max(tl.where(keys == high, numbers, 0), axis=0)
        below = tl.maximum(below, tl.max(tl.where(keys == raised, numbers, 0), axis=0))
        low = raised
    return high
