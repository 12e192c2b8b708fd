"""Memory runs out at every allocation of an answer: the fault-free one, or a typed refusal."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

import oomproof.compat.engine as compat_engine
from oomproof.errors import LadderExhaustedError
from oomproof.guarding.engine import GuardedEngine
from tests.guarding.engines import (
    PROMPT,
    SHRINKING,
    Factory,
    FailingAllocation,
    answer,
    ends,
    finish,
    guarded,
    request,
    target,
    tokens,
)

POINTS = 100
LOADING_POINTS = 12


@pytest.fixture(autouse=True)
def quick_collection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was imported is no garbage: it need not be looked through at each recovery."""
    monkeypatch.setattr(compat_engine, "KV_FORMATS", {"bf16": "float32"})
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def spread(calls: int, points: int) -> list[int]:
    """Numbers from 1 to `calls`, evenly, the first and the last among them."""
    points = min(points, calls)
    return sorted({1 + round(number * (calls - 1) / (points - 1)) for number in range(points)})


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_an_allocation_that_fails_anywhere_in_an_answer_changes_nothing(engine: str) -> None:
    factory = Factory()
    running = guarded(factory, target(engine))
    calm = answer(running, request())
    with FailingAllocation(0) as counted:
        answer(running, request())
    assert counted.calls > 100
    # The first dispatch mode imports torch's compiler.
    gc.collect()
    gc.freeze()
    for number in spread(counted.calls, POINTS):
        trouble = SHRINKING[number % len(SHRINKING)]
        with FailingAllocation(number, trouble) as failing:
            events = answer(running, request())
        assert failing.calls > number
        assert tokens(events) == tokens(calm), number
        assert ends(events) == {"a": ("length", len(PROMPT), 8)}
        assert factory.alive == 1, f"an engine is still referred to after call {number}"
    assert len(factory.started) > min(POINTS, counted.calls)
    running.close()
    assert factory.alive == 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_an_allocation_that_fails_while_loading_leaves_nothing_behind(engine: str) -> None:
    with FailingAllocation(0) as counted:
        running = guarded(Factory(), target(engine))
    calm = tokens(answer(running, request()))
    running.close()
    for number in spread(counted.calls, LOADING_POINTS):
        factory = Factory()
        with FailingAllocation(number, SHRINKING[number % len(SHRINKING)]):
            running = guarded(factory, target(engine))
        assert running.counts == {"free": 1}
        assert len(factory.targets) == 2
        assert factory.alive == 1
        assert tokens(answer(running, request())) == calm
        running.close()
        del running
        assert factory.alive == 0


class _Always(FailingAllocation):
    """Raises from the n-th allocation on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls = min(self._at - 1, self.calls)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("trouble", SHRINKING)
def test_memory_that_never_comes_back_ends_in_a_typed_refusal(engine: str, trouble: Any) -> None:
    factory = Factory()
    running: GuardedEngine = guarded(factory, target(engine))
    running.submit(request())
    with _Always(40, trouble), pytest.raises(LadderExhaustedError) as refused:
        finish(running)
    assert refused.value.tried[0].startswith("free: taken")
    gc.collect()
    assert factory.alive == 0
    with pytest.raises(LadderExhaustedError):
        running.submit(request("b"))
    running.close()
