"""Our errors as plain values: the type's name, the line that users read, and its fields."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from oomproof import errors
from oomproof.errors import OomproofError
from oomproof.faults.fault import Fault
from oomproof.worker.frames import ProtocolError

_FAULT = TypeAdapter(Fault)
_TYPES: dict[str, type[OomproofError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, OomproofError)
}
MAX_FIELDS = 16
MAX_LINES = 100_000
"""Of a field that is a list of texts."""


def plain_error(error: OomproofError) -> list[Any]:
    """[type, text, {field: value}], for `read_error`; tuples of texts become lists."""
    kind = next(one.__name__ for one in type(error).__mro__ if one.__name__ in _TYPES)
    fields = {
        name: _plain_field(value) for name, value in vars(error).items() if not name.startswith("_")
    }
    return [kind, str(error), fields]


def plain_fault(fault: Fault) -> dict[str, Any]:
    """A fault's fields, for `read_fault`."""
    return asdict(fault)


def read_fault(value: Any) -> Fault:
    """The fault that `plain_fault` took apart.

    Raises:
        ProtocolError: It is none.
    """
    try:
        return _FAULT.validate_json(json.dumps(value), strict=True)
    except (ValidationError, ValueError, RecursionError):
        raise ProtocolError("what should be a fault is none") from None


def _plain_field(value: Any) -> Any:
    if isinstance(value, Fault):
        return plain_fault(value)
    return list(value) if isinstance(value, tuple) else value


def read_error(value: Any) -> OomproofError:
    """The error that `plain_error` took apart, equal in type, text and fields.

    Raises:
        ProtocolError: It is none of ours.
    """
    match value:
        case [str(name), str(text), dict(fields)] if name in _TYPES and len(fields) <= MAX_FIELDS:
            error = _TYPES[name].__new__(_TYPES[name], text)
            for field, content in fields.items():
                if not str(field).isidentifier() or str(field).startswith("_"):
                    raise ProtocolError("an error has a field that is no name")
                setattr(error, field, _read_field(content))
            return error
    raise ProtocolError("an error is not one of ours")


def _read_field(value: Any) -> str | int | float | tuple[str, ...] | Fault | None:
    match value:
        case dict():
            return read_fault(value)
        case None | str() | int() | float():
            return value
        case list() if len(value) <= MAX_LINES and all(isinstance(one, str) for one in value):
            return tuple(value)
    raise ProtocolError("a field of an error is no text, number, fault or list of texts")
