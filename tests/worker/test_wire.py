"""Messages survive the wire; whatever else arrives is refused, at once and in one way."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oomproof.worker
from oomproof.engine.messages import FinishedEvent, Request, SamplingOptions, TokenEvent
from oomproof.errors import (
    ConfigError,
    EngineFaultError,
    InputError,
    LadderExhaustedError,
    PlanMismatchError,
    RequestError,
)
from oomproof.faults.classify import classify
from oomproof.faults.fault import Fault
from oomproof.guarding.ladder import LadderEvent
from oomproof.memory.terms import DeviceTerms
from oomproof.models.spec import ModelSource
from oomproof.monitoring.events import MonitorEvent
from oomproof.worker.frames import MAX_FRAME_BYTES, VERSION, FrameReader, ProtocolError, frame
from oomproof.worker.messages import (
    Canary,
    CanaryAnswer,
    Cancel,
    Close,
    Command,
    Failed,
    Found,
    Load,
    Measure,
    Measured,
    NotFound,
    Progress,
    Ready,
    Refused,
    Report,
    Stepped,
    Submit,
    Told,
    Wanted,
)
from oomproof.worker.wire import read_command, read_report, write, write_step
from tests.worker.engines import torch_error
from tests.worker.workers import planned

found = classify(torch_error(710))
assert found is not None
FAULT: Fault = found
RUNG = LadderEvent(rung="kv8", message="CUDA out of memory; …", plan=planned(), kept=Path("/k.txt"))
SPIKE = MonitorEvent(
    kind="spike",
    at=1.5,
    device=0,
    term="workspace",
    measured_bytes=5,
    planned_bytes=3,
    message="workspace of device 0",
)

COMMANDS: tuple[Command, ...] = (
    Load(plan='{"a": "ü"}', folder="/a folder", trust_remote_code=True, allowed=("kv8", "a/b")),
    Found(id="a/b", source=ModelSource(kind="hub", path="a/b", revision="c0ffee"), folder="/b"),
    Submit(
        request=Request(
            id="17",
            prompt_tokens=(1, 2, 128_000),
            max_new_tokens=9,
            sampling=SamplingOptions(temperature=0.1, top_k=5, seed=2**63 - 1, logprobs=20),
            stop_tokens=frozenset({3, 1}),
            resumed_tokens=2,
            replays=True,
        )
    ),
    Cancel(request_id="17"),
    Canary(prompt_tokens=(11, 7), max_new_tokens=4),
    Measure(),
    Close(),
)
REPORTS: tuple[Report, ...] = (
    Progress(done=5, total=10),
    Ready(plan=None),
    Ready(plan=planned()),
    Wanted(model="a/b"),
    Told(event=RUNG),
    Told(event=replace(RUNG, kept=None)),
    Told(event=SPIKE),
    Stepped(events=()),
    Stepped(
        events=(
            TokenEvent(request_id="1", token=5),
            TokenEvent(
                request_id="2", token=5, logprob=-0.1 / 3, top_logprobs=((5, -0.1), (6, -math.inf))
            ),
            TokenEvent(request_id="3", token=0, logprob=0.0),
            FinishedEvent(request_id="1", reason="stop", prompt_tokens=4, new_tokens=1),
        )
    ),
    CanaryAnswer(tokens=(1, 2)),
    Measured(terms={0: DeviceTerms(weights=2**40), 7: DeviceTerms(workspace=-1)}),
    Failed(fault=None, alive=True, type="A", text="b\nc"),
    Failed(fault=FAULT, alive=False, type="A", text="b\nc"),
)
WITH_ERRORS: tuple[Command | Report, ...] = (
    NotFound(error=InputError("no such model")),
    Refused(request_id="17", error=RequestError("too long", remedy="less")),
    Failed(
        fault=FAULT,
        alive=True,
        type="LadderExhaustedError",
        text="d",
        error=LadderExhaustedError("d", fault=FAULT, tried=("free: no",), shortfall_bytes=7),
    ),
)


@pytest.mark.parametrize("message", COMMANDS, ids=lambda one: type(one).__name__)
def test_a_command_survives_the_wire(message: Command) -> None:
    assert read_command(write(message)) == message


@pytest.mark.parametrize("message", REPORTS, ids=lambda one: type(one).__name__)
def test_a_report_survives_the_wire(message: Report) -> None:
    assert read_report(write(message)) == message


def test_an_error_keeps_its_type_its_words_and_its_fields() -> None:
    for error in (
        ConfigError("a", "b", field="c", remedy="e"),
        PlanMismatchError(("x", "y")),
        LadderExhaustedError("d", fault=FAULT, tried=("free: no",), shortfall_bytes=7),
        EngineFaultError("e", fault=FAULT, request_ids=("1",)),
    ):
        sent = Failed(fault=None, alive=False, type="t", text="", error=error)
        received = read_report(write(sent))
        assert isinstance(received, Failed)
        assert type(received.error) is type(error)
        assert str(received.error) == str(error)
        assert vars(received.error) == vars(error)


def test_a_request_is_refused_and_a_model_not_found_in_the_words_of_the_other_side() -> None:
    refused = read_report(write(WITH_ERRORS[1]))
    assert isinstance(refused, Refused)
    assert str(refused.error) == "too long: less"
    missing = read_command(write(WITH_ERRORS[0]))
    assert isinstance(missing, NotFound)
    assert str(missing.error) == "no such model"


def test_the_events_of_a_step_are_written_as_a_report() -> None:
    step = next(one for one in REPORTS if isinstance(one, Stepped) and one.events)
    assert write_step(step.events) == write(step)


@given(st.lists(st.binary(min_size=1, max_size=50)), st.integers(1, 20))
def test_frames_come_out_of_pieces_of_any_size(payloads: list[bytes], size: int) -> None:
    stream = b"".join(map(frame, payloads))
    reader = FrameReader()
    found = [
        payload
        for start in range(0, len(stream), size)
        for payload in reader.feed(stream[start : start + size])
    ]
    assert found == payloads


def test_a_frame_that_is_too_long_is_refused_before_it_comes() -> None:
    header = bytes([VERSION]) + (MAX_FRAME_BYTES + 1).to_bytes(4, "big")
    with pytest.raises(ProtocolError, match="67,108,865 bytes"):
        list(FrameReader().feed(header))
    with pytest.raises(ProtocolError, match="67,108,865 bytes"):
        frame(bytes(MAX_FRAME_BYTES + 1))
    for wrong in (b"\x00", b"\x02"):
        with pytest.raises(ProtocolError, match="version"):
            list(FrameReader().feed(wrong + header[1:]))
    with pytest.raises(ProtocolError, match="0 bytes"):
        frame(b"")


def test_a_step_of_every_request_there_can_be_has_room_in_a_frame() -> None:
    top = tuple((151_000 + i, -12.345678901234567) for i in range(20))
    event = TokenEvent(request_id="123456789", token=151_000, logprob=-1 / 3, top_logprobs=top)
    assert len(write_step([event] * 4096)) < MAX_FRAME_BYTES / 10


def refuses_or_reads(payload: bytes) -> None:
    for read in (read_command, read_report):
        try:
            message = read(payload)
        except ProtocolError:
            continue
        write(message)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused(payload: bytes) -> None:
    refuses_or_reads(payload)


@given(st.data())
def test_a_message_with_some_bytes_changed_is_refused_or_is_another_message(
    data: st.DataObject,
) -> None:
    payload = bytearray(write(data.draw(st.sampled_from(COMMANDS + REPORTS + WITH_ERRORS))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(payload) - 1))
        payload[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not payload:
            return
    refuses_or_reads(bytes(payload))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


@given(st.data())
def test_a_message_with_a_value_of_another_kind_is_refused_or_is_another_message(
    data: st.DataObject,
) -> None:
    value = json.loads(write(data.draw(st.sampled_from(COMMANDS + REPORTS + WITH_ERRORS))))
    held = value
    while isinstance(held, list) and held:
        place = data.draw(st.integers(0, len(held) - 1))
        if not isinstance(held[place], list) or data.draw(st.booleans()):
            held[place] = data.draw(JSON)
            break
        held = held[place]
    refuses_or_reads(json.dumps(value).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 100_000,
        b'["step",' + b"[" * 100_000,
        b'["progress",1' + b"0" * 5000 + b",2]",
        b'["progress",true,2]',
        b'["progress",-1,2]',
        b'["step",[["1",1.5]]]',
        b'["step",[["1","maybe",1,2]]]',
        b'["step",[[1,5]]]',
        b'["failed","odd",true,"a","b",null]',
        b'["failed",{"fault_class":"odd"},true,"a","b",null]',
        b'["failed",null,true,"a","b",["SystemExit","x",{}]]',
        b'["failed",null,true,"a","b",["InputError","x",{"__class__":"y"}]]',
        b'["failed",null,true,"a","b",["InputError","x",{"args":{"a":1}}]]',
        b'["refused","1",["LoadError","x",{}]]',
        b'["ready","{}"]',
        b'["told","rung","kv8","x","{}",null]',
        b'["told","monitor",{"kind":"leak"}]',
        b'["told","nothing"]',
        b'["wanted",1]',
        b'["measured",[[0,{"weights":1}]]]',
        b"\xff\xfe[\x00]\x00",
        b"null",
    ],
)
def test_reports_that_are_nearly_right_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_report(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b'["submit","1",0,[1,0,1,0,1,0,0,null,null],[],0,[1]]',
        b'["submit","1",5,[1,0,1,0,1,0,0,null],[],0,[1]]',
        b'["submit","1",5,["1",0,1,0,1,0,0,null,null],[],0,[1]]',
        b'["submit","1",5,[NaN,0,1,0,1,0,0,null,null],[],0,[1]]',
        b'["submit","1",5,[1,0,1,0,1,0,0,null,null],[],0,[]]',
        b'["submit","1",5,[1,0,1,0,1,0,0,null,null],[],0,[-1]]',
        b'["submit","1",5,[1,0,1,0,1,0,0,null,null],[],1,[1]]',
        b'["submit","1",5,[1,0,1,0,1,0,0,null,null],[],-1,[1]]',
        b'["load","{}","x",1,[]]',
        b'["load","{}","x",true,[1]]',
        b'["found","a",{"kind":"disk","path":"a"},"/b"]',
        b'["not found",["SystemExit","x",{}]]',
        b'["close",1]',
    ],
)
def test_commands_that_are_nearly_right_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_command(payload)


def test_nothing_here_can_run_what_it_receives() -> None:
    folder = Path(oomproof.worker.__file__).parent
    forbidden = re.compile(r"\b(pickle|marshal|shelve|dill|multiprocessing|eval|exec)\b")
    for path in folder.glob("*.py"):
        assert not forbidden.search(path.read_text(encoding="utf-8")), path.name
