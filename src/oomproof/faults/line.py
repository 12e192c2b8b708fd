"""A line of a log taken apart: what a logger put in front, the exception's type, its message.

Rules look at the beginning of a message only, so what a user wrote somewhere in a line (a prompt, a
file's name, a line of source in a traceback) is no evidence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LINE = 16_384
"""Characters of a line that are looked at."""

# Each repetition eats at least one character and never gives one back.
_PREFIX = re.compile(
    r"""(?:
      [\s│┃|>#*╭╰─+]+
    | \x1b\[[0-9;]{0,16}[A-Za-z]
    | \[(?!(?i:prompt|user|human|assistant|input|request|query|content|question)\b)
        [^\[\]\n]{0,120}\]:?
    | \((?:[A-Za-z]\w{0,40}[ ])?(?:pid|rank)[^()\n]{0,80}\)
    | \([A-Z]\w{0,40}[ ]pid=[^()\n]{0,80}\)
    | [0-9]{1,4}[-/.:][0-9]{1,2}[-/.:][0-9.,:TZ+-]{1,32}(?=\s|$)
    | [0-9]{1,2}-[0-9]{1,2}(?=\s)
    | [0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:[.,][0-9]{1,6})?(?=\s|$)
    | (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)\s{1,2}[0-9]{1,2}(?=\s)
    | (?:TRACE|DEBUG|INFO|NOTICE|WARN(?:ING)?|ERROR|ERR|E|CRITICAL|FATAL)\b:?(?:root:)?
    | [IWEF][0-9]{4}(?=\s)
    | [\w.-]{1,80}\.(?:py|cc|cpp|cu|go|rs|c|h|hpp):[0-9]{1,6}\b[\])]?:?
    | [\w.-]{1,60}[ ](?:kernel|[\w./@-]{1,60}\[[0-9]{1,10}\]):
    | [\w.-]{1,40}[ ]{1,8}\|[ ]
    | (?:[\w.-]{1,80}:[0-9]{1,8}:[0-9]{1,8}[ ](?=\[))
    | NCCL[ ](?:WARN|INFO)
    | (?:what\(\):|[Ee]rror:|-+>?|:+)(?=\s)
    )*+""",
    re.VERBOSE,
)
_TYPED = re.compile(
    r"""(?P<type>(?:[A-Za-z_]\w{0,80}\.){0,12}+
        (?:[A-Za-z_]\w{0,80}?(?:Error|Exception|Failed)|Exception|OutOfResources
          |NVMLError_\w{1,40}|RayTaskError\(\w{1,80}\)))
        (?::\s?|\(\s?(?P<quote>['"])|\s*$)""",
    re.VERBOSE,
)
_ANSI = re.compile(r"\x1b\[[0-9;]{0,16}[A-Za-z]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line, taken apart."""

    type: str | None
    """Such as "torch.cuda.OutOfMemoryError"; None where no exception's type stands in front."""
    message: str

    @property
    def short_type(self) -> str:
        """Without its module."""
        return (self.type or "").rsplit(".", 1)[-1]

    @property
    def root(self) -> str:
        """The package that the type comes from; "" where none is named."""
        first, dot, _ = (self.type or "").partition(".")
        return first if dot else ""


def strip_prefix(text: str) -> str:
    """What a logger, a container's runtime or a box of Rich put in front, taken off."""
    text = text[:MAX_LINE]
    found = _PREFIX.match(text)
    return text[found.end() :] if found else text


def take_apart(text: str) -> Line:
    """The exception's type and message of a line, or all of it as a message."""
    rest = strip_prefix(_ANSI.sub("", text[:MAX_LINE])).rstrip()
    if rest.endswith(("│", "┃")):
        rest = rest[:-1].rstrip()
    found = _TYPED.match(rest)
    if found is None:
        return Line(type=None, message=rest)
    name = found["type"]
    if name.endswith(")"):
        name = name.rpartition("(")[2].removesuffix(")")
    message = rest[found.end() :]
    if found["quote"]:
        message = message.removesuffix(")").removesuffix(found["quote"])
    return Line(type=name, message=message)
