"""A request refuses what makes no sense before anything is computed."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from oomproof.errors import InputError
from oomproof.formats import FORMATS
from oomproof.memory.kv_cache import KV_FORMATS
from oomproof.planning.request import DEFAULT_CONTEXT, MAX_CONCURRENCY, PlanRequest


def test_the_defaults_ask_for_the_best_that_fits() -> None:
    request = PlanRequest()
    assert (request.format, request.kv_format, request.engine) == ("auto", "auto", "auto")
    assert (request.context, request.concurrency, request.reserve_bytes) == (None, 1, 0)
    assert dict(request.max_memory) == {}
    assert request.cap_bytes is None
    assert DEFAULT_CONTEXT == 8192


@pytest.mark.parametrize("name", FORMATS)
def test_every_known_format_may_be_asked_for(name: str) -> None:
    assert PlanRequest(format=name).format == name


@pytest.mark.parametrize("name", KV_FORMATS)
def test_every_known_kv_format_may_be_asked_for(name: str) -> None:
    assert PlanRequest(kv_format=name).kv_format == name


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"format": "nf5"}, r"unknown format 'nf5': use one of .*nf4-dq"),
        ({"format": "NF4"}, r"unknown format 'NF4'"),
        ({"kv_format": "int4"}, r"unknown KV format 'int4': use one of auto, bf16, fp16, fp8"),
        ({"context": 0}, r"context 0 must be at least 1"),
        ({"context": -8192}, r"context -8192 must be at least 1"),
        ({"concurrency": 0}, r"concurrency 0 must be from 1 to 4096"),
        ({"concurrency": -1}, r"concurrency -1"),
        ({"concurrency": MAX_CONCURRENCY + 1}, r"concurrency 4097 must be from 1 to 4096"),
        ({"reserve_bytes": -1}, r"reserve -1 must not be negative"),
    ],
)
def test_nonsense_is_refused_with_value_and_bound(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        PlanRequest(**options)


@pytest.mark.parametrize("cap_bytes", [0, -1])
def test_a_cap_that_leaves_no_memory_is_refused(cap_bytes: int) -> None:
    with pytest.raises(InputError, match="cap"):
        PlanRequest(cap_bytes=cap_bytes)


def test_a_negative_limit_of_a_device_is_refused() -> None:
    with pytest.raises(InputError, match="max-memory"):
        PlanRequest(max_memory={0: -1})


def test_bounds_themselves_are_allowed() -> None:
    request = PlanRequest(context=1, concurrency=MAX_CONCURRENCY, cap_bytes=1)
    assert (request.context, request.concurrency) == (1, MAX_CONCURRENCY)


def test_a_request_does_not_change() -> None:
    request = PlanRequest()
    with pytest.raises(FrozenInstanceError):
        request.context = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        request.max_memory[0] = 1  # type: ignore[index]
