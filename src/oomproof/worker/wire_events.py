"""What is told of a model beside its answers, and the plans in it, as plain values."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from oomproof.errors import InputError
from oomproof.guarding.ladder import LadderEvent
from oomproof.models.spec import ModelSource
from oomproof.monitoring.events import MonitorEvent
from oomproof.planning.plan import Plan
from oomproof.worker.frames import ProtocolError

T = TypeVar("T")

_MONITOR_EVENT = TypeAdapter(MonitorEvent)
_SOURCE = TypeAdapter(ModelSource)


def plain_event(event: LadderEvent | MonitorEvent) -> list[Any]:
    """[kind, field, …], for `read_event`."""
    if isinstance(event, MonitorEvent):
        return ["monitor", asdict(event)]
    kept = None if event.kept is None else str(event.kept)
    return ["rung", event.rung, event.message, event.plan.to_json(indent=None), kept]


def read_event(kind: str, fields: list[Any]) -> LadderEvent | MonitorEvent:
    """The event that `plain_event` took apart.

    Raises:
        ProtocolError: It is none.
    """
    match kind, fields:
        case "rung", [str(rung), str(message), str(plan), None | str() as kept]:
            return LadderEvent(
                rung=rung,
                message=message,
                plan=read_plan(plan),
                kept=None if kept is None else Path(kept),
            )
        case "monitor", [dict(plain)]:
            return _read(_MONITOR_EVENT, plain, "an event of the monitor")
    raise ProtocolError("what is told is no event")


def read_plan(text: str) -> Plan:
    """A plan's JSON.

    Raises:
        ProtocolError: It is none.
    """
    try:
        return Plan.from_json(text)
    except InputError as error:
        raise ProtocolError(str(error)) from None


def read_source(plain: dict[str, Any]) -> ModelSource:
    """Where a model comes from.

    Raises:
        ProtocolError: It is no source.
    """
    return _read(_SOURCE, plain, "a model's source")


def _read(reader: TypeAdapter[T], plain: dict[str, Any], what: str) -> T:
    try:
        return reader.validate_json(json.dumps(plain), strict=True)
    except (ValidationError, ValueError, RecursionError):
        raise ProtocolError(f"what should be {what} is none") from None
