"""Messages as JSON: a list whose first entry is the kind.

Both readers are strict: a kind, a type or a number that does not belong is a ProtocolError, and
nothing else is ever raised, whatever the bytes are. Non-finite numbers are written as Python's json
does (NaN, Infinity).
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, cast, get_args

from oomproof.engine.messages import (
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    SamplingOptions,
    TokenEvent,
)
from oomproof.errors import RequestError
from oomproof.memory.terms import DeviceTerms
from oomproof.worker.frames import ProtocolError
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
from oomproof.worker.wire_errors import plain_error, plain_fault, read_error, read_fault
from oomproof.worker.wire_events import plain_event, read_event, read_plan, read_source

MAX_COUNT = 2**63 - 1
_MAX_TEXT = 1_000_000
_TERMS = tuple(field.name for field in fields(DeviceTerms))
_SAMPLING = tuple(field.name for field in fields(SamplingOptions))
_REASONS: tuple[str, ...] = get_args(FinishReason)
# Made once: json.dumps with separators makes an encoder a call.
_write = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def write(message: Command | Report) -> bytes:
    """The payload of a message's frame."""
    return _write(_plain(message)).encode()


def write_step(events: Any) -> bytes:
    """The payload of `Stepped`, straight from an engine's events."""
    return _write(["step", [_plain_event(event) for event in events]]).encode()


def _plain(message: Command | Report) -> list[Any]:  # noqa: PLR0911, PLR0912, C901 - a case a kind
    match message:
        case Stepped():
            return ["step", [_plain_event(event) for event in message.events]]
        case Submit(request=request):
            sampling = [getattr(request.sampling, name) for name in _SAMPLING]
            stops = sorted(request.stop_tokens)
            return ["submit", request.id, request.max_new_tokens, sampling, stops,
                    request.resumed_tokens, request.replays, request.prompt_tokens]  # fmt: skip
        case Cancel():
            return ["cancel", message.request_id]
        case Measure():
            return ["measure"]
        case Measured():
            return ["measured", [[i, asdict(terms)] for i, terms in message.terms.items()]]
        case Canary():
            return ["canary", message.prompt_tokens, message.max_new_tokens]
        case CanaryAnswer():
            return ["canary answer", message.tokens]
        case Load():
            return ["load", message.plan, message.folder, message.trust_remote_code,
                    message.allowed]  # fmt: skip
        case Found():
            return ["found", message.id, asdict(message.source), message.folder]
        case NotFound():
            return ["not found", plain_error(message.error)]
        case Wanted():
            return ["wanted", message.model]
        case Told():
            return ["told", *plain_event(message.event)]
        case Refused():
            return ["refused", message.request_id, plain_error(message.error)]
        case Progress():
            return ["progress", message.done, message.total]
        case Ready():
            return ["ready", None if message.plan is None else message.plan.to_json(indent=None)]
        case Close():
            return ["close"]
        case Failed():
            error = None if message.error is None else plain_error(message.error)
            fault = None if message.fault is None else plain_fault(message.fault)
            return ["failed", fault, message.alive, message.type, message.text, error]


def _plain_event(event: Event) -> list[Any]:
    if isinstance(event, TokenEvent):
        if event.logprob is None:
            return [event.request_id, event.token]
        return [event.request_id, event.token, event.logprob, event.top_logprobs]
    return [event.request_id, event.reason, event.prompt_tokens, event.new_tokens]


def read_command(payload: bytes) -> Command:
    """What a supervisor told.

    Raises:
        ProtocolError: It is no command.
    """
    match _parse(payload):
        case [
            "submit", str(id_), int(bound), list(sampling), list(stops), resumed,
            bool(replays), list(prompt),
        ]:  # fmt: skip
            request = _request(id_, bound, sampling, stops, _count(resumed), replays, prompt)
            return Submit(request=request)
        case ["cancel", str(id_)]:
            return Cancel(request_id=id_)
        case ["measure"]:
            return Measure()
        case ["canary", list(prompt), int(bound)]:
            return Canary(prompt_tokens=_counts(prompt), max_new_tokens=_count(bound))
        case ["load", str(plan), str(folder), bool(trusted), list(allowed)]:
            return Load(
                plan=plan, folder=folder, trust_remote_code=trusted, allowed=_texts(allowed)
            )
        case ["found", str(id_), dict(source), str(folder)]:
            return Found(id=id_, source=read_source(source), folder=folder)
        case ["not found", error]:
            return NotFound(error=read_error(error))
        case ["close"]:
            return Close()
        case other:
            raise _refused(other, "command")


def read_report(payload: bytes) -> Report:  # noqa: PLR0911 - a case a kind
    """What a worker told.

    Raises:
        ProtocolError: It is no report.
    """
    match _parse(payload):
        case ["step", list(events)]:
            return Stepped(events=tuple([_event(event) for event in events]))
        case ["progress", int(done), int(total)]:
            return Progress(done=_count(done), total=_count(total))
        case ["ready", None]:
            return Ready(plan=None)
        case ["ready", str(plan)]:
            return Ready(plan=read_plan(plan))
        case ["wanted", str(model)]:
            return Wanted(model=model)
        case ["told", str(kind), *fields]:
            return Told(event=read_event(kind, fields))
        case ["refused", str(id_), error]:
            return _refusal(id_, error)
        case ["canary answer", list(tokens)]:
            return CanaryAnswer(tokens=_counts(tokens))
        case ["measured", list(devices)]:
            return Measured(terms=dict(_device_terms(device) for device in devices))
        case ["failed", fault, bool(alive), str(type_), str(text), error]:
            return Failed(
                fault=None if fault is None else read_fault(fault),
                alive=alive,
                type=type_[:_MAX_TEXT],
                text=text[:_MAX_TEXT],
                error=None if error is None else read_error(error),
            )
        case other:
            raise _refused(other, "report")


def _parse(payload: bytes) -> Any:
    try:
        return json.loads(payload.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a message is no JSON: {type(error).__name__}") from None


def _refused(value: Any, what: str) -> ProtocolError:
    kind = value[0] if isinstance(value, list) and value else value
    shown = kind[:40] if isinstance(kind, str) else type(kind).__name__
    return ProtocolError(f"{shown!r} is no {what}, or has other fields than it should")


def _count(value: Any) -> int:
    if type(value) is int and 0 <= value <= MAX_COUNT:
        return value
    raise ProtocolError("a count or token is no whole number from 0 to 2^63 - 1")


def _counts(values: list[Any]) -> tuple[int, ...]:
    for value in values:
        _count(value)
    return tuple(values)


def _number(value: Any) -> float:
    if type(value) is float or (type(value) is int and abs(value) <= MAX_COUNT):
        return float(value)
    raise ProtocolError("a log-probability is no number")


def _event(value: Any) -> Event:
    match value:
        case [str(id_), int(token)]:
            return TokenEvent(request_id=id_, token=_count(token))
        case [str(id_), str(reason), int(prompt), int(new)] if reason in _REASONS:
            return FinishedEvent(
                request_id=id_,
                reason=cast(FinishReason, reason),
                prompt_tokens=_count(prompt),
                new_tokens=_count(new),
            )
        case [str(id_), int(token), logprob, list(top)]:
            return TokenEvent(
                request_id=id_,
                token=_count(token),
                logprob=_number(logprob),
                top_logprobs=tuple(_pair(one) for one in top),
            )
        case other:
            raise _refused(other, "event")


def _pair(value: Any) -> tuple[int, float]:
    match value:
        case [int(token), logprob]:
            return _count(token), _number(logprob)
        case other:
            raise _refused(other, "log-probability")


def _device_terms(value: Any) -> tuple[int, DeviceTerms]:
    match value:
        case [int(index), dict(terms)] if set(terms) == set(_TERMS):
            if all(type(size) is int and abs(size) <= MAX_COUNT for size in terms.values()):
                return _count(index), DeviceTerms(**terms)
    raise ProtocolError("a measurement is not one of the terms in bytes")


def _texts(values: list[Any]) -> tuple[str, ...]:
    if all(isinstance(value, str) for value in values):
        return tuple(values)
    raise ProtocolError("a name is no text")


def _request(
    id_: str,
    bound: int,
    sampling: list[Any],
    stops: list[Any],
    resumed: int,
    replays: bool,
    prompt: list[Any],
) -> Request:
    if len(sampling) != len(_SAMPLING) or not all(
        value is None or type(value) in (int, float) for value in sampling
    ):
        raise ProtocolError("a request's sampling options are not numbers, one each")
    try:
        return Request(
            id=id_,
            prompt_tokens=_counts(prompt),
            max_new_tokens=_count(bound),
            sampling=SamplingOptions(**dict(zip(_SAMPLING, sampling, strict=True))),
            stop_tokens=frozenset(_counts(stops)),
            resumed_tokens=resumed,
            replays=replays,
        )
    except (RequestError, TypeError, OverflowError) as error:
        raise ProtocolError(f"a request cannot be: {error}") from None


def _refusal(id_: str, error: Any) -> Refused:
    found = read_error(error)
    if not isinstance(found, RequestError):
        raise ProtocolError("a request is refused for what is no request's fault")
    return Refused(request_id=id_, error=found)
