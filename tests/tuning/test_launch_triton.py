"""A kernel that was compiled for the same is launched again without Triton's own search."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from oomproof.tuning import launch_triton
from oomproof.tuning.launch_triton import launch

GRID = (2, 1, 1)


class Compiled:
    """What Triton's launch returns."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))


class Kernel:
    """As a function that is decorated with triton.jit."""

    def __init__(self, compiles: bool = True) -> None:
        self.fn = object()
        self.made: list[Compiled | None] = []
        self._compiles = compiles

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*_: object, num_warps: int, **constants: object) -> Compiled | None:
            self.made.append(Compiled() if self._compiles else None)
            return self.made[-1]

        return run


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_triton, "_COMPILED", {})


def test_the_second_launch_is_the_compiled_kernels() -> None:
    kernel, x = Kernel(), torch.zeros(8)
    for scale in (0.5, 0.25):
        launch(kernel, GRID, x, None, 8, scale, BLOCK=16, ADDS=True, num_warps=4)
    [compiled] = kernel.made
    assert compiled is not None
    [(grid, *arguments)] = compiled.launches
    assert grid == GRID
    assert arguments[0] is x
    assert arguments[1:] == [None, 8, 0.25, 16, True]


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"x": torch.zeros(9)[1:]},
        {"x": None},
        {"width": 9},
        {"block": 32},
        {"warps": 8},
    ],
)
def test_whatever_it_is_compiled_for_is_compiled_again(change: dict[str, Any]) -> None:
    kernel = Kernel()
    for asked in ({}, change):
        one: dict[str, Any] = {"x": torch.zeros(8), "width": 8, "block": 16, "warps": 4, **asked}
        launch(kernel, GRID, one["x"], one["width"], BLOCK=one["block"], num_warps=one["warps"])
    assert len(kernel.made) == 2


def test_kernels_do_not_share_what_is_compiled() -> None:
    one, other = Kernel(), Kernel()
    for kernel in (one, other):
        launch(kernel, GRID, 8, num_warps=4)
    assert len(one.made) == len(other.made) == 1


def test_an_interpreted_kernel_is_launched_by_triton_each_time() -> None:
    kernel = Kernel(compiles=False)
    for _ in range(2):
        launch(kernel, GRID, 8, num_warps=4)
    assert kernel.made == [None, None]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_constants_are_given_in_the_order_of_the_kernels_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from oomproof.tuning import kernels_triton as kernels

    seen = []

    def record(kernel: Any, _: object, *arguments: Any, num_warps: int, **constants: Any) -> None:
        seen.append((kernel, [one.name for one in kernel.params], len(arguments), list(constants)))

    monkeypatch.setattr(kernels, "launch", record)
    x, wide = torch.zeros(4, 8), torch.zeros(4, 2, 4)
    weight, scale = torch.zeros(8), torch.zeros(1)
    rotary, positions = torch.zeros(2, 4, 2), torch.zeros(4, dtype=torch.int32)
    kernels.rms_norm(x, weight, 1e-5, x)
    kernels.accumulate(x, x, x, weight, 1e-5, x)
    kernels.rms_norm_backward(x, x, weight, 1e-5, x, True, None)
    kernels.rotate(wide, rotary, positions, None, 1e-5, wide)
    kernels.silu_mul_backward(x, x, x)
    kernels.silu_mul_low(x, x, x, torch.zeros(8, 4), torch.zeros(8, 4), 1.0, x)
    kernels.cross_entropy_(x, positions, 1.0, scale, scale, True)
    assert len({kernel for kernel, *_ in seen}) == 7
    for _, parameters, count, constants in seen:
        assert parameters[count:] == constants
