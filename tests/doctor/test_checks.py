"""Verdicts over written-down machines."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from oomproof.doctor.checks import CAPABILITIES, check_all
from oomproof.doctor.facts import Facts, GpuFacts, XidFacts, from_plain, to_plain
from oomproof.doctor.findings import Verdict, is_well
from tests.doctor.broken import BROKEN, Broken
from tests.doctor.machines import H200, HEALTHY


def verdicts(facts: Facts) -> dict[str, Verdict]:
    return {verdict.capability: verdict for verdict in check_all(facts)}


@pytest.mark.parametrize("facts", HEALTHY.values(), ids=HEALTHY)
def test_a_machine_that_is_well_raises_no_alarm(facts: Facts) -> None:
    found = check_all(facts)
    assert [verdict for verdict in found if verdict.check is not None] == []
    assert is_well(found)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_machine_is_told_what_is_wrong_and_the_line_that_mends_it(broken: Broken) -> None:
    found = verdicts(broken.facts)[broken.capability]
    assert (found.check, found.status) == (broken.check, broken.status), found
    assert broken.says in found.detail
    assert found.remedy == broken.remedy
    assert is_well(check_all(broken.facts)) is not broken.fails


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_whatever_a_check_finds_comes_with_exactly_one_line(broken: Broken) -> None:
    for verdict in check_all(broken.facts):
        if verdict.check is not None:
            assert verdict.remedy
            assert "\n" not in verdict.remedy + verdict.detail


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_facts_come_back_from_json_as_they_were(broken: Broken) -> None:
    plain = json.loads(json.dumps(to_plain(broken.facts)))
    assert from_plain(plain) == broken.facts
    assert from_plain({"schema": 1, "facts": plain}) == broken.facts


def test_broken_machines_are_of_many_kinds_and_each_names_its_thread() -> None:
    assert len({broken.name for broken in BROKEN}) == len(BROKEN) >= 25
    assert all("#" in broken.thread for broken in BROKEN)
    assert len({broken.check for broken in BROKEN}) >= 22


def test_every_capability_and_every_check_of_one_has_a_name_of_its_own() -> None:
    assert len({capability.name for capability in CAPABILITIES}) == len(CAPABILITIES)
    for capability in CAPABILITIES:
        names = [check.name for check in capability.checks]
        assert len(set(names)) == len(names)


def test_what_is_found_besides_the_worst_is_told_without_a_second_remedy() -> None:
    lost = GpuFacts(index=1, name="", error="NVML_ERROR_GPU_IS_LOST")
    facts = replace(H200, gpus=(H200.gpus[0], lost), xids=(XidFacts(bus_id="0000:ae:00", code=79),))
    health = verdicts(facts)["GPU health"]
    assert health.status == "missing"
    assert health.also == ("the kernel's log has Xid 79 of GPU 0000:ae:00: fell off the bus",)


def test_a_verdict_is_plain_values() -> None:
    plain = [verdict.as_dict() for verdict in check_all(H200)]
    assert json.loads(json.dumps(plain)) == plain
