"""What a launcher of several processes says in the environment, read without torch."""

from __future__ import annotations

import os


def world_size() -> int:
    """Processes that were started together; 1 where no launcher did."""
    return _number("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this process is the one that prints: alone, or rank 0."""
    return world_size() == 1 or _number("RANK", 0) == 0


def _number(name: str, default: int) -> int:
    """What is no number is told by tuning.distributed.from_environment, which all of them call."""
    value = os.environ.get(name, "")
    return max(default, int(value)) if value.isdecimal() else default
