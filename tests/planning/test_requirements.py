"""The smallest listed hardware for a model, against the plan on it and on what is smaller."""

from __future__ import annotations

import pytest

from oomproof.hardware.catalog import accelerators
from oomproof.hardware.describe import describe
from oomproof.models.resolve import resolve
from oomproof.planning.plan import Plan, Requirement
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan


def planned(name: str, gpus: str, **options: object) -> Plan:
    return make_plan(resolve(name), describe(gpus), PlanRequest(**options))  # type: ignore[arg-type]


def required(name: str, **options: object) -> dict[tuple[str, int], Requirement]:
    plan = planned(name, "8GiB", what_would_it_take=True, **options)
    return {(each.format, each.count): each for each in plan.what_it_would_take}


def test_it_is_looked_for_only_where_it_is_asked_for() -> None:
    assert planned("llama-3.1-8b", "8GiB").what_it_would_take == ()


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-405b", "mixtral-8x7b"])
def test_what_is_named_fits_and_is_run(name: str) -> None:
    found = required(name, context=4096)
    assert found
    for (format_name, count), each in found.items():
        plan = planned(name, f"{count}x {each.accelerator}", format=format_name, context=4096)
        assert plan.fits
        assert plan.runnable
        assert plan.tokens_per_second.decode == each.tokens_per_second


def test_nothing_listed_that_is_smaller_would_do() -> None:
    each = required("llama-3.1-70b", format="nf4-dq")["nf4-dq", 2]
    smaller = [a for a in accelerators() if a.kind == "cuda" and a.free_bytes < each.free_bytes]
    assert smaller
    for accelerator in smaller:
        gpus = f"2x {accelerator.key}"
        plan = planned("llama-3.1-70b", gpus, format="nf4-dq")
        assert not (plan.fits and plan.runnable), gpus


def test_more_devices_may_each_be_smaller() -> None:
    found = required("llama-3.1-405b", format="nf4-dq")
    sizes = [found["nf4-dq", count].free_bytes for count in (2, 4, 8) if ("nf4-dq", count) in found]
    assert sizes == sorted(sizes, reverse=True)


def test_limits_of_this_machine_do_not_apply_to_another() -> None:
    free = required("llama-3.1-8b", format="nf4-dq")
    assert required("llama-3.1-8b", format="nf4-dq", cap_bytes=2**30) == free
