"""Finds the fastest launch of a product: every candidate is timed in a CUDA graph.

Weights are as cold as in a model: launches of a graph take turns with copies of them, together
larger than a GPU's second cache, and each may begin before the one in front of it has ended, as in
a decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from oomproof.formats import ceil_div
from oomproof.quantization.product_params import NormedInput
from oomproof.quantization.products_tiled import launch_product
from oomproof.quantization.products_wide import ChainEnds, launch_wide_product
from oomproof.quantization.tiled import TiledSet
from oomproof.quantization.tiled_launch import (
    LaunchShape,
    launch_shape,
    partial_bytes,
    template_of,
)
from oomproof.quantization.tiles import TILE_ROWS
from oomproof.quantization.tuned import ProductKey, TunedLaunch
from oomproof.quantization.wide_launch import WideShape, warpgroups_of, wide_shapes

LEAST_GAIN = 0.02
"""Of the rule's time: what saves less may be chance."""
MAX_SPLITS = 8
"""Of the columns, that are tried."""
MAX_WIDE = 8
"""Launches of the kernel for many tokens that are tried: it has more, most of them slow."""
_REPEATS = 7
_LAUNCHES = 64
"""Of a graph, at least."""

Shape = LaunchShape | WideShape
"""A launch of either kernel."""
_AnyShape = TypeVar("_AnyShape", bound=Shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedLaunch:
    """A launch and its time."""

    warps: int
    splits: int
    us: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductTiming:
    """What was measured of a product."""

    name: str
    """Of a layer's: "qkv", "o", "gate_up" or "down"."""
    tokens: int
    key: ProductKey
    default: TimedLaunch
    """By the rule."""
    best: TimedLaunch
    """The same, where no other is faster by LEAST_GAIN."""
    candidates: int
    """That were tried, the rule's among them."""

    @property
    def gain(self) -> float:
        """Part of the rule's time that is saved."""
        return 1 - self.best.us / self.default.us

    @property
    def tuned(self) -> TunedLaunch | None:
        """What is kept; None where the rule's launch is the best."""
        if self.best == self.default:
            return None
        return TunedLaunch(
            product=self.key,
            warps=self.best.warps,
            splits=self.best.splits,
            default_us=self.default.us,
            us=self.best.us,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "gain": self.gain}


def candidates(
    key: ProductKey,
    tokens: int,
    warps_choices: Sequence[int],
    shared_limit: int,
    scratch_bytes: int,
) -> list[LaunchShape]:
    """All launches that fit, the rule's first; none where not even that does.

    Then so many tokens are multiplied in pieces, which are products of their own.

    Args:
        key: The product.
        tokens: Its tokens, at most the template's.
        warps_choices: Warps of a block that there are kernels for.
        shared_limit: Bytes of shared memory that a block may have.
        scratch_bytes: For the sums of splits. A product that is normalised is not split.
    """
    assert template_of(tokens) == key.template

    def shape_of(warps: int | None, splits: int | None) -> LaunchShape | None:
        shape = launch_shape(
            tokens=tokens,
            columns=key.columns,
            tiles=key.tiles,
            unit=key.unit,
            processors=key.processors,
            shared_limit=shared_limit,
            warps=warps,
            splits=splits,
        )
        fits = shape is not None and partial_bytes(shape, tokens, key.tiles) <= scratch_bytes
        return shape if fits else None

    by_rule = shape_of(None, None)
    if by_rule is None:
        return []
    most_splits = 1 if key.normed else MAX_SPLITS
    shapes = [
        shape_of(warps, splits) for warps in warps_choices for splits in range(1, most_splits + 1)
    ]
    return list(dict.fromkeys([by_rule, *(shape for shape in shapes if shape is not None)]))


def wide_candidates(
    key: ProductKey, tokens: int, shared_limit: int, scratch_bytes: int
) -> list[WideShape]:
    """Likewise of the kernel for many tokens, which has its one number of warps."""
    scale_bytes = getattr(torch, key.scales).itemsize
    shapes = wide_shapes(
        tokens=tokens,
        columns=key.columns,
        tiles=key.tiles,
        warpgroups=warpgroups_of(key.template, scale_bytes),
        processors=key.processors,
        shared_limit=shared_limit,
        scratch_bytes=scratch_bytes,
    )
    return list(shapes[:MAX_WIDE])


def find_best(
    shapes: Sequence[_AnyShape], time: Callable[[_AnyShape], float]
) -> tuple[TimedLaunch, TimedLaunch]:
    """(The first one, the best): another than the first only where it saves LEAST_GAIN.

    The fastest of many is partly the luckiest: it is timed again, beside the first, and must be
    faster again.

    Args:
        shapes: The rule's launch first.
        time: Microseconds of one.
    """
    default = shapes[0]
    found = {shape: time(shape) for shape in shapes}
    fastest = min(shapes, key=found.__getitem__)
    default_us, best_us = found[default], found[fastest]
    if best_us < default_us * (1 - LEAST_GAIN):
        default_us, best_us = time(default), time(fastest)
    if best_us >= default_us * (1 - LEAST_GAIN):
        fastest, best_us = default, default_us
    return _timed(default, default_us), _timed(fastest, best_us)


def _timed(shape: Shape, us: float) -> TimedLaunch:
    return TimedLaunch(warps=shape.warps, splits=shape.splits, us=us)


class LaunchTimer:
    """Times launches of one product.

    Args:
        copies: Equal sets, with different memory: as many as the second cache does not hold.
        tokens: Rows of the input.
        dtype: Its type.
        scratch: uint8, for the sums of splits.
        normed: Whether the input is normalised on the way in, with an update, as in a layer.
        gated: Whether SwiGLU's gate follows.
    """

    def __init__(
        self,
        copies: Sequence[TiledSet],
        tokens: int,
        dtype: torch.dtype,
        scratch: torch.Tensor,
        *,
        normed: bool,
        gated: bool,
    ) -> None:
        self._copies, self._gated, self._scratch = copies, gated, scratch
        device, columns = scratch.device, copies[0].columns
        rows = len(copies[0].codes) * TILE_ROWS // (2 if gated else 1)
        self._stream = torch.cuda.Stream(device)
        self._chain = ChainEnds.alone(device)
        self.out = torch.empty(tokens, rows, dtype=dtype, device=device)
        """What the last launch wrote: of the last copy."""
        x = torch.empty(tokens, columns, dtype=dtype, device=device).normal_()
        self.x: torch.Tensor | NormedInput = x
        """What is multiplied."""
        if normed:
            self.x = NormedInput(
                hidden=x,
                update=torch.zeros_like(x),
                weight=torch.ones(columns, dtype=dtype, device=device),
                hidden_out=torch.empty_like(x),
                eps=1e-5,
                multiplier=1.0,
            )

    def __call__(self, shape: Shape) -> float:
        """Microseconds of a launch: the median of several replays of a graph of many."""
        rounds = ceil_div(_LAUNCHES, len(self._copies))
        device = self._scratch.device
        # What the input is made with runs on another stream.
        torch.cuda.synchronize(device)
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            with _recorded() as graph:
                for weights in (*self._copies,) * rounds:
                    self._launch(weights, shape)
            times: list[float] = []
            for _ in range(_REPEATS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # While this one runs, the host puts the other behind it: no launch waits for it.
                graph.replay()
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            graph.reset()
        return 1e3 * median(times) / (rounds * len(self._copies))

    def _launch(self, weights: TiledSet, shape: Shape) -> None:
        if isinstance(shape, LaunchShape):
            launch_product(self.x, weights, self.out, self._scratch, shape, gated=self._gated)
        else:
            assert isinstance(self.x, torch.Tensor), "what is normalised has few tokens"
            launch_wide_product(
                self.x,
                weights,
                self.out,
                self._scratch,
                shape,
                gated=self._gated,
                chain=self._chain,
            )


@contextmanager
def _recorded() -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is launched inside; without torch.cuda.graph's waits and collections."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        yield graph
    finally:
        graph.capture_end()
