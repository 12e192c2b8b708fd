"""Training data as people keep it, read strictly, one line at a time.

JSON lines with `messages`, with `prompt` and `completion`, or with `text`; or plain text. Every
mistake is one error that names the file and the line; nothing is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from oomproof.errors import InputError
from oomproof.units import MIB, format_bytes

MAX_LINE_BYTES = 16 * MIB
"""Of a line of JSON; it is a sample, not a library."""
MAX_MESSAGES = 10_000
TEXT_BLOCK_BYTES = MIB
"""Plain text is handed on in blocks of about this."""
TEXT_SUFFIXES = (".txt", ".md", ".text")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_FIRST = frozenset({"system", "developer"})
ROLES = (*sorted(_FIRST), "user", "assistant", "tool")
_FORMS = "messages, prompt and completion, or text"


class DataError(InputError):
    """A line of the training data that cannot be used.

    Args:
        file: The file.
        line: Its number, from 1; None where the file as a whole is to blame.
        problem: What is wrong, with the value and the bound.
    """

    def __init__(
        self, file: str, line: int | None, problem: str, *, remedy: str | None = None
    ) -> None:
        self.file, self.line = file, line
        where = file if line is None else f"{file}, line {line:,}"
        super().__init__(f"{where}: {problem}", remedy=remedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns; what the assistant says is learned."""

    line: int
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    """What the model's chat template is told of tools."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A prompt, and what follows it; the latter is learned."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A document, all of it learned."""

    line: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A part of one long text, which is cut into sequences wherever they are full."""

    line: int
    """Where it begins."""
    text: str


Record = Conversation | Completion | Text | Page


def read_records(path: Path, *, name: str | None = None) -> Iterator[tuple[Record, int]]:
    """Every record of a file, with the bytes that were read so far.

    Args:
        path: A file of JSON lines or of plain text, by its suffix.
        name: What errors call it.

    Raises:
        DataError: A line cannot be used, or the file has none.
        InputError: The file is not there, or is of another kind.
    """
    shown = name or str(path)
    suffix = path.suffix.lower()
    if suffix not in (*TEXT_SUFFIXES, *JSON_SUFFIXES):
        raise _unknown_kind(shown, suffix)
    try:
        if path.is_dir():
            raise InputError(f"data {shown} is a folder", remedy="give one file")
        with path.open("rb") as file:
            reader = _pages if suffix in TEXT_SUFFIXES else _lines
            yield from reader(file, shown)
    except OSError as error:
        raise InputError(f"data {shown} cannot be read ({error.strerror or error})") from None


def _unknown_kind(shown: str, suffix: str) -> InputError:
    if suffix == ".parquet":
        return InputError(
            f"data {shown} is Parquet, which is not read",
            remedy="write it as JSON lines: pandas.read_parquet(f).to_json('data.jsonl', "
            "orient='records', lines=True)",
        )
    return InputError(
        f"data {shown} has no suffix that tells what it is",
        remedy=f"name it .jsonl with {_FORMS} in each line, or .txt for plain text",
    )


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[Record, int]]:
    number = found = done = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        done += len(raw)
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(
                name,
                number,
                f"is longer than {format_bytes(MAX_LINE_BYTES)}",
                remedy="write one sample a line"
                + (", not one list of all" if raw.lstrip()[:1] == b"[" else ""),
            )
        text = _decoded(raw, name, number)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            continue
        found += 1
        yield parse_line(text, name, number), done
    if not found:
        raise DataError(name, None, "holds no samples", remedy=f"write JSON lines with {_FORMS}")


def _decoded(raw: bytes, name: str, line: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            name,
            line,
            f"byte {error.start + 1} is not UTF-8",
            remedy="convert it: iconv -f LATIN1 -t UTF-8",
        ) from None


def _pages(file: BinaryIO, name: str) -> Iterator[tuple[Record, int]]:
    """Blocks that end with a line, unless a line alone is longer than a block."""
    number, done, empty = 1, 0, True
    begin, size = 1, 0
    parts: list[str] = []

    def page() -> Page:
        text = "".join(parts)
        return Page(line=begin, text=text.removeprefix("\ufeff") if begin == 1 else text)

    while raw := file.readline(MAX_LINE_BYTES + 1):
        done += len(raw)
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(
                name,
                number,
                f"is longer than {format_bytes(MAX_LINE_BYTES)}",
                remedy="break it into lines",
            )
        parts.append(_decoded(raw, name, number))
        size += len(raw)
        number += 1
        if size >= TEXT_BLOCK_BYTES:
            empty = empty and not page().text.strip()
            yield page(), done
            begin, parts, size = number, [], 0
    if parts:
        empty = empty and not page().text.strip()
        yield page(), done
    if empty:
        raise DataError(name, None, "holds no text")


def parse_line(text: str, name: str, line: int) -> Record:
    """The sample of one line of JSON.

    Raises:
        DataError: It is none.
    """
    try:
        found = json.loads(text.rstrip(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        place = f" at column {error.colno:,}" if isinstance(error, json.JSONDecodeError) else ""
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:80]
        remedy = "write one JSON object a line"
        if line == 1 and text.lstrip()[:1] in "[{" and text.strip() in "[{":
            remedy = "it is one JSON document over several lines: write one object a line"
        raise DataError(name, line, f"is not JSON{place} ({what})", remedy=remedy) from None
    if not isinstance(found, dict):
        raise DataError(
            name, line, f"is a JSON {_kind(found)}, not an object", remedy=f"write {_FORMS}"
        )
    forms = [key for key in ("messages", "prompt", "text") if key in found]
    if "completion" in found and "prompt" not in found:
        raise DataError(name, line, "has completion without prompt", remedy="add prompt")
    if len(forms) > 1:
        raise DataError(
            name, line, f"has both {' and '.join(forms)}", remedy="keep one of them in each line"
        )
    if not forms:
        raise DataError(name, line, f"has none of {_FORMS}", remedy=_rename(found))
    if forms == ["messages"]:
        return _conversation(found, name, line)
    if forms == ["prompt"]:
        return Completion(
            line=line,
            prompt=_string(found, "prompt", name, line, may_be_blank=True),
            completion=_string(found, "completion", name, line),
        )
    return Text(line=line, text=_string(found, "text", name, line))


def _no_constant(value: str) -> Any:
    raise ValueError(f"{value} is no JSON value")


def _rename(found: Mapping[str, Any]) -> str:
    if "conversations" in found:
        return "rename conversations to messages, from to role and value to content"
    if "instruction" in found:
        return "rename instruction to prompt and output to completion"
    keys = ", ".join(list(found)[:5])[:100]
    return f"it has {keys or 'no fields'}"


def _string(
    found: Mapping[str, Any], key: str, name: str, line: int, *, may_be_blank: bool = False
) -> str:
    if key not in found:
        raise DataError(name, line, f"has no {key}")
    value = found[key]
    if not isinstance(value, str):
        raise DataError(name, line, f"{key} is a JSON {_kind(value)}, not a string")
    if not value.strip() and not may_be_blank:
        raise DataError(name, line, f"{key} is empty", remedy="remove the line")
    _require_unicode(value, key, name, line)
    return value


def _require_unicode(value: str, key: str, name: str, line: int) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            name, line, f"{key} holds half of a surrogate pair, which is no text"
        ) from None


def _conversation(found: Mapping[str, Any], name: str, line: int) -> Conversation:
    raw = found["messages"]
    if not isinstance(raw, list):
        raise DataError(name, line, f"messages is a JSON {_kind(raw)}, not a list")
    if not raw:
        raise DataError(name, line, "messages is empty", remedy="remove the line")
    if len(raw) > MAX_MESSAGES:
        raise DataError(name, line, f"messages has {len(raw):,} turns, at most {MAX_MESSAGES:,}")
    messages = tuple(_message(one, n, name, line) for n, one in enumerate(raw, 1))
    _check_order([one["role"] for one in messages], name, line)
    tools = found.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(one, dict) for one in tools)
    ):
        raise DataError(name, line, "tools is not a list of objects")
    return Conversation(line=line, messages=messages, tools=tuple(tools) if tools else None)


def _message(raw: Any, number: int, name: str, line: int) -> Mapping[str, Any]:
    where = f"message {number}"
    if not isinstance(raw, dict):
        raise DataError(name, line, f"{where} is a JSON {_kind(raw)}, not an object")
    for key in ("role", "content"):
        if key not in raw and not (key == "content" and raw.get("tool_calls")):
            raise DataError(name, line, f"{where} has no {key}")
    role = raw["role"]
    if role not in ROLES:
        raise DataError(
            name,
            line,
            f"{where} has role {str(role)[:40]!r}",
            remedy=f"use one of {', '.join(ROLES)}",
        )
    content = raw.get("content")
    calls = raw.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and role == "assistant"):
        raise DataError(name, line, f"{where} has tool_calls, which only an assistant's list is")
    if content is None and calls:
        return raw
    if not isinstance(content, str):
        raise DataError(name, line, f"{where} has content that is a JSON {_kind(content)}, no text")
    if role in ("user", "assistant") and not content.strip() and not calls:
        raise DataError(name, line, f"{where} is empty ({role})", remedy="remove the line")
    _require_unicode(content, where, name, line)
    return raw


def _check_order(roles: list[str], name: str, line: int) -> None:
    """System first, then user and assistant in turns, tools behind an assistant's call."""
    previous = "begin"
    allowed = {
        "begin": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("tool", "assistant"),
    }
    for number, role in enumerate(roles, 1):
        if role in _FIRST:
            if number != 1:
                raise DataError(
                    name, line, f"message {number} is from {role}, which only the first may be"
                )
            continue
        if role not in allowed[previous]:
            after = "at the beginning" if previous == "begin" else f"after {previous}"
            raise DataError(
                name,
                line,
                f"message {number} is from {role} {after}",
                remedy=f"{' or '.join(allowed[previous])} comes there",
            )
        previous = role
    if previous != "assistant":
        last = roles[-1]
        raise DataError(
            name,
            line,
            f"messages end with {last}: there is no answer to learn",
            remedy="end each conversation with assistant",
        )


def _kind(value: Any) -> str:
    for kind, name in (
        (bool, "boolean"),
        (str, "string"),
        (list, "list"),
        (dict, "object"),
        ((int, float), "number"),
    ):
        if isinstance(value, kind):
            return name
    return "null"
