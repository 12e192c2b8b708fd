"""For those who stay with transformers: smaller batches where memory runs out.

guard(model)                      a `with` block in which model.generate halves its batch
executable_batch_size(function)   calls a function with ever smaller batch sizes
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from oomproof.errors import InputError, LadderExhaustedError
from oomproof.guarding.machine import free_caches
from oomproof.guarding.situation import Failure, judge

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Sized = Callable[Concatenate[int, P], T]
"""Takes the batch size before anything else."""
_NOTHING = object()


def halve(batch_size: int) -> int:
    """Half of a batch, rounded down."""
    return batch_size // 2


@overload
def executable_batch_size(
    function: Sized[P, T],
    *,
    starting_batch_size: int = ...,
    floor: int = ...,
    reduce: Callable[[int], int] = ...,
) -> Callable[P, T]: ...


@overload
def executable_batch_size(
    function: None = None,
    *,
    starting_batch_size: int = ...,
    floor: int = ...,
    reduce: Callable[[int], int] = ...,
) -> Callable[[Sized[P, T]], Callable[P, T]]: ...


def executable_batch_size(
    function: Any = None,
    *,
    starting_batch_size: int = 128,
    floor: int = 1,
    reduce: Callable[[int], int] = halve,
) -> Any:
    """A decorator: calls a function with a batch size that memory has room for.

    The shape is that of accelerate's find_executable_batch_size. What is not for want of memory,
    fatal failures of CUDA among it, is raised as it is and never tried again; the failed call's
    frames are gone before the next one begins. The size that worked is where the next call begins.

    Args:
        function: Takes the batch size as its first argument.
        starting_batch_size: What is tried first.
        floor: The smallest that is tried.
        reduce: From a batch size to a smaller one.

    Raises:
        InputError: The floor is less than 1 or above the start.
        LadderExhaustedError: From the call: memory runs out at the floor too.
    """
    if function is None:
        return functools.partial(
            executable_batch_size,
            starting_batch_size=starting_batch_size,
            floor=floor,
            reduce=reduce,
        )
    if not 1 <= floor <= starting_batch_size:
        raise InputError(
            f"floor {floor} must be from 1 to the starting batch size {starting_batch_size}"
        )
    size = starting_batch_size

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal size
        tried: list[str] = []
        while True:
            result, failure = _attempt(functools.partial(function, size, *arguments, **options))
            if failure is None:
                return result
            free_caches()
            tried.append(f"batch size {size}")
            smaller = min(reduce(size), size - 1)
            if size == floor:
                raise _exhausted(failure, tried)
            smaller = max(floor, smaller)
            log.warning("%s; batch size %d instead of %d", failure.text, smaller, size)
            size = smaller

    return call


@contextmanager
def guard(model: Any, *, floor: int = 1) -> Iterator[Any]:
    """Within the block, `model.generate` goes on with smaller batches where memory runs out.

    The same batch is tried once more with caches freed, then in halves, whose answers are put
    together again, padded behind the shorter ones. Sampled answers are others than of the whole
    batch, since random numbers are drawn in another order. Everything else is as it was.

    Args:
        model: A transformers model.
        floor: The fewest prompts that are tried together.

    Raises:
        InputError: The floor is less than 1.
        LadderExhaustedError: From `generate`: memory runs out at the floor too, or what is asked
            for cannot be put together again.
    """
    if floor < 1:
        raise InputError(f"floor {floor} must be at least 1")
    own = vars(model).get("generate", _NOTHING)
    model.generate = functools.wraps(model.generate)(_Generate(model, model.generate, floor))
    try:
        yield model
    finally:
        if own is _NOTHING:
            del model.generate
        else:
            model.generate = own


class _Generate:
    """`generate` of a model, in as many parts as it takes."""

    def __init__(self, model: Any, generate: Callable[..., Any], floor: int) -> None:
        self._model, self._generate, self._floor = model, generate, floor

    def __call__(self, inputs: Any = None, **options: Any) -> Any:
        if inputs is not None:
            options["inputs"] = inputs
        return self._whole(options, [])

    def _whole(self, options: Mapping[str, Any], tried: list[str]) -> Any:
        rows = _rows(options)
        failure: Failure | None = None
        # Parts are not tried twice: what could be freed is free by then.
        for _ in range(1 if tried else 2):
            result, failure = _attempt(functools.partial(self._generate, **options))
            if failure is None:
                return result
            free_caches()
            tried.append(f"batch of {rows}")
            log.warning("%s; generate with a batch of %d once more", failure.text, rows)
        assert failure is not None
        half = rows // 2
        if half < self._floor:
            raise _exhausted(failure, tried)
        log.warning("%s; two batches, of %d and %d", failure.text, half, rows - half)
        parts = [
            self._whole(_part(options, rows, some), tried)
            for some in (slice(0, half), slice(half, rows))
        ]
        return self._together(parts, failure, tried)

    def _together(self, parts: list[Any], failure: Failure, tried: list[str]) -> Any:
        import torch

        if not all(isinstance(part, torch.Tensor) for part in parts):
            raise _exhausted(failure, [*tried, "parts: only plain tensors can be put together"])
        config = self._model.generation_config
        ends = config.eos_token_id
        end = ends[0] if isinstance(ends, list) else ends
        padding = config.pad_token_id if config.pad_token_id is not None else end or 0
        width = max(part.shape[1] for part in parts)
        return torch.cat(
            [
                torch.nn.functional.pad(part, (0, width - part.shape[1]), value=padding)
                for part in parts
            ]
        )


def _attempt(call: Callable[[], Any]) -> tuple[Any, Failure | None]:
    """What a call gives, or that memory ran out; whatever else it raises is raised."""
    try:
        return call(), None
    except Exception as error:
        failure = None if isinstance(error, LadderExhaustedError) else judge(error)
        if failure is None or failure.is_fatal or failure.is_world:
            raise
    return None, failure


def _rows(options: Mapping[str, Any]) -> int:
    given = (options.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    return next((int(one.shape[0]) for one in given if one is not None), 1)


def _part(options: Mapping[str, Any], rows: int, some: slice) -> dict[str, Any]:
    """The options of some rows: tensors that have so many rows are cut."""
    return {
        name: value[some]
        if hasattr(value, "shape") and len(value.shape) > 0 and value.shape[0] == rows
        else value
        for name, value in options.items()
    }


def _exhausted(failure: Failure, tried: list[str]) -> LadderExhaustedError:
    return LadderExhaustedError(
        failure.text,
        fault=failure.fault,
        tried=tuple(tried),
        shortfall_bytes=failure.missing_bytes,
        remedy="use shorter prompts, a smaller format or a smaller model; see `oomproof plan`",
    )
