"""Times an engine over requests at once and context, and holds it against the machine's limits.

It knows the engine's interface and nothing of weights: prompts are random tokens, tokens are drawn
greedily. A decode figure is the median of the steps' times, a prompt's the median of its repeats.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Literal

import torch

from oomproof.engine.limits import Limits, measure_limits
from oomproof.engine.messages import Request, SamplingOptions, TokenEvent
from oomproof.engine.protocol import Engine
from oomproof.errors import InputError
from oomproof.formats import DType
from oomproof.memory.kv_cache import KV_FORMATS
from oomproof.memory.model import unit_of
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec, Role, TensorSpec
from oomproof.planning.plan import Plan
from oomproof.units import MIB

DECODE_TOKENS = 32
"""Tokens of a decode figure; the first few steps are not counted."""
_WARM_STEPS = 4
_PREFILL_REPEATS = 3
_SEED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """What is timed."""

    kind: Literal["decode", "prefill"]
    requests: int
    context: int
    """Tokens before the first timed one; of a prompt, its length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One figure."""

    point: Point
    tokens_per_second: float
    """All requests together."""
    limit: float | None = None
    """What the machine's measured bandwidth or arithmetic allows, None where it is not known."""

    @property
    def share(self) -> float | None:
        """Of the limit."""
        return None if self.limit is None else self.tokens_per_second / self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTimings:
    """One engine's figures."""

    engine: str
    format: str
    kv_format: str
    load_s: float
    load_bytes_per_s: float
    """Of the checkpoint's bytes; of weights that were made up, bytes made."""
    timings: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        for timing, values in zip(self.timings, plain["timings"], strict=True):
            values["share"] = timing.share
        return plain


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """Engines on one machine, one after the other in one process."""

    model: str
    devices: tuple[str, ...]
    limits: Limits
    """Measured before the first engine is loaded."""
    engines: tuple[EngineTimings, ...]

    def ratio(self, point: Point) -> float | None:
        """Our speed over the peer's at a point; None where there is no peer."""
        speeds = [
            timing.tokens_per_second
            for engine in self.engines
            for timing in engine.timings
            if timing.point == point
        ]
        return speeds[0] / speeds[1] if len(speeds) > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `bench --json`."""
        return {
            "model": self.model,
            "devices": list(self.devices),
            "limits": asdict(self.limits),
            "engines": [engine.as_dict() for engine in self.engines],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """An engine that is to be timed."""

    plan: Plan
    start: Callable[[], Engine]


def run_bench(
    contenders: Sequence[Contender],
    spec: ModelSpec,
    requests: Sequence[int],
    contexts: Sequence[int],
    told: Callable[[str, Timing], None] | None = None,
) -> BenchReport:
    """Times each engine at the same points; one is closed before the next begins.

    Args:
        contenders: Ours first.
        spec: Their model.
        requests: Requests at once.
        contexts: Tokens of context.
        told: Told of each figure, with the engine's name.

    Raises:
        InputError: As `check_points`, or the plan has no room for what is timed.
    """
    first = contenders[0].plan
    points = points_of(first, requests, contexts)
    used = first.devices_in_use
    device = torch.device(*(("cuda", used[0].index) if used[0].kind == "cuda" else ("cpu",)))
    # No engine is there yet: what one will take is free, however little it will leave.
    free = min(planned.usable_bytes - planned.terms.cuda_context for planned in used)
    limits = measure_limits(device, max(256 * MIB, free))
    checkpoint_bytes = spec.num_parameters * spec.dtype.itemsize
    if spec.checkpoint is not None:
        checkpoint_bytes = spec.checkpoint.total_bytes
    engines = []
    for contender in contenders:
        name = contender.plan.engine
        started = time.perf_counter()
        engine = contender.start()
        load_s = time.perf_counter() - started
        try:
            timings = time_points(engine, spec.vocab_size, points, partial(_tell, told, name))
        finally:
            engine.close()
        costs = Costs.of(spec, contender.plan)
        engines.append(
            EngineTimings(
                engine=name,
                format=contender.plan.format,
                kv_format=contender.plan.kv_format,
                load_s=load_s,
                load_bytes_per_s=checkpoint_bytes / load_s,
                timings=tuple(
                    replace(timing, limit=costs.limit(timing.point, limits)) for timing in timings
                ),
            )
        )
    return BenchReport(
        model=first.model,
        devices=tuple(planned.name for planned in used),
        limits=limits,
        engines=tuple(engines),
    )


def _tell(told: Callable[[str, Timing], None] | None, engine: str, timing: Timing) -> None:
    if told is not None:
        told(engine, timing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a step of a model must read or compute at least."""

    weight_bytes: int
    """Read once a decode step; of a mixture, the experts of one token."""
    kv_bytes_per_token: tuple[tuple[int, int | None], ...]
    """(bytes, window) of each layer: read once a decode step for each token of each request, and
    for no more of them than its sliding window."""
    flops_per_token: int
    """Of a prompt, attention aside."""

    @classmethod
    def of(cls, spec: ModelSpec, plan: Plan) -> Costs:
        """The costs of a plan: layers and head; one row of the embedding is nothing."""
        weight_format, compute = plan.weight_format, DType(plan.compute_dtype)
        roles = QUANTIZED_ROLES[plan.engine]
        itemsize = KV_FORMATS[plan.kv_format].itemsize
        added = 0 if plan.adapter is None else plan.adapter.num_parameters
        read = [
            tensor
            for tensor in spec.tensors
            if unit_of(tensor, spec) > 0
            or (spec.tie_word_embeddings and tensor.role is Role.EMBEDDING)
        ]
        return cls(
            weight_bytes=sum(
                _active(spec, tensor, stored(tensor, weight_format, compute, roles).stored_bytes)
                for tensor in read
            )
            + added * compute.itemsize,
            kv_bytes_per_token=tuple(
                (
                    layer.num_key_value_heads
                    * (layer.key_head_dim + layer.value_head_dim)
                    * itemsize,
                    layer.sliding_window,
                )
                for layer in spec.attention
            ),
            flops_per_token=2
            * sum(
                (
                    _active(spec, tensor, tensor.numel)
                    for tensor in read
                    if tensor.role in (Role.LINEAR, Role.EXPERTS)
                ),
                added,
            ),
        )

    def kv_bytes(self, tokens: float) -> float:
        """Keys and values that a decode step reads of a request that holds so many tokens."""
        return sum(
            each * (tokens if window is None else min(tokens, window))
            for each, window in self.kv_bytes_per_token
        )

    def limit(self, point: Point, limits: Limits) -> float:
        """Tokens a second that the machine allows at a point."""
        if point.kind == "prefill":
            return limits.matmul_flops_per_s / self.flops_per_token
        kv_bytes = self.kv_bytes(point.context + DECODE_TOKENS / 2)
        read = self.weight_bytes + point.requests * kv_bytes
        return point.requests * limits.read_bytes_per_s / read


def _active(spec: ModelSpec, tensor: TensorSpec, amount: int) -> int:
    """What one token needs of a parameter's bytes or elements."""
    if tensor.role is Role.EXPERTS:
        return amount * spec.num_experts_per_token // spec.num_experts
    return amount


def check_points(requests: Sequence[int], contexts: Sequence[int]) -> None:
    """Refuses what cannot be timed, whatever the plan.

    Raises:
        InputError: Nothing to time, or a number below 1.
    """
    for name, values in (("requests", requests), ("contexts", contexts)):
        if not values or min(values) < 1:
            raise InputError(
                f"{name} {list(values)[:8]} must be numbers from 1", remedy="give at least one"
            )


def points_of(plan: Plan, requests: Sequence[int], contexts: Sequence[int]) -> list[Point]:
    """What a plan has room for: prompts of each context, and decoding of each pair.

    Args:
        plan: Its context and concurrency are the bounds.
        requests: Requests at once to try.
        contexts: Tokens of context to try.

    Raises:
        InputError: As `check_points`, or the plan's context is shorter than what is timed.
    """
    check_points(requests, contexts)
    room = plan.context - DECODE_TOKENS
    if room < 1:
        raise InputError(
            f"a context of {plan.context} has no room for the {DECODE_TOKENS} tokens that are "
            "timed, and a prompt",
            remedy=f"use --context {2 * DECODE_TOKENS} or more",
        )
    lengths = sorted({min(length, room) for length in contexts})
    found = [Point(kind="prefill", requests=1, context=length) for length in lengths]
    found += [
        Point(kind="decode", requests=count, context=length)
        for length in lengths
        for count in sorted({min(count, plan.concurrency) for count in requests})
    ]
    return found


def time_points(
    engine: Engine,
    vocab_size: int,
    points: Sequence[Point],
    told: Callable[[Timing], None] | None = None,
) -> list[Timing]:
    """Times every point.

    Args:
        engine: Loaded and idle.
        vocab_size: Prompts are random tokens below it.
        points: Within what the engine has room for.
        told: Told of each figure.
    """
    chooser = random.Random(_SEED)  # noqa: S311 - prompts, not secrets
    timings = []
    for point in points:
        time_one = _time_decode if point.kind == "decode" else _time_prefill
        timing = Timing(point=point, tokens_per_second=time_one(engine, chooser, vocab_size, point))
        timings.append(timing)
        if told is not None:
            told(timing)
    return timings


def _time_decode(engine: Engine, chooser: random.Random, vocab_size: int, point: Point) -> float:
    _submit(engine, chooser, vocab_size, point, DECODE_TOKENS)
    begun: set[str] = set()
    while len(begun) < point.requests:
        begun |= {event.request_id for event in engine.step()}
    # A step counts that moved every request by a token; the end of a request is an event too.
    times = []
    while not engine.idle:
        started = time.perf_counter()
        events = engine.step()
        step_s = time.perf_counter() - started
        if sum(isinstance(event, TokenEvent) for event in events) == point.requests:
            times.append(step_s)
    return point.requests / median(times[_WARM_STEPS:] or times)


def _time_prefill(engine: Engine, chooser: random.Random, vocab_size: int, point: Point) -> float:
    times = []
    for _ in range(1 + _PREFILL_REPEATS):
        _submit(engine, chooser, vocab_size, point, 1)
        started = time.perf_counter()
        while not engine.idle:
            engine.step()
        times.append(time.perf_counter() - started)
    return point.requests * point.context / median(times[1:])


def _submit(
    engine: Engine, chooser: random.Random, vocab_size: int, point: Point, new_tokens: int
) -> None:
    for number in range(point.requests):
        engine.submit(
            Request(
                id=f"bench-{number}",
                prompt_tokens=tuple(chooser.randrange(vocab_size) for _ in range(point.context)),
                max_new_tokens=new_tokens,
                sampling=SamplingOptions(temperature=0),
            )
        )
