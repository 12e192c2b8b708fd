"""Guarded engines of the bundled model, whose failures are made up."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oomproof.compat.engine import TransformersEngine
from oomproof.compat.measure import MemoryMeter
from oomproof.compat.model import load_model
from oomproof.engine.messages import Event, FinishedEvent, Request, SamplingOptions, TokenEvent
from oomproof.engine.protocol import Engine
from oomproof.guarding.engine import GuardedEngine
from oomproof.guarding.machine import Machine
from oomproof.guarding.situation import Target
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import Hardware
from oomproof.models.resolve import bundled_folder, resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.session import plan
from oomproof.starting import Contract, start_engine

PROMPT = tuple(range(40, 56))
GREEDY = SamplingOptions(temperature=0)
Trouble = Callable[[], Exception]


def accelerator_error(code: int, text: str) -> Exception:
    error: Any = torch.AcceleratorError(f"CUDA error: {text}")
    error.error_code = code
    return error  # type: ignore[no-any-return]


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.64 GiB "
        "of which 12.00 MiB is free."
    )


SHRINKING: tuple[Trouble, ...] = (
    out_of_memory,
    lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 8.00 GiB total)"),
    lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    lambda: accelerator_error(2, "out of memory"),
    MemoryError,
)


@cache
def tiny() -> ModelSpec:
    return with_checkpoint(resolve("tiny"))


@cache
def target(engine: str = "native", concurrency: int = 2, context: int = 256) -> Target:
    format_name = "fp32" if engine == "native" else "bf16"
    made = plan("tiny", engine=engine, format=format_name, context=context, concurrency=concurrency)
    return Target(plan=made, spec=tiny())


@cache
def exact_model() -> Any:
    """The bundled model in float32, where the order of additions cannot change a token."""
    return load_model(target("transformers").plan, tiny(), bundled_folder()).float()


@dataclass
class Factory:
    """Starts engines; `troubles` are raised by the first starts, None lets one pass."""

    troubles: list[Exception | None] = field(default_factory=list)
    started: list[weakref.ref[Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def __call__(self, target: Target, hardware: Hardware) -> Engine:
        self.targets.append(target)
        if self.troubles and (trouble := self.troubles.pop(0)) is not None:
            raise trouble
        engine: Any
        if target.plan.engine == "native":
            contract = Contract(plan=target.plan, spec=target.spec, hardware=hardware)
            engine = start_engine(contract, bundled_folder())
        else:
            meter = MemoryMeter(target.plan, hardware)
            engine = TransformersEngine(exact_model(), target.plan, target.spec, meter)
        self.started.append(weakref.ref(engine))
        return engine  # type: ignore[no-any-return]

    @property
    def alive(self) -> int:
        return sum(one() is not None for one in self.started)


def guarded(factory: Factory, first: Target | None = None, **options: Any) -> GuardedEngine:
    options.setdefault("machine", Machine(sleep=lambda _seconds: None, keep=lambda *_: None))
    options.setdefault("on_event", lambda _event: None)
    return GuardedEngine(first or target(), factory, hardware=probe(), **options)


def request(name: str = "a", **changes: Any) -> Request:
    values: dict[str, Any] = {
        "id": name,
        "prompt_tokens": PROMPT,
        "max_new_tokens": 8,
        "sampling": GREEDY,
        **changes,
    }
    return Request(**values)


def finish(engine: Engine) -> list[Event]:
    """Every event until the engine is idle."""
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    return events


def answer(engine: Engine, *requests: Request) -> list[Event]:
    for one in requests:
        engine.submit(one)
    return finish(engine)


def tokens(events: Sequence[Event], name: str = "a") -> list[int]:
    return [e.token for e in events if isinstance(e, TokenEvent) and e.request_id == name]


def ends(events: Sequence[Event]) -> dict[str, tuple[str, int, int]]:
    return {
        e.request_id: (e.reason, e.prompt_tokens, e.new_tokens)
        for e in events
        if isinstance(e, FinishedEvent)
    }


class FailingCall:
    """Lets an engine's method raise at its n-th call, counted over all engines; then never again.

    Args:
        patch: pytest's monkeypatch.
        owner: The class.
        name: The method.
        troubles: Number of the call, from 1 → what it raises.
    """

    def __init__(self, patch: Any, owner: type, name: str, troubles: dict[int, Trouble]) -> None:
        self.calls = 0
        original = getattr(owner, name)

        def call(engine: Any, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls in troubles:
                trouble = troubles[self.calls]
                raise trouble()
            return original(engine, *arguments, **options)

        patch.setattr(owner, name, call)


class FailingAllocation(TorchDispatchMode):
    """Raises at the n-th operator that computes anything, and so allocates its result, a workspace
    or scratch of its kernel; 0 only counts them."""

    def __init__(self, at: int, trouble: Trouble = out_of_memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._at, self._trouble = at, trouble
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        is_view = bool(returns) and all(
            one.alias_info is not None and not one.alias_info.is_write for one in returns
        )
        if not is_view:
            self.calls += 1
            if self.calls == self._at:
                raise self._trouble()
        return func(*args, **(kwargs or {}))
