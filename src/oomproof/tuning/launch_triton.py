"""Triton kernels, launched again without what Triton does to find out what to launch.

Its own launch looks at every argument's type, alignment and divisibility in Python, some tens of
microseconds that a step has hundreds of. A kernel compiled for exactly these numbers, and pointers
as well aligned, is the same kernel.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import Any

import torch

_ALIGNMENT_BYTES = 16
"""What Triton compiles for."""
_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    *arguments: Any,
    num_warps: int,
    **constants: Any,
) -> None:
    """Launches a kernel on the current device and stream.

    Args:
        kernel: Decorated with triton.jit.
        grid: Programs in x, y, z.
        arguments: Tensors, whole numbers that only take few values, other numbers, or None.
        num_warps: Of a program.
        constants: Its last parameters, which are tl.constexpr, in their order.
    """
    key = (
        kernel.fn,
        torch.cuda.current_device() if torch.cuda.is_initialized() else -1,
        num_warps,
        *constants.values(),
        *[_kind(one) for one in arguments],
    )
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *constants.values())
        return
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps)
    if compiled is not None:  # Triton's interpreter compiles nothing.
        _COMPILED[key] = compiled


def _kind(argument: Any) -> Any:
    """What a kernel is compiled for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT_BYTES == 0
    return float if isinstance(argument, float) else argument
