"""When the sampler looks, and that each trouble is told once until it is over."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from oomproof.monitoring.events import MonitorEvent
from oomproof.monitoring.leaks import LeakRule
from oomproof.monitoring.sampler import KEPT, MAX_REST_S, REST_PER_WORK
from oomproof.monitoring.status import parse_status
from oomproof.monitoring.status_files import StatusFile
from oomproof.units import GIB, KIB, MIB
from tests.monitoring.made_up import Machine, cpu_plan, gpu_plan


def test_a_look_is_taken_at_most_once_a_second() -> None:
    machine = Machine()
    sampler = machine.sampler(gpu_plan())
    for _ in range(1_000):
        machine.seconds += 0.01
        sampler.after_step(1)
    assert machine.looks in (10, 11)
    assert sampler.samples[-1].requests == pytest.approx(1_000, abs=100)


def test_looking_costs_a_400th_of_the_time_however_long_a_look_takes() -> None:
    machine = Machine(look_s=0.05)
    sampler = machine.sampler(gpu_plan())
    for _ in range(100_000):
        machine.seconds += 0.01
        sampler.after_step(0)
    assert machine.looks * machine.look_s / machine.seconds < 1 / REST_PER_WORK + 1e-3


def test_one_slow_look_does_not_blind_the_sampler() -> None:
    machine = Machine(look_s=100)
    sampler = machine.sampler(gpu_plan())
    machine.seconds += MAX_REST_S + 1
    sampler.after_step(0)
    assert machine.looks == 2


def test_samples_are_a_ring() -> None:
    machine = Machine()
    sampler = machine.sampler(gpu_plan())
    for _ in range(2 * KEPT):
        machine.seconds += 1
        sampler.after_step(1)
    assert len(sampler.samples) == KEPT
    assert sampler.samples[-1].steps == 2 * KEPT


def test_a_term_above_its_plan_is_told_once_until_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, machine, told = gpu_plan(), Machine(), list[MonitorEvent]()
    sampler = machine.sampler(made, told.append)
    sound = machine.terms[0]
    for over in (0, MIB, 2 * MIB, 0, 0, MIB):
        machine.terms[0] = replace(sound, workspace=sound.workspace + over)
        sampler.sample()
    assert [(event.kind, event.device, event.term) for event in told] == [
        ("spike", 0, "workspace")
    ] * 2
    assert told[0].measured_bytes == sound.workspace + MIB
    assert told[0].planned_bytes == sound.workspace
    assert caplog.text.count("workspace of device 0 takes") == 2


def test_two_causes_are_two_events_and_the_whole_device_is_a_third() -> None:
    made, machine, told = gpu_plan(), Machine(), list[MonitorEvent]()
    sampler = machine.sampler(made, told.append)
    sound = machine.terms[0]
    machine.terms[0] = replace(sound, weights=sound.weights + GIB, graphs=sound.graphs + GIB)
    sampler.sample()
    sampler.sample()
    assert {event.term for event in told} == {"weights", "graphs", "peak"}
    assert len(told) == 3
    assert "whole plan is exceeded" in told[0].message


def test_a_processors_workspace_is_held_to_the_plan_of_model_and_process() -> None:
    made, machine, told = cpu_plan(), Machine(), list[MonitorEvent]()
    sampler = machine.sampler(made, told.append)
    sound = machine.terms[0]
    machine.terms[0] = replace(sound, workspace=sound.workspace + made.host.peak_bytes // 2)
    sampler.sample()
    assert told == []
    machine.terms[0] = replace(sound, workspace=sound.workspace + 2 * made.host.peak_bytes)
    sampler.sample()
    assert [event.term for event in told] == ["peak"]


@pytest.mark.parametrize("where", ["rss", "allocated"])
def test_a_leak_is_told_once_with_its_pace(where: str) -> None:
    made, machine, told = gpu_plan(), Machine(), list[MonitorEvent]()
    sampler = machine.sampler(made, told.append)
    for _ in range(3_000):
        machine.seconds += 1
        setattr(machine, where, getattr(machine, where) + 4 * KIB)
        sampler.after_step(1)
    [event] = told
    assert (event.kind, event.term) == ("leak", where)
    assert event.device == (None if where == "rss" else 0)
    assert event.bytes_per_request == pytest.approx(4 * KIB, rel=0.01)
    assert "4.00 KiB a request" in event.message


def test_growth_without_requests_is_no_leak_over_requests() -> None:
    made, machine, told = gpu_plan(), Machine(), list[MonitorEvent]()
    sampler = machine.sampler(made, told.append, rule=LeakRule(warm_up_requests=0))
    for _ in range(1_000):
        machine.seconds += 1
        machine.rss += MIB
        sampler.after_step(0)
    assert told == []


def test_a_callback_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: MonitorEvent) -> None:
        raise RuntimeError(event.term)

    made, machine = gpu_plan(), Machine()
    sampler = machine.sampler(made, fail)
    machine.terms[0] = replace(machine.terms[0], weights=100 * GIB)
    sampler.sample()
    assert "on_event failed" in caplog.text
    assert [event.term for event in sampler.events] == ["weights", "peak"]


def test_the_status_says_what_was_sampled_and_goes_when_the_engine_does(tmp_path: Path) -> None:
    made, machine = gpu_plan(), Machine()
    sampler = machine.sampler(made, status_file=StatusFile(tmp_path))
    machine.terms[0] = replace(machine.terms[0], kv_cache=100 * GIB)
    machine.seconds = 1
    sampler.after_step(3)
    [file] = tmp_path.iterdir()
    status = parse_status(file.read_bytes())
    assert (status.steps, status.requests, status.model) == (1, 3, made.model)
    assert status.devices[0].planned == made.devices[0].terms
    assert status.devices[0].measured.kv_cache == 100 * GIB
    assert not status.devices[0].is_within_plan
    assert [event.term for event in status.events] == ["kv_cache", "peak"]
    sampler.close()
    sampler.close()
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "running"
    blocker.write_text("a file where a folder should be")
    made, machine = gpu_plan(), Machine()
    with caplog.at_level(logging.WARNING):
        sampler = machine.sampler(made, status_file=StatusFile(blocker / "here"))
        sampler.sample()
        sampler.sample()
    assert caplog.text.count("set OOMPROOF_HOME") == 1
    sampler.close()
