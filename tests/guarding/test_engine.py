"""The guarded engine: answers go on where they were, or end with a typed error; nothing is kept."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import oomproof
import oomproof.compat.engine as compat_engine
from oomproof.compat.engine import TransformersEngine
from oomproof.engine.messages import SamplingOptions, TokenEvent
from oomproof.engine.native.engine import NativeEngine
from oomproof.errors import (
    EngineFaultError,
    LadderExhaustedError,
    LoadError,
    PlanDoesNotFitError,
    RequestError,
)
from oomproof.faults.fault import FaultClass
from oomproof.guarding.engine import GuardedEngine, arithmetic_of
from oomproof.guarding.ladder import LadderEvent
from oomproof.guarding.machine import Machine
from oomproof.hardware.holders import Holder
from oomproof.planning.plan import Plan
from tests.guarding.engines import (
    GREEDY,
    PROMPT,
    Factory,
    FailingCall,
    accelerator_error,
    answer,
    ends,
    finish,
    guarded,
    out_of_memory,
    request,
    target,
    tokens,
)

ENGINES = {"native": NativeEngine, "transformers": TransformersEngine}
SAMPLED = SamplingOptions(
    temperature=1.3,
    top_p=0.95,
    repetition_penalty=1.2,
    presence_penalty=0.7,
    frequency_penalty=0.9,
    seed=17,
    logprobs=3,
)
FATAL = (700, 702, 710, *range(714, 720), 999)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compat_engine, "KV_FORMATS", {"bf16": "float32"})
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def without_figures() -> Exception:
    return RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    )


def failing(
    patch: pytest.MonkeyPatch, *calls: int, engine: str = "native", trouble: Any = out_of_memory
) -> FailingCall:
    return FailingCall(patch, ENGINES[engine], "step", dict.fromkeys(calls, trouble))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SAMPLED, replace(SAMPLED, repetition_penalty=1.0), SamplingOptions(seed=3)],
    ids=["greedy", "penalties", "no repetition penalty", "seed"],
)
def test_an_answer_goes_on_as_if_nothing_had_happened(
    monkeypatch: pytest.MonkeyPatch, engine: str, sampling: SamplingOptions
) -> None:
    asked = request(sampling=sampling, max_new_tokens=12)
    running = guarded(Factory(), target(engine))
    calm = answer(running, asked)
    failing(monkeypatch, 5, 14, engine=engine)
    events = answer(running, asked)
    assert running.counts == {"free": 1}
    assert tokens(events) == tokens(calm)
    assert ends(events) == ends(calm) == {"a": ("length", len(PROMPT), 12)}
    for one, other in zip(events, calm, strict=True):
        if isinstance(one, TokenEvent) and isinstance(other, TokenEvent) and one.logprob:
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [t for t, _ in one.top_logprobs] == [t for t, _ in other.top_logprobs]
    again = answer(running, asked)
    assert tokens(again) == tokens(calm)
    assert running.counts == {"free": 2}
    running.close()


def test_an_answer_without_a_seed_keeps_the_one_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("oomproof.guarding.journal.secrets.randbits", lambda _bits: 17)
    running = guarded(Factory())
    calm = answer(running, request(sampling=SamplingOptions(seed=17)))
    failing(monkeypatch, 4)
    assert tokens(answer(running, request(sampling=SamplingOptions()))) == tokens(calm)


@pytest.mark.parametrize(
    ("allowed", "calls", "replayed"),
    [((), (4,), [False, True]), (("kv8",), (4, 8), [False, True, False])],
    ids=["the same plan", "another KV format"],
)
def test_an_answer_is_replayed_while_nothing_that_decides_its_bits_has_changed(
    monkeypatch: pytest.MonkeyPatch,
    allowed: tuple[str, ...],
    calls: tuple[int, ...],
    replayed: list[bool],
) -> None:
    def as_on_a_gpu(plan: Plan) -> tuple[str, ...]:
        return (plan.format, plan.kv_format)

    monkeypatch.setattr("oomproof.guarding.engine.arithmetic_of", as_on_a_gpu)
    seen: list[bool] = []
    submit = NativeEngine.submit

    def noted(self: NativeEngine, one: Any) -> None:
        seen.append(one.replays)
        submit(self, one)

    monkeypatch.setattr(NativeEngine, "submit", noted)
    running = guarded(Factory(), allowed=allowed)
    calm = answer(running, request())
    seen.clear()
    failing(monkeypatch, *calls, trouble=without_figures)
    events = answer(running, request())
    assert seen == replayed
    assert len(tokens(events)) == len(tokens(calm))
    if not allowed:
        assert tokens(events) == tokens(calm)
    running.close()


def test_only_our_own_engine_on_gpus_replays() -> None:
    on_gpu = oomproof.plan("llama-3.1-8b", gpus="24GiB", format="nf4-dq", context=1024)
    assert on_gpu.engine == "native"
    assert arithmetic_of(on_gpu) == arithmetic_of(replace(on_gpu, context=512)) != ()
    assert arithmetic_of(replace(on_gpu, kv_format="fp8")) != arithmetic_of(on_gpu)
    streamed = oomproof.plan(
        "llama-3.1-8b", gpus="12GiB", format="bf16", context=1024, offload="cpu", engine="native"
    )
    assert streamed.devices_in_use[0].streamed_layers is not None
    others = [streamed, replace(on_gpu, engine="transformers"), target().plan]
    assert [arithmetic_of(one) for one in others] == [()] * 3


def test_two_answers_at_once_go_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    both = request("a"), request("b", sampling=SAMPLED, prompt_tokens=PROMPT[:9], max_new_tokens=11)
    running = guarded(Factory())
    calm = answer(running, *both)
    failing(monkeypatch, 4)
    events = answer(running, *both)
    assert tokens(events, "a") == tokens(calm, "a")
    assert tokens(events, "b") == tokens(calm, "b")
    assert ends(events) == ends(calm)


def test_a_second_failure_takes_the_next_rung_which_lets_requests_in_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = request("a"), request("b", prompt_tokens=PROMPT[:9])
    running = guarded(Factory())
    calm = answer(running, *both)
    failing(monkeypatch, 3, 4)
    for one in both:
        running.submit(one)
    events = [*running.step(), *running.step()]
    assert running.step() == []
    assert running.counts == {"free": 1}
    assert running.step() == []
    assert running.counts == {"free": 1, "queue": 1}
    later = finish(running)
    first = [e.request_id for e in later]
    assert first == sorted(first)
    assert tokens([*events, *later], "a") == tokens(calm, "a")
    assert tokens([*events, *later], "b") == tokens(calm, "b")


def test_a_rung_that_the_user_allowed_follows_and_its_plan_is_the_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    factory = Factory()
    running = guarded(factory, allowed=("batch", "kv8"), on_event=told.append)
    failing(monkeypatch, 3, 4, 5, trouble=without_figures)
    events = answer(running, request())
    assert ends(events) == {"a": ("length", len(PROMPT), 8)}
    assert running.counts == {"free": 1, "batch": 1, "kv8": 1}
    assert (running.plan.concurrency, running.plan.kv_format) == (1, "fp8")
    assert [event.rung for event in told] == ["free", "batch", "kv8"]
    assert "CUBLAS_STATUS_ALLOC_FAILED" in told[1].message
    assert "costs room: fewer requests at once" in told[1].message
    assert "frees 0.65 MiB of the plan" in told[1].message
    assert "1 at once" in told[1].message
    assert told[2].plan == running.plan


def test_running_requests_keep_the_context_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    running = guarded(Factory(), target(context=600), allowed=("context",))
    failing(monkeypatch, 3, 4, trouble=without_figures)
    long = request(max_new_tokens=200)
    events = answer(running, long)
    assert ends(events)["a"][0] == "length"
    assert running.counts == {"free": 1, "context": 1}
    assert len(PROMPT) + 200 <= running.plan.context < 600
    with pytest.raises(RequestError, match="planned context"):
        running.submit(request("b", max_new_tokens=580))


def test_a_rung_that_does_not_free_what_was_missing_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = guarded(Factory(), allowed=("batch", "format"))
    failing(monkeypatch, 3, 4)
    events = answer(running, request())
    assert ends(events)["a"][0] == "length"
    assert running.counts == {"free": 1, "format": 1}
    assert running.plan.format == "bf16"


def test_when_nothing_is_left_the_error_says_what_was_tried_and_what_would_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factory = Factory()
    running = guarded(factory, allowed=("batch",))
    failing(monkeypatch, 3, 4, 5, trouble=without_figures)
    running.submit(request())
    with pytest.raises(LadderExhaustedError) as refused:
        finish(running)
    said = str(refused.value)
    assert "free: taken, and it failed again" in said
    assert "wait: nothing to wait for" in said
    assert "queue: no two requests are running" in said
    assert "batch: taken, and it failed again" in said
    assert "--fallback batch,kv8 would go on, or start it as `oomproof run tiny" in said
    assert "--kv-format fp8" in said
    assert refused.value.exit_code == 3
    assert refused.value.fault.fault_class is FaultClass.SHRINK
    assert refused.value.__context__ is None
    assert refused.value.__cause__ is None
    again = pickle.loads(pickle.dumps(refused.value))
    assert (str(again), again.fault, again.tried) == (
        said,
        refused.value.fault,
        refused.value.tried,
    )
    assert running.idle
    for call in (running.step, lambda: running.submit(request("b")), running.measured_terms):
        with pytest.raises(LadderExhaustedError):
            call()
    running.close()
    gc.collect()
    assert factory.alive == 0


@pytest.mark.parametrize("code", FATAL)
def test_what_is_fatal_for_the_process_is_never_tried_again(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    factory = Factory()
    running = guarded(factory, allowed=("batch", "kv8"))
    fatal = failing(monkeypatch, 3, trouble=lambda: accelerator_error(code, "it broke"))
    running.submit(request("a"))
    running.submit(request("b"))
    running.step()
    running.step()
    monkeypatch.setattr(NativeEngine, "close", lambda _engine: pytest.fail("CUDA was called"))
    with pytest.raises(EngineFaultError, match="start a fresh one") as ended:
        running.step()
    assert ended.value.request_ids == ("a", "b")
    assert ended.value.fault.evidence.code == code
    assert pickle.loads(pickle.dumps(ended.value)).fault == ended.value.fault
    for call in (running.step, lambda: running.submit(request("c")), running.measured_terms):
        with pytest.raises(EngineFaultError):
            call()
    gc.collect()
    # Its tensors' destructors would call CUDA: that is left to whoever closes it, or exits instead.
    assert factory.alive == 1
    running.close()
    assert (fatal.calls, len(factory.started), dict(running.counts)) == (3, 1, {})
    gc.collect()
    assert factory.alive == 0


def test_what_is_fatal_while_loading_is_told_at_once() -> None:
    factory = Factory(troubles=[accelerator_error(700, "illegal memory access")])
    with pytest.raises(EngineFaultError):
        guarded(factory)
    assert len(factory.targets) == 1


def test_a_failure_that_turns_fatal_on_closing_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = Factory()
    running = guarded(factory)
    failing(monkeypatch, 2)

    def close(_engine: NativeEngine) -> None:
        raise accelerator_error(719, "unspecified launch failure")

    monkeypatch.setattr(NativeEngine, "close", close)
    running.submit(request())
    with pytest.raises(EngineFaultError):
        finish(running)
    assert len(factory.started) == 1


@pytest.mark.parametrize(
    "trouble", [LoadError("no"), ValueError("a bug"), RequestError("wrong"), KeyError("x")], ids=str
)
def test_what_is_no_fault_of_memory_or_device_is_raised_as_it_is(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    with pytest.raises(type(trouble)) as raised:
        guarded(Factory(troubles=[trouble]))
    assert raised.value is trouble
    running = guarded(Factory())
    failing(monkeypatch, 2, trouble=lambda: trouble)
    running.submit(request())
    with pytest.raises(type(trouble)) as raised:
        finish(running)
    assert raised.value is trouble
    assert ends(finish(running))["a"][0] == "length"


def test_a_request_that_can_never_fit_is_refused_and_forgotten() -> None:
    running = guarded(Factory())
    with pytest.raises(RequestError, match="ask for at most 240 new tokens"):
        running.submit(request(max_new_tokens=241))
    with pytest.raises(RequestError, match="vocabulary"):
        running.submit(request(prompt_tokens=(10**6,)))
    assert running.idle
    assert ends(answer(running, request(max_new_tokens=240)))["a"] == ("length", len(PROMPT), 240)


def test_a_request_cancelled_during_a_recovery_ends_with_what_it_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holder: list[GuardedEngine] = []
    running = guarded(Factory(), on_event=lambda _event: holder[0].cancel("a"))
    holder.append(running)
    calm = answer(running, request("b"))
    failing(monkeypatch, 4)
    events = answer(running, request("a"), request("b"))
    assert len(tokens(events, "a")) == 3
    assert ends(events)["a"] == ("cancelled", len(PROMPT), 3)
    assert tokens(events, "b") == tokens(calm, "b")


def test_cancelling_goes_through_and_unknown_requests_are_ignored() -> None:
    running = guarded(Factory())
    running.submit(request())
    running.step()
    running.cancel("nobody")
    running.cancel("a")
    assert ends(finish(running)) == {"a": ("cancelled", len(PROMPT), 1)}


def test_an_interrupted_recovery_is_taken_up_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = guarded(Factory())
    calm = answer(running, request())

    def interrupt(_event: LadderEvent) -> None:
        monkeypatch.setattr(running, "_on_event", None)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "_on_event", interrupt)
    failing(monkeypatch, 4)
    running.submit(request())
    events = [*running.step(), *running.step(), *running.step()]
    with pytest.raises(KeyboardInterrupt):
        running.step()
    events += finish(running)
    assert tokens(events) == tokens(calm)


def test_measuring_recovers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = Factory()
    running = guarded(factory)
    FailingCall(monkeypatch, NativeEngine, "measured_terms", {1: out_of_memory})
    assert running.measured_terms()[0].weights > 0
    assert (len(factory.started), running.counts) == (2, {"free": 1})


def test_closing_meets_a_fatal_failure_as_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    running = guarded(Factory())
    close = NativeEngine.close
    FailingCall(monkeypatch, NativeEngine, "close", {1: lambda: accelerator_error(700, "broken")})
    assert close is not NativeEngine.close
    with pytest.raises(EngineFaultError):
        running.close()
    running.close()


HELD = Holder(device=0, pid=4321, name="python", used_bytes=5 * 2**30)


def waiting(free: list[int], slept: list[float]) -> Machine:
    """A machine whose memory comes back: free bytes, measurement by measurement."""
    calm = Machine()

    def measure(plan: Any) -> Any:
        hardware = calm.measure(plan)
        free_bytes = free.pop(0) if len(free) > 1 else free[0]
        devices = tuple(replace(one, free_bytes=free_bytes) for one in hardware.devices)
        return replace(hardware, devices=devices)

    return Machine(measure=measure, holders=lambda _plan: (HELD,), sleep=slept.append)


def taken() -> Exception:
    return PlanDoesNotFitError("GPU 0 has 1 GiB free now", shortfall_bytes=2**30, remedy="free it")


def test_memory_that_another_process_holds_is_waited_for() -> None:
    told: list[str] = []
    slept: list[float] = []
    factory = Factory(troubles=[taken()])
    running = guarded(
        factory,
        machine=waiting([0, 0, 0, 2**40], slept),
        on_event=lambda event: told.append(event.message),
    )
    assert running.counts == {"wait": 1}
    assert 1 <= len(slept) <= 3
    assert any("python (pid 4321) holds 5.00 GiB of GPU 0" in text for text in told)
    assert answer(running, request())


def test_waiting_is_bounded_and_then_the_next_rung_is_taken_or_none() -> None:
    slept: list[float] = []
    with pytest.raises(LadderExhaustedError, match="wait: taken, and it failed again") as refused:
        guarded(Factory(), target(), machine=waiting([0], slept), **{"failure": None} | _taken())
    assert isinstance(refused.value, PlanDoesNotFitError)
    assert sum(slept) <= 60 * 4
    assert len(slept) <= 16


def _taken() -> dict[str, Any]:
    from oomproof.guarding.situation import judge

    return {"failure": judge(taken())}


def test_a_busy_device_is_tried_again_after_waiting() -> None:
    busy = [accelerator_error(46, "CUDA-capable device(s) is/are busy or unavailable")] * 3
    slept: list[float] = []
    factory = Factory(troubles=list(busy))
    running = guarded(factory, machine=replace(Machine(), sleep=slept.append))
    assert running.counts == {"wait": 1}
    assert len(slept) == 2
    assert len(factory.targets) == 4
    running.close()
    with pytest.raises(RuntimeError, match="closed"):
        running.step()
    assert running.measured_terms()[0].weights > 0
    running.close()
