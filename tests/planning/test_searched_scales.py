"""Plans whose block scales are searched while loading."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oomproof.errors import InputError
from oomproof.guarding.engine import arithmetic_of
from oomproof.guarding.ladder import command_of
from oomproof.guarding.situation import request_of
from oomproof.hardware.describe import describe
from oomproof.models.resolve import resolve
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan


def planned(**options: object) -> Plan:
    request = PlanRequest(search=True, **options)  # type: ignore[arg-type]
    return make_plan(resolve("llama-3.1-8b"), describe("1x 24GiB"), request)


def test_a_search_is_recorded_and_costs_no_byte() -> None:
    plan = planned(format="nf4-dq")
    assert plan.search
    assert plan.engine == "native"
    assert Plan.from_json(plan.to_json()) == plan
    plain = make_plan(resolve("llama-3.1-8b"), describe("1x 24GiB"), PlanRequest(format="nf4-dq"))
    assert not plain.search
    assert replace(plan, search=False) == plain


def test_a_plan_without_the_field_is_one_without_a_search() -> None:
    text = planned(format="nf4").to_json().replace('"search": true,', "")
    assert not Plan.from_json(text).search


def test_a_format_that_auto_chose_without_block_scales_is_not_searched() -> None:
    request = PlanRequest(search=True)
    plan = make_plan(resolve("llama-3.1-8b"), describe("1x 80GiB"), request)
    assert (plan.format, plan.search) == ("bf16", False)


def test_a_format_without_block_scales_is_refused() -> None:
    with pytest.raises(InputError, match="int8 has no block scales to search"):
        PlanRequest(format="int8", search=True)


def test_transformers_does_not_search() -> None:
    plan = planned(format="nf4", engine="transformers")
    assert plan.not_runnable == "block scales are searched by the native engine only"


def test_the_same_plan_is_asked_for_again_with_its_search() -> None:
    plan = planned(format="nf4-dq")
    assert request_of(plan).search
    assert "--search" in command_of(plan)
    assert "--search" not in command_of(replace(plan, search=False))
    assert arithmetic_of(plan) != arithmetic_of(replace(plan, search=False))
