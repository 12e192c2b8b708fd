"""The ladder on a GPU: what is given up is really free, and answers go on (make test-gpu)."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import oomproof
from oomproof.engine.native.engine import NativeEngine
from oomproof.errors import LadderExhaustedError
from oomproof.guarding.ladder import LadderEvent
from oomproof.guarding.machine import measure
from oomproof.hardware.holders import read_holders
from oomproof.units import GIB, MIB
from tests.guarding.engines import FailingCall

pytestmark = pytest.mark.gpu
OPTIONS: dict[str, Any] = {"format": "bf16", "engine": "native", "context": 1024}
ASKED: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.8, "seed": 5}


def truly_out_of_memory() -> Exception:
    """What the allocator raises, taken from its own hand."""
    try:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        return error.with_traceback(None)
    raise AssertionError("2^50 bytes were there")


def test_an_answer_goes_on_after_a_real_failure_and_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Any] = []
    with oomproof.load("tiny", on_event=events.append, **OPTIONS) as model:
        calm = model.generate("It was", frequency_penalty=0.5, **ASKED)
        held = torch.cuda.memory_reserved()
        FailingCall(
            monkeypatch,
            NativeEngine,
            "step",
            {7: lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`")},
        )
        assert model.generate("It was", frequency_penalty=0.5, **ASKED) == calm
        assert [one.rung for one in events if isinstance(one, LadderEvent)] == ["free"]
        assert torch.cuda.memory_reserved() <= held + 2 * MIB
        measured, planned = model.measured_terms()[0], model.plan.devices[0].terms
        assert measured.cuda_context <= planned.cuda_context + planned.margin
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < 64 * MIB


def test_a_failure_in_the_middle_of_a_real_allocation_goes_on_or_ends_with_a_typed_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with oomproof.load("tiny", **OPTIONS) as model:
        calm = model.generate("It was", **ASKED)
        FailingCall(monkeypatch, NativeEngine, "step", {5: truly_out_of_memory})
        assert model.generate("It was", **ASKED) == calm
        always = dict.fromkeys(range(1, 9), truly_out_of_memory)
        FailingCall(monkeypatch, NativeEngine, "step", always)
        with pytest.raises(LadderExhaustedError) as refused:
            model.generate("It was", **ASKED)
    assert refused.value.tried[0] == "free: taken, and it failed again"


def test_memory_taken_by_this_process_shrinks_the_plan_that_is_loaded() -> None:
    plan = oomproof.plan("tiny", **{**OPTIONS, "format": "auto"})
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - GIB, dtype=torch.uint8, device="cuda")
    found = measure(plan).devices[0].free_bytes
    assert found < 2 * GIB
    del ballast
    torch.cuda.empty_cache()
    assert measure(plan).devices[0].free_bytes > free - GIB


def test_this_process_is_among_those_that_hold_memory() -> None:
    torch.empty(GIB, dtype=torch.uint8, device="cuda")
    # In a container the driver may not tell; then nothing is told rather than something wrong.
    assert all(one.used_bytes is None or one.used_bytes >= 0 for one in read_holders())
