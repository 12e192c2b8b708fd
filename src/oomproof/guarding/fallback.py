"""What the user allows: `--fallback kv8,context,batch,format,ORG/NAME,cpu`, in their order."""

from __future__ import annotations

from collections.abc import Sequence

from oomproof.errors import InputError

NAMES = ("kv8", "context", "batch", "format", "cpu")
"""Rungs by name; whatever has a slash is a smaller model."""
_SMALLER_BUNDLED = "tiny"


def read_fallback(asked: str | Sequence[str] | None) -> tuple[str, ...]:
    """The rungs that are allowed, in order.

    Args:
        asked: "kv8,context", or the names one by one; None for none.

    Raises:
        InputError: An unknown name, one given twice, or one behind `cpu`, which ends the ladder.
    """
    if asked is None:
        return ()
    given = asked.split(",") if isinstance(asked, str) else asked
    names = [name.strip() for name in given]
    for position, name in enumerate(names):
        if name not in NAMES and not is_model(name):
            raise InputError(
                f"fallback {name[:80]!r} is no rung of the ladder",
                remedy=f"use {', '.join(NAMES)}, or a smaller model as ORG/NAME",
            )
        if name in names[:position]:
            raise InputError(f"fallback {name!r} is named twice", remedy="name each rung once")
    if "cpu" in names[:-1]:
        behind = ", ".join(names[names.index("cpu") + 1 :])
        raise InputError(
            f"fallback 'cpu' is followed by {behind}: nothing on a GPU comes after the processor",
            remedy="name cpu last",
        )
    return tuple(names)


def is_model(name: str) -> bool:
    """Whether a rung is a smaller model: a hub id, a folder, or the bundled one."""
    return ("/" in name and not name.startswith("-")) or name == _SMALLER_BUNDLED
