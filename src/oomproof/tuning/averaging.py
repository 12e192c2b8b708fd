"""Gradients of adapters, averaged over ranks while the layers below still compute theirs.

As torch's DistributedDataParallel does it (Li et al. 2020, arXiv:2006.15704), which cannot do it
here: it waits for hooks of parameters, and one autograd function writes all their gradients. The
result is the mean over ranks, as DDP's; transformers' Trainer scales losses for that.
"""

from __future__ import annotations

import torch

from oomproof.tuning.adapters import Adapters
from oomproof.tuning.distributed import Exchange, Ranks
from oomproof.units import MIB

BUCKET_BYTES = 25 * MIB
"""Neighbouring layers travel together up to this, as DDP's buckets do: fewer launches, and the last
one, which nothing hides, is still short."""


class GradientAverage:
    """Averages the gradients of a backward pass.

    Args:
        adapters: Whose gradients; they lie in `grads`.
        ranks: Two or more.
    """

    def __init__(self, adapters: Adapters, ranks: Ranks) -> None:
        self._adapters, self._ranks = adapters, ranks
        layer_bytes = adapters.grads[0].nbytes
        self._layers = len(adapters.grads)
        self._together = max(1, BUCKET_BYTES // layer_bytes)
        self._end = self._layers
        self._coming: list[Exchange] = []

    def begin(self) -> None:
        """Before a backward pass; forgets one that was never finished."""
        self._end = self._layers
        self._coming.clear()

    def adopt(self, layer: int) -> None:
        """Before a layer's gradients are added to what there is: that must lie in `grads`."""
        self._adapters.adopt_grads(layer)

    def done(self, layer: int) -> None:
        """A layer's gradients are complete, and those of all above it."""
        if layer and self._end - layer < self._together:
            return
        whole = self._adapters.grads[layer : self._end].view(-1)
        self._coming.append(self._ranks.sum(whole))
        self._end = layer

    def finish(self) -> None:
        """Lets what is launched next find the mean."""
        for exchange in self._coming:
            exchange.wait()
        self._coming.clear()
        self._adapters.grads.mul_(1 / self._ranks.size)


def check_alike(adapters: Adapters, ranks: Ranks) -> bool:
    """Whether all ranks have the first one's adapters, to the bit."""
    if ranks.size == 1:
        return True
    alike = torch.ones((), dtype=torch.bool, device=adapters.values.device)
    others = torch.empty_like(adapters.values[0])
    for values in adapters.values:
        ranks.broadcast(others.copy_(values))
        alike &= (values == others).all()
    return ranks.all_true(alike)
