"""Which bytes were to blame: read from the numbers of a message, then from its traceback."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from oomproof.faults.fault import MemoryFigures
from oomproof.postmortem.scan import Spot, Stage
from oomproof.units import GIB, MIB, format_bytes

_MIN_OTHERS_SHARE = 0.1
_MIN_OUTSIDE_BYTES = 2 * GIB
"""A context, a driver's own memory and a desktop stay below."""
_MIN_IDLE_BYTES = 256 * MIB
_LARGE_SHARE = 0.2
_MIN_WEIGHTS_SHARE = 0.75
_NO_LIMIT_SHARE = 0.98


class Term(StrEnum):
    """What took the memory."""

    ONE_TENSOR = "one-tensor"
    LIMIT = "limit"
    OTHER_PROCESSES = "other-processes"
    OUTSIDE_TORCH = "outside-torch"
    FRAGMENTATION = "fragmentation"
    WEIGHTS = "weights"
    KV_CACHE = "kv-cache"
    WORKSPACE = "workspace"
    TRAINING = "training"
    OWN_TENSORS = "own-tensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """The term, and why."""

    term: Term
    why: str
    """A sentence with the numbers."""


def blame(
    figures: MemoryFigures, stage: Stage, spot: Spot, weights_bytes: int | None = None
) -> Blame | None:
    """The term that was to blame; None where neither numbers nor traceback tell.

    A term is blamed where without it the allocation would have gone through, the one that the user
    can do most about first.

    Args:
        figures: Of the message.
        stage: What the program was doing.
        spot: What the tensor was for.
        weights_bytes: Of the model in 16 bits, where it is known which one it was.
    """
    for judge in (_limit, _one_tensor, _others, _outside, _fragments):
        if (found := judge(figures, spot)) is not None:
            return found
    return _weights(figures, spot, weights_bytes) or _by_stage(figures, stage, spot)


def _one_tensor(figures: MemoryFigures, spot: Spot) -> Blame | None:
    tried, total = figures.tried_bytes, figures.total_bytes
    if tried is None or total is None:
        return None
    what = _WHAT[spot]
    if tried > total:
        return Blame(
            term=_TERM_OF_SPOT.get(spot, Term.ONE_TENSOR),
            why=f"{what} of {format_bytes(tried)} was asked for at once, on a GPU of "
            f"{format_bytes(total)}: it could never fit",
        )
    if tried < _LARGE_SHARE * total:
        return None
    return Blame(
        term=_TERM_OF_SPOT.get(spot, Term.ONE_TENSOR),
        why=f"{what} of {format_bytes(tried)} was asked for at once, "
        f"{tried / total:.0%} of the GPU",
    )


def _limit(figures: MemoryFigures, _spot: Spot) -> Blame | None:
    tried, free, total = figures.tried_bytes, figures.free_bytes, figures.total_bytes
    allowed = figures.allowed_bytes
    if allowed is None or tried is None or free is None or total is None:
        return None
    if allowed >= _NO_LIMIT_SHARE * total or free < tried or tried > total:
        return None
    return Blame(
        term=Term.LIMIT,
        why=f"PyTorch was allowed {format_bytes(allowed)} of the GPU's {format_bytes(total)} "
        f"(set_per_process_memory_fraction), while {format_bytes(free)} were free",
    )


def _others(figures: MemoryFigures, _spot: Spot) -> Blame | None:
    tried, free, total = figures.tried_bytes, figures.free_bytes, figures.total_bytes
    if tried is None or free is None or total is None:
        return None
    held, listed = figures.other_bytes, True
    if held is None and figures.process_bytes is not None:
        held, listed = total - free - figures.process_bytes, False
    least = _MIN_OTHERS_SHARE * total if listed else max(_MIN_OUTSIDE_BYTES, 0.1 * total)
    if held is None or held < least or free + held < tried:
        return None
    return Blame(
        term=Term.OTHER_PROCESSES,
        why=f"other processes held {format_bytes(held)} of the GPU's {format_bytes(total)}; "
        f"without "
        f"them the {format_bytes(tried)} would have been there",
    )


def _outside(figures: MemoryFigures, _spot: Spot) -> Blame | None:
    tried, free, total = figures.tried_bytes, figures.free_bytes, figures.total_bytes
    reserved = figures.reserved_bytes
    if tried is None or free is None or total is None or reserved is None:
        return None
    if figures.process_bytes is not None:
        held, who = figures.process_bytes - reserved, "this process held"
        what = "CUDA context, NCCL, or libraries with pools of their own"
    else:
        held, who = total - free - reserved, "the rest of the GPU held"
        what = "other processes, or libraries of this one"
    if held < max(_MIN_OUTSIDE_BYTES, _MIN_OTHERS_SHARE * total) or free + held < tried:
        return None
    return Blame(
        term=Term.OUTSIDE_TORCH,
        why=f"beside PyTorch's memory {who} {format_bytes(held)} more: {what}",
    )


def _fragments(figures: MemoryFigures, _spot: Spot) -> Blame | None:
    tried, free, idle = figures.tried_bytes, figures.free_bytes, figures.idle_bytes
    if tried is None or free is None or idle is None:
        return None
    if idle < _MIN_IDLE_BYTES or free + idle < tried:
        return None
    return Blame(
        term=Term.FRAGMENTATION,
        why=f"{format_bytes(idle)} of what PyTorch had reserved held no tensor, enough for the "
        f"{format_bytes(tried)}, but in pieces too small for it",
    )


def _weights(figures: MemoryFigures, spot: Spot, weights_bytes: int | None) -> Blame | None:
    """What was there is what the weights take in 16 bits: whatever came last came too late."""
    held, tried = figures.allocated_bytes, figures.tried_bytes
    if held is None or tried is None or weights_bytes is None:
        return None
    if not _MIN_WEIGHTS_SHARE * held <= weights_bytes <= held / _MIN_WEIGHTS_SHARE:
        return None
    return Blame(
        term=Term.WEIGHTS,
        why=f"of the {format_bytes(held)} that tensors held, weights in 16 bits are "
        f"{format_bytes(min(held, weights_bytes))}; {_WHAT[spot]} of {format_bytes(tried)} only "
        "came last",
    )


def _by_stage(figures: MemoryFigures, stage: Stage, spot: Spot) -> Blame | None:
    held = figures.allocated_bytes
    there = "" if held is None else f": {format_bytes(held)} of tensors were there already"
    if stage is Stage.LOADING:
        return Blame(term=Term.WEIGHTS, why=f"it ran out while loading weights{there}")
    if stage is Stage.TRAINING:
        return Blame(
            term=Term.TRAINING,
            why=f"it ran out while training{there}: weights, gradients, optimizer and activations",
        )
    if spot is not Spot.UNKNOWN:
        return Blame(term=_TERM_OF_SPOT[spot], why=f"it ran out on {_WHAT[spot]}{there}")
    if stage is Stage.GENERATING:
        return Blame(
            term=Term.WORKSPACE,
            why=f"it ran out while generating{there}: weights first, then the KV cache, which "
            f"grows "
            "with every token, and activations",
        )
    total = figures.total_bytes
    if held is None or total is None or held < total / 2:
        return None
    return Blame(
        term=Term.OWN_TENSORS,
        why=f"this process's own tensors took {format_bytes(held)} of the GPU's "
        f"{format_bytes(total)}: of a language model that is mostly weights",
    )


_WHAT = {
    Spot.KV_CACHE: "a piece of the KV cache",
    Spot.ATTENTION: "a matrix of attention scores",
    Spot.LOGITS: "a tensor of logits",
    Spot.UNKNOWN: "one tensor",
}
_TERM_OF_SPOT = {
    Spot.KV_CACHE: Term.KV_CACHE,
    Spot.ATTENTION: Term.WORKSPACE,
    Spot.LOGITS: Term.WORKSPACE,
}
