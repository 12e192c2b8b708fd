"""What a bench times, and what it is held against."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oomproof import measuring, session
from oomproof.engine import bench as bench_module
from oomproof.engine.bench import (
    DECODE_TOKENS,
    BenchReport,
    Contender,
    Costs,
    Point,
    Timing,
    points_of,
    run_bench,
    time_points,
)
from oomproof.engine.limits import Limits, measure_limits
from oomproof.engine.messages import Event, FinishedEvent, Request, TokenEvent
from oomproof.errors import InputError, NotRunnableError, PlanDoesNotFitError
from oomproof.formats import DType, get_format
from oomproof.hardware.describe import describe
from oomproof.memory.model import Demand, MemoryModel, WeightCosts
from oomproof.memory.profiles import engine_profile
from oomproof.memory.terms import DeviceTerms
from oomproof.models.resolve import resolve
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.units import MIB
from tests.compat.checkpoints import copy_of_tiny, edit_json
from tests.models.configs import SMALL_CONFIGS, spec_of

LIMITS = Limits(read_bytes_per_s=1e9, matmul_flops_per_s=1e12, host_link_bytes_per_s=None)


def planned(spec: ModelSpec, **options: Any) -> Plan:
    return make_plan(spec, describe("H200"), PlanRequest(**options))


@pytest.fixture
def plan() -> Plan:
    return session.plan("tiny", format="bf16", context=128, concurrency=4)


# --- what is timed


def test_points_are_prompts_of_each_context_and_decoding_of_each_pair(plan: Plan) -> None:
    assert [(p.kind, p.requests, p.context) for p in points_of(plan, [1, 4], [64, 16])] == [
        ("prefill", 1, 16),
        ("prefill", 1, 64),
        ("decode", 1, 16),
        ("decode", 4, 16),
        ("decode", 1, 64),
        ("decode", 4, 64),
    ]


def test_more_than_the_plan_has_room_for_counts_once_as_what_it_has(plan: Plan) -> None:
    found = points_of(plan, [2, 9, 100], [10**6, 128, 96])
    assert {p.context for p in found} == {128 - DECODE_TOKENS}
    assert [p.requests for p in found if p.kind == "decode"] == [2, 4]
    assert len(found) == len(set(found)) == 3


@pytest.mark.parametrize(("requests", "contexts"), [([], [1]), ([1], []), ([0], [1]), ([1], [-4])])
def test_nothing_to_time_is_refused(plan: Plan, requests: list[int], contexts: list[int]) -> None:
    with pytest.raises(InputError, match="must be numbers from 1"):
        points_of(plan, requests, contexts)
    with pytest.raises(InputError, match="must be numbers from 1"):
        session.bench("tiny", requests=requests, contexts=contexts)


def test_a_context_without_room_for_an_answer_is_refused(plan: Plan) -> None:
    tight = replace(plan, context=DECODE_TOKENS)
    with pytest.raises(InputError, match=r"has no room for the 32 tokens .*use --context 64"):
        points_of(tight, [1], [16])
    assert {p.context for p in points_of(replace(plan, context=DECODE_TOKENS + 1), [1], [16])} == {
        1
    }


# --- what it is held against


@pytest.mark.parametrize("name", ["tiny", "llama-3.1-8b", "llama-3.2-1b", "qwen3-8b"])
@pytest.mark.parametrize("format_name", ["bf16", "int8", "nf4-dq"])
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_step_reads_the_weights_that_the_memory_model_stores_but_for_the_embedding(
    name: str, format_name: str, engine: str
) -> None:
    if (engine, format_name) == ("transformers", "int8"):
        format_name = "llm-int8"
    spec = resolve(name)
    made = planned(spec, format=format_name, engine=engine, context=512)
    machine = describe("H200")
    profile = engine_profile(engine, machine.devices[0], machine.host)
    costs = WeightCosts(spec, get_format(format_name), profile, DType(made.compute_dtype))
    demand = Demand(context=512, concurrency=1, kv_dtype=DType.BFLOAT16)
    stored_bytes = MemoryModel(costs, demand).weights_bytes(0 if spec.tie_word_embeddings else 1)
    # The memory model rounds each of a parameter's tensors up to the allocator's granularity.
    rounding = 6 * len(spec.tensors) * profile.alignment_bytes + profile.buffer_bytes
    assert 0 <= stored_bytes - Costs.of(spec, made).weight_bytes <= rounding


def test_a_tied_head_is_read_and_an_embedding_of_its_own_is_not() -> None:
    tied, untied = resolve("llama-3.2-1b"), resolve("llama-3.1-8b")
    for spec in (tied, untied):
        costs = Costs.of(spec, planned(spec, format="bf16"))
        embedding = sum(t.numel for t in spec.tensors if t.role is Role.EMBEDDING)
        expected = spec.num_parameters - (0 if spec.tie_word_embeddings else embedding)
        assert costs.weight_bytes == 2 * expected


@pytest.mark.parametrize(("kv_format", "itemsize"), [("bf16", 2), ("fp8", 1)])
def test_keys_and_values_of_every_layer_are_read(kv_format: str, itemsize: int) -> None:
    spec = resolve("llama-3.1-8b")
    costs = Costs.of(spec, planned(spec, format="bf16", kv_format=kv_format))
    assert costs.kv_bytes(1) == 32 * 8 * 2 * 128 * itemsize
    assert costs.kv_bytes(1000) == 1000 * costs.kv_bytes(1)


def test_a_sliding_window_is_all_that_its_layer_reads() -> None:
    spec = spec_of(SMALL_CONFIGS["gemma2"])
    costs = Costs.of(spec, planned(spec, format="bf16"))
    windows = [layer.sliding_window for layer in spec.attention]
    window = max(each or 0 for each in windows)
    assert 0 < window < 10**6
    grown = costs.kv_bytes(10**6 + 1) - costs.kv_bytes(10**6)
    assert grown == costs.kv_bytes(1) * windows.count(None) / len(windows)


def test_of_a_mixture_one_token_needs_its_own_experts_alone() -> None:
    spec = resolve("mixtral-8x7b")
    costs = Costs.of(spec, planned(spec, format="bf16"))
    # 12.9 B of 46.7 B parameters are active; the embedding is 0.13 B of them.
    assert costs.weight_bytes == pytest.approx(2 * 12.75e9, rel=0.01)
    assert costs.flops_per_token == pytest.approx(costs.weight_bytes, rel=0.02)


def test_limits_follow_from_bytes_and_arithmetic() -> None:
    costs = Costs(
        weight_bytes=1_000_000, kv_bytes_per_token=((100, None), (100, 50)), flops_per_token=2000
    )
    assert costs.limit(Point(kind="prefill", requests=1, context=9), LIMITS) == 1e12 / 2000
    context = 1000 - DECODE_TOKENS // 2
    kv_bytes = 100 * 1000 + 100 * 50
    for requests in (1, 8):
        point = Point(kind="decode", requests=requests, context=context)
        read = 1_000_000 + requests * kv_bytes
        assert costs.limit(point, LIMITS) == pytest.approx(requests * 1e9 / read)


def test_the_machine_is_measured_in_the_memory_that_is_free() -> None:
    found = measure_limits(torch.device("cpu"), 8 * MIB)
    assert found.read_bytes_per_s > 1e8
    assert found.matmul_flops_per_s > 1e8
    assert found.host_link_bytes_per_s is None


def test_a_plan_that_fills_the_device_is_measured_in_what_it_will_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def listen(_device: torch.device, free_bytes: int) -> Limits:
        asked.append(free_bytes)
        raise StopIteration

    monkeypatch.setattr(bench_module, "measure_limits", listen)
    made = session.plan("llama-3.1-8b", gpus="10GiB", format="fit")
    [device] = made.devices
    assert device.usable_bytes - device.peak_bytes < 64 * MIB
    contender = Contender(plan=made, start=lambda: pytest.fail("nothing is started"))
    with pytest.raises(StopIteration):
        run_bench([contender], resolve("llama-3.1-8b"), [1], [16])
    assert asked == [device.usable_bytes - device.terms.cuda_context]


# --- timing


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeEngine:
    """Takes the next of its step times for each step; a prompt takes one step."""

    def __init__(self, clock: Clock, step_s: Sequence[float]) -> None:
        self.clock, self.step_s = clock, list(step_s)
        self.active: dict[str, tuple[Request, int]] = {}
        self.submitted: list[Request] = []
        self.closed = False

    def submit(self, request: Request) -> None:
        self.submitted.append(request)
        self.active[request.id] = (request, 0)

    def cancel(self, request_id: str) -> None:
        del self.active[request_id]

    def step(self) -> Sequence[Event]:
        self.clock.now += self.step_s.pop(0)
        events: list[Event] = []
        for request, made in list(self.active.values()):
            events.append(TokenEvent(request_id=request.id, token=1))
            self.active[request.id] = (request, made + 1)
            if made + 1 == request.max_new_tokens:
                del self.active[request.id]
                events.append(
                    FinishedEvent(
                        request_id=request.id,
                        reason="length",
                        prompt_tokens=len(request.prompt_tokens),
                        new_tokens=made + 1,
                    )
                )
        return events

    @property
    def idle(self) -> bool:
        return not self.active

    def measured_terms(self) -> Mapping[int, DeviceTerms]:
        return {}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(bench_module, "time", found)
    return found


def test_a_decode_figure_is_the_median_step_after_the_first_few(clock: Clock) -> None:
    warm = [9.0] * 4
    steady = [1.0] * 13 + [2.0] + [5.0] * 13
    engine = FakeEngine(clock, [100.0, *warm, *steady])
    [timing] = time_points(engine, 50, [Point(kind="decode", requests=3, context=7)])
    assert timing.tokens_per_second == 3 / 2.0
    assert engine.step_s == []
    assert [len(request.prompt_tokens) for request in engine.submitted] == [7, 7, 7]
    assert all(token < 50 for request in engine.submitted for token in request.prompt_tokens)


def test_steps_that_do_not_move_every_request_are_not_counted(clock: Clock) -> None:
    class Straggling(FakeEngine):
        """One request ends early: its last token and its end are two events, of one request."""

        def submit(self, request: Request) -> None:
            shorter = DECODE_TOKENS - 8 if request.id.endswith("0") else DECODE_TOKENS
            super().submit(replace(request, max_new_tokens=shorter))

    engine = Straggling(clock, [100.0, *[1.0] * (DECODE_TOKENS - 9), *[50.0] * 8])
    [timing] = time_points(engine, 50, [Point(kind="decode", requests=2, context=7)])
    assert timing.tokens_per_second == 2.0


def test_a_prompt_figure_is_the_median_of_its_repeats_but_the_first(clock: Clock) -> None:
    told: list[Timing] = []
    engine = FakeEngine(clock, [100.0, 1.0, 4.0, 2.0])
    point = Point(kind="prefill", requests=1, context=60)
    [timing] = time_points(engine, 50, [point], told.append)
    assert timing.tokens_per_second == 60 / 2.0
    assert told == [timing]
    assert len({request.prompt_tokens for request in engine.submitted}) == 4


def test_engines_are_timed_in_turn_and_each_is_closed(clock: Clock, plan: Plan) -> None:
    started: list[FakeEngine] = []

    def start(step_s: float) -> FakeEngine:
        assert all(engine.closed for engine in started)
        clock.now += 10.0
        started.append(FakeEngine(clock, [step_s] * 200))
        return started[-1]

    spec = resolve("tiny")
    told: list[tuple[str, Point]] = []
    report = run_bench(
        [
            Contender(plan=plan, start=lambda: start(0.5)),
            Contender(plan=replace(plan, engine="transformers"), start=lambda: start(1.0)),
        ],
        spec,
        [1, 2],
        [16],
        told=lambda engine, timing: told.append((engine, timing.point)),
    )
    points = points_of(plan, [1, 2], [16])
    assert told == [(name, point) for name in ("native", "transformers") for point in points]
    assert [report.ratio(point) for point in points] == [2.0] * 3
    assert report.ratio(Point(kind="decode", requests=99, context=1)) is None
    assert [engine.load_s for engine in report.engines] == [10.0, 10.0]
    assert spec.checkpoint is not None
    expected = spec.checkpoint.total_bytes / 10
    assert [engine.load_bytes_per_s for engine in report.engines] == [expected] * 2
    assert all(engine.closed for engine in started)
    assert BenchReport.as_dict(report)["engines"][0]["timings"][0]["point"]["kind"] == "prefill"


def test_an_engine_that_fails_is_closed(clock: Clock, plan: Plan) -> None:
    engine = FakeEngine(clock, [])
    with pytest.raises(IndexError):
        run_bench([Contender(plan=plan, start=lambda: engine)], resolve("tiny"), [1], [16])
    assert engine.closed


# --- the session's part: which engines, and from what


def refused_peer(**changes: Any) -> Any:
    """`session.plan`, whose plans for transformers come out otherwise."""
    make = session.plan

    def plan_otherwise(model: str | Path, **options: Any) -> Plan:
        made = make(model, **options)
        return replace(made, **changes) if made.engine == "transformers" else made

    return plan_otherwise


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"runnable": False, "not_runnable": "it has no wheels"},
            NotRunnableError,
            "transformers, to be compared with, does not run tiny in bf16: it has no wheels: leave",
        ),
        (
            {"fits": False, "shortfall_bytes": 3 * MIB},
            PlanDoesNotFitError,
            "transformers, to be compared with, has no room for tiny in bf16.*3.00 MiB missing",
        ),
    ],
)
def test_a_peer_that_cannot_take_part_is_named_before_anything_is_started(
    changes: dict[str, Any],
    error: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "plan", refused_peer(**changes))
    monkeypatch.setattr(bench_module, "measure_limits", None)
    with pytest.raises(error, match=said):
        session.bench("tiny", format="bf16", against="transformers", context=64)


def test_a_peer_gets_the_plan_that_was_made_already_with_its_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Contender] = []

    def listen(contenders: Sequence[Contender], *_arguments: Any, **_options: Any) -> None:
        found.extend(contenders)

    monkeypatch.setattr(bench_module, "run_bench", listen)
    made = session.plan("tiny", format="bf16", context=128, concurrency=3, cap="1GiB")
    session.bench(made, against="transformers")
    ours, peer = (contender.plan for contender in found)
    assert ours == made
    assert (peer.engine, peer.format, peer.context, peer.concurrency) == (
        "transformers",
        "bf16",
        128,
        3,
    )
    assert peer.devices[0].limit_bytes == made.devices[0].limit_bytes


_LISTENING = """
import sys
from oomproof import session
from oomproof.engine import bench

def listen(contenders, *_arguments, **_options):
    for contender in contenders:
        before = set(sys.modules)
        contender.start().close()
        print(contender.plan.engine, *sorted(set(sys.modules) - before))

bench.run_bench = listen
session.bench("tiny", format="bf16", context=64, against="transformers", random_weights={made_up})
"""


@pytest.mark.parametrize("made_up", [False, True])
def test_what_the_engines_need_is_imported_before_they_are_timed(made_up: bool) -> None:
    """In a process of its own, where nothing has been imported yet."""
    script = _LISTENING.format(made_up=made_up)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["native", "transformers"]


def test_random_weights_are_not_made_for_a_checkpoint_that_is_quantized_already(
    tmp_path: Path,
) -> None:
    folder = copy_of_tiny(tmp_path / "model")
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_json(folder / "config.json", quantization_config=settings)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    with pytest.raises(NotRunnableError, match="bench its 16-bit model with --format int8"):
        session.bench(folder, random_weights=True)
