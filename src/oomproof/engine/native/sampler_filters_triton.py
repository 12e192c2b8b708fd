"""How far from the best token the filters of a row let a token lie: a search, not a sort.

Distances are not negative, so their bits, as integers, are ordered as they are: a key. A filter is
the smallest key within which there are enough tokens, or enough of their mass. The search looks
only at groups of tokens whose best one may be kept, which are few unless the distribution is flat,
narrows its bounds until few tokens lie between them, and compares those with each other.
"""

# Triton's language is not typed, and its constants are spelled in capitals.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from oomproof.engine.native import sampler
from oomproof.engine.sampling import LARGEST_LOGIT, PROMPT_FLAG
from oomproof.memory.sampler import (
    CANDIDATES,
    CHUNK_TOKENS,
    CHUNK_VALUES,
    FLOAT_OPTIONS,
    GROUP_TOKENS,
    INTEGER_OPTIONS,
)

CHUNK_GROUPS = tl.constexpr(CHUNK_TOKENS // GROUP_TOKENS)
VALUES = tl.constexpr(CHUNK_VALUES)
BEST, MASS, DRAWN, TOP_LOGIT, LOGIT_MASS = (tl.constexpr(i) for i in range(CHUNK_VALUES))
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
_LARGEST = tl.constexpr(LARGEST_LOGIT)
_FARTHEST = tl.constexpr(0x42000000)
"""The key of 32: no noise makes up for more, so no token is drawn from farther away."""
_TILE = tl.constexpr(2048)
_CANDIDATES = tl.constexpr(CANDIDATES)
_THRESHOLDS = tl.constexpr(8)
_AT_ONCE = tl.constexpr(16)
_ROUGHLY = tl.constexpr(1 << 15)
"""Keys so far apart differ by less than a hundredth of their distances."""


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
    candidates: Any
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
def load_chunks(values, chunks, other, CHUNKS: tl.constexpr):
    """One value of each chunk, and what fills up the power of two."""
    chunk = tl.arange(0, CHUNKS)
    return tl.load(values + chunk, mask=chunk < chunks, other=other)


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
        listing = (scratch.group_list + number * groups, scratch.candidates + number * _CANDIDATES)
        bests = load_chunks(scratch.group_best + number * groups, groups, float("-inf"), GROUPS)
        best = tl.max(bests, axis=0)
        distances = distances_of(bests, best, row.inverse_temperature)
        need = top_k.to(tl.float32)
        shares = tl.full((GROUPS,), 1.0, tl.float32)
        if not counts:
            values = scratch.chunk_values + number * VALUES * given.chunks
            tops = load_chunks(values + BEST * given.chunks, given.chunks, float("-inf"), CHUNKS)
            mass = load_chunks(values + MASS * given.chunks, given.chunks, 0.0, CHUNKS)
            need = top_p * tl.sum(mass * weights_of(tops, best, row.inverse_temperature), axis=0)
            shares = tl.exp(-distances)
        # What the best tokens of the groups make up alone, all tokens make up no farther away.
        keys = keys_of(distances)
        limit = _roughly(keys, shares, need, limit)
        listed = _list_groups(listing, keys <= limit, GROUPS)
        if counts:
            limit = _search(row, best, listing, listed, limit, need, False)
            if top_p < 1:
                need = top_p * _mass_within(row, best, listing, listed, limit)
        if top_p < 1:
            limit = _search(row, best, listing, listed, limit, need, True)
    limit = tl.minimum(limit, keys_of(tl.load(row.floats + REACH)))
    tl.store(row.integers + LIMIT, limit.to(tl.int64))


@triton.jit
def _roughly(keys, shares, need, high):
    """A key, at most `high` and a little too large, within which the shares sum to the need."""
    low = tl.full((), -1, tl.int32)
    while high - low > _ROUGHLY:
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(keys <= middle, shares, 0.0), axis=0) >= need
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    return high


@triton.jit
def _list_groups(listing, chosen, GROUPS: tl.constexpr):
    """Writes the chosen groups' numbers in order; how many they are."""
    chosen = chosen.to(tl.int32)
    place = tl.cumsum(chosen, axis=0) - 1
    tl.store(listing[0] + place, tl.arange(0, GROUPS), mask=chosen != 0)
    # Other threads read what this one wrote.
    tl.debug_barrier()
    return tl.sum(chosen, axis=0)


@triton.jit
def _tile(row, best, listing, listed, start):
    """Distances [_TILE] of the tokens in the listed groups from token `start` of them on."""
    lane = start + tl.arange(0, _TILE)
    inside = lane < listed * _GROUP
    tokens = tl.load(listing[0] + lane // _GROUP, mask=inside, other=0) * _GROUP + lane % _GROUP
    scores = load_scores(row, tokens, inside & (tokens < row.vocab))
    return distances_of(scores, best, row.inverse_temperature)


@triton.jit
def _mass_within(row, best, listing, listed, limit):
    masses = tl.zeros((_TILE,), tl.float32)
    for start in range(0, listed * _GROUP, _TILE):
        distances = _tile(row, best, listing, listed, start)
        masses += tl.where(keys_of(distances) <= limit, tl.exp(-distances), 0.0)
    return tl.sum(masses, axis=0)


@triton.jit
def _search(row, best, listing, listed, high, need, BY_MASS: tl.constexpr):
    """The smallest key, at most `high`, within which tokens or their mass are what is needed."""
    rank = tl.arange(0, _THRESHOLDS)
    low = tl.full((), -1, tl.int32)
    below = tl.full((), 0.0, tl.float32)
    # At least one of each group does, and often few more.
    between = listed.to(tl.float32)
    copied = tl.full((), _CANDIDATES + 1, tl.int32)
    while (copied > _CANDIDATES) & (high - low > 1):
        if between <= _CANDIDATES:
            copied = _copy_between(row, best, listing, listed, low, high)
            between = tl.full((), _CANDIDATES + 1, tl.float32)
        else:
            # The last threshold is `high`; those before are evenly spaced as distances.
            near = tl.maximum(low, 0).to(tl.float32, bitcast=True)
            width = high.to(tl.float32, bitcast=True) - near
            spaced = keys_of(near + width * ((rank + 1) / _THRESHOLDS))
            spaced = tl.minimum(tl.maximum(spaced, low + 1), high - 1)
            keys = tl.where(rank == _THRESHOLDS - 1, high, spaced)
            found = tl.zeros((_TILE, _THRESHOLDS), tl.float32)
            for start in range(0, listed * _GROUP, _TILE):
                distances = _tile(row, best, listing, listed, start)
                kept = keys_of(distances)[:, None] <= keys[None, :]
                found += tl.where(kept, _share(distances, BY_MASS)[:, None], 0.0)
            sums = tl.sum(found, axis=0)
            enough = sums >= need
            low = tl.max(tl.where(enough, low, keys), axis=0)
            high = tl.min(tl.where(enough, keys, high), axis=0)
            below = tl.maximum(below, tl.max(tl.where(enough, 0.0, sums), axis=0))
            between = tl.min(tl.where(enough, sums, float("inf")), axis=0) - below
            if BY_MASS:
                # None of them has less mass than one at `high`.
                between *= tl.exp(high.to(tl.float32, bitcast=True))
    if high - low > 1:
        lane = tl.arange(0, _CANDIDATES)
        keys = tl.load(listing[1] + lane, mask=lane < copied, other=_FARTHEST)
        found = tl.zeros((_CANDIDATES, _AT_ONCE), tl.float32)
        for start in range(0, copied, _AT_ONCE):
            other = start + tl.arange(0, _AT_ONCE)
            inside = other < copied
            others = tl.load(listing[1] + other, mask=inside, other=_FARTHEST)
            share = _share(others.to(tl.float32, bitcast=True), BY_MASS)
            share = tl.where(inside, share, 0.0)
            found += tl.where(others[None, :] <= keys[:, None], share[None, :], 0.0)
        enough = (below + tl.sum(found, axis=1) >= need) & (lane < copied)
        high = tl.min(tl.where(enough, keys, high), axis=0)
    return high


@triton.jit
def _share(distances, BY_MASS: tl.constexpr):
    return tl.exp(-distances) if BY_MASS else tl.full(distances.shape, 1.0, tl.float32)


@triton.jit
def _copy_between(row, best, listing, listed, low, high):
    """Copies the keys above `low` and up to `high` as far as there is room; how many they are."""
    copied = tl.full((), 0, tl.int32)
    for start in range(0, listed * _GROUP, _TILE):
        keys = keys_of(_tile(row, best, listing, listed, start))
        chosen = ((keys > low) & (keys <= high)).to(tl.int32)
        place = copied + tl.cumsum(chosen, axis=0) - 1
        tl.store(listing[1] + place, keys, mask=(chosen != 0) & (place < _CANDIDATES))
        copied += tl.sum(chosen, axis=0)
    tl.debug_barrier()
    return copied
