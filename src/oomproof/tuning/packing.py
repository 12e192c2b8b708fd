"""Samples into sequences, and sequences into a run's micro-batches, all from one seed.

Best-fit decreasing (Johnson 1973; at most 11/9 of the best number of sequences, as first-fit
decreasing): each sample, the longest first, goes to the sequence it leaves the least room in. The
sequences that are open are kept by their room, so that a sample costs the same whatever their
number; groups of samples are packed one after the other, so that time and memory stay bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
GROUP = 1 << 17
"""Samples that are packed together."""
MAX_VALIDATION_TOKENS = 1 << 20
"""More than this tells no more, and takes long."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which samples are learned from, and which are held out."""

    training: Numbers
    validation: Numbers


def split(lengths: Numbers, share: float, seed: int) -> Split:
    """Holds samples out, chosen by the seed: the share of them, at least one where there are two.

    Held-out samples end at MAX_VALIDATION_TOKENS tokens; the others are learned from.
    """
    count = len(lengths)
    order = np.random.default_rng([seed, 1]).permutation(count)
    wanted = 0 if share == 0 or count < 2 else max(1, round(share * count))
    wanted = min(wanted, count - 1)
    chosen = order[:wanted]
    within = int(np.searchsorted(np.cumsum(lengths[chosen]), MAX_VALIDATION_TOKENS, side="right"))
    chosen = chosen[: max(1, within)] if wanted else chosen
    mask = np.zeros(count, dtype=np.bool_)
    mask[chosen] = True
    return Split(
        training=np.flatnonzero(~mask).astype(np.int64),
        validation=np.flatnonzero(mask).astype(np.int64),
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences: which samples each holds."""

    samples: Numbers
    """Of all sequences, one after the other."""
    ends: Numbers
    """Where each sequence ends in `samples`."""
    lengths: Numbers
    """Tokens of each sequence."""

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def most_samples(self) -> int:
        """Of a sequence."""
        return int(np.diff(self.ends, prepend=0).max(initial=0))

    def row(self, number: int) -> Numbers:
        """The samples of a sequence, in their order."""
        begin = int(self.ends[number - 1]) if number else 0
        return self.samples[begin : int(self.ends[number])]


def single_rows(samples: Numbers, lengths: Numbers) -> Rows:
    """A sequence for each sample."""
    return Rows(samples, np.arange(1, len(samples) + 1, dtype=np.int64), lengths[samples])


def pack(samples: Numbers, lengths: Numbers, context: int, seed: int) -> Rows:
    """Sequences of at most `context` tokens.

    Args:
        samples: Numbers of the samples to pack.
        lengths: Tokens of every sample, none more than `context`.
        context: Tokens of a sequence.
        seed: Decides which samples come together.
    """
    order = np.random.default_rng([seed, 2]).permutation(samples)
    rows: list[list[int]] = []
    for first in range(0, len(order), GROUP):
        rows += _pack_group(order[first : first + GROUP], lengths, context)
    flat = np.fromiter((one for row in rows for one in row), np.int64, len(order))
    ends = np.cumsum(np.fromiter((len(row) for row in rows), np.int64, len(rows)))
    sums = np.add.reduceat(lengths[flat], np.concatenate(([0], ends[:-1])))
    return Rows(flat, ends, sums.astype(np.int64))


def _pack_group(samples: Numbers, lengths: Numbers, context: int) -> list[list[int]]:
    """Rows of one group; `with_room[r]` are open rows with room for r tokens, `rooms` has bit r."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(context + 1)]
    rooms = 0
    for place in np.argsort(-lengths[samples], kind="stable"):
        number = int(samples[place])
        length = int(lengths[number])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = context, len(rows)
            rows.append([])
        rows[row].append(number)
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows


class Schedule:
    """Every micro-batch of a run, known before it begins.

    Epoch after epoch the sequences come in an order of their own; an optimizer step takes
    `batch_size` of them, `micro_batch` at a time. The last step is filled from a further epoch.

    Args:
        rows: Sequences of an epoch.
        batch_size: Sequences of an optimizer step.
        micro_batch: Sequences that are computed at once.
        steps: Optimizer steps.
        seed: Decides the order of every epoch.
        ranks: Processes that take micro-batches in turn, as accelerate hands them out. A step's
            sequences are cut into as many equal shares, and each share into micro-batches.
    """

    def __init__(
        self,
        rows: int,
        *,
        batch_size: int,
        micro_batch: int,
        steps: int,
        seed: int,
        ranks: int = 1,
    ) -> None:
        self.ranks = ranks
        self.rows, self.batch_size, self.micro_batch = rows, batch_size, micro_batch
        self.steps, self.seed = steps, seed
        self._orders: dict[int, Numbers] = {}

    @property
    def micro_batches_per_step(self) -> int:
        """Forward and backward passes of an optimizer step, over all ranks."""
        return self.ranks * ceil(self._share / self.micro_batch)

    @property
    def _share(self) -> int:
        """A rank's sequences of a step."""
        return self.batch_size // self.ranks

    @property
    def epochs(self) -> float:
        """Times that a sequence is met."""
        return self.steps * self.batch_size / self.rows

    def __len__(self) -> int:
        return self.steps * self.micro_batches_per_step

    def micro_batch_at(self, number: int) -> list[int]:
        """The sequences of a micro-batch."""
        step, part = divmod(number, self.micro_batches_per_step)
        turn, rank = divmod(part, self.ranks)
        first = step * self.batch_size + rank * self._share
        begin = first + turn * self.micro_batch
        end = min(begin + self.micro_batch, first + self._share)
        return [self._row(place) for place in range(begin, end)]

    def _row(self, place: int) -> int:
        epoch, within = divmod(place, self.rows)
        return int(self._order(epoch)[within])

    def _order(self, epoch: int) -> Numbers:
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a step can reach over the end of one
                self._orders.clear()
            rng = np.random.default_rng([self.seed, 3, epoch])
            self._orders[epoch] = rng.permutation(self.rows).astype(np.int64)
        return self._orders[epoch]


def schedule(
    rows: int,
    *,
    batch_size: int,
    micro_batch: int,
    epochs: float,
    max_steps: int | None,
    seed: int,
    ranks: int = 1,
) -> Schedule:
    """The run's micro-batches: `epochs` times through the rows, rounded up to whole steps."""
    steps = max(1, ceil(round(epochs * rows, 6) / batch_size))
    if max_steps is not None:
        steps = min(steps, max_steps)
    return Schedule(
        rows=rows,
        batch_size=batch_size,
        micro_batch=micro_batch,
        steps=steps,
        seed=seed,
        ranks=ranks,
    )


def evaluation_steps(steps: int, evaluations: int) -> Sequence[int]:
    """After which steps held-out samples are evaluated: evenly, and after the last one."""
    count = min(evaluations, steps)
    return sorted({max(1, round(steps * number / count)) for number in range(1, count + 1)})


def batches(count: int, size: int) -> Iterator[range]:
    """0 … count in parts of a size."""
    for first in range(0, count, size):
        yield range(first, min(count, first + size))
