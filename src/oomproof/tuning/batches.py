"""Micro-batches as tensors: sequences of packed samples, padded to the widest of them."""

from __future__ import annotations

import numpy as np
import torch

from oomproof.tuning.cache import TokenCache
from oomproof.tuning.packing import Numbers, Rows, Schedule
from oomproof.units import round_up

IGNORED = -100
"""The label of a token that is not learned."""
PAD_MULTIPLE = 64
"""Sequences are as long as this many times something, so that shapes repeat."""

Batch = dict[str, torch.Tensor]


def width(tokens: int, context: int) -> int:
    """Tokens that a sequence of so many is padded to."""
    return min(round_up(tokens, PAD_MULTIPLE), max(context, tokens))


class BatchMaker:
    """Makes tensors of sequences.

    Args:
        cache: The samples.
        rows: Which of them each sequence holds.
        context: The most tokens of a sequence.
        pad_token: What fills a sequence; any token will do, none is learned from it.
    """

    def __init__(self, cache: TokenCache, rows: Rows, *, context: int, pad_token: int) -> None:
        self._cache, self.rows, self._context, self._pad = cache, rows, context, pad_token

    def make(self, numbers: list[int]) -> Batch:
        """input_ids, labels and position_ids of some sequences, each [rows, tokens]."""
        wide = width(int(max(self.rows.lengths[one] for one in numbers)), self._context)
        tokens = np.full((len(numbers), wide), self._pad, dtype=np.int64)
        labels = np.full((len(numbers), wide), IGNORED, dtype=np.int64)
        positions = np.zeros((len(numbers), wide), dtype=np.int64)
        for row, number in enumerate(numbers):
            begin = 0
            for sample in self.rows.row(number):
                values, learned = self._cache.sample(int(sample))
                end = begin + len(values)
                tokens[row, begin:end] = values
                labels[row, begin:end] = np.where(learned, values, IGNORED)
                positions[row, begin:end] = np.arange(len(values))
                begin = end
            # Padding is one more document, which nobody looks at.
            positions[row, begin:] = np.arange(wide - begin)
        return {
            "input_ids": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }

    def widest(self, count: int) -> list[int]:
        """The sequences that need the most memory together."""
        order: Numbers = np.argsort(-self.rows.lengths, kind="stable").astype(np.int64)
        longest = [int(one) for one in order[:count]]
        return longest + [longest[0]] * (count - len(longest))


class TrainingSet(torch.utils.data.Dataset[Batch]):
    """A run's micro-batches, in the order they are computed.

    Args:
        maker: Makes them.
        schedule: Their order.
    """

    def __init__(self, maker: BatchMaker, schedule: Schedule) -> None:
        self._maker, self._schedule = maker, schedule

    def __len__(self) -> int:
        return len(self._schedule)

    def __getitem__(self, number: int) -> Batch:
        return self._maker.make(self._schedule.micro_batch_at(number))


def unwrapped(batches: list[Batch]) -> Batch:
    """What the loader gets is a batch already."""
    [batch] = batches
    return batch
