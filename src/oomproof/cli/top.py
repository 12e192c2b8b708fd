"""`oomproof top`: live memory of the machine, and of running models against their plans."""

from __future__ import annotations

import json as json_module
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from oomproof.errors import InputError

if TYPE_CHECKING:
    from oomproof.monitoring.view import View

MIN_INTERVAL_S = 0.1
MAX_INTERVAL_S = 3600.0
MAX_COUNT = 10**9

Interval = Annotated[float, typer.Option("--interval", help="Seconds between looks.", metavar="S")]
Count = Annotated[
    int | None,
    typer.Option(
        "--count", help="Looks before it ends. [default: until Ctrl-C]", show_default=False
    ),
]
Once = Annotated[bool, typer.Option("--once", help="Look once: --count 1.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print a line of JSON a look on stdout.")]


def top(
    interval: Interval = 1.0,
    count: Count = None,
    once: Once = False,
    json: JsonLines = False,
) -> None:
    """Watch memory: every device, who uses it, and each running model against its plan."""
    looks = _looks(interval, count, once=once)
    from oomproof.monitoring.view import watch_machine

    with watch_machine() as look:
        views = _paced(look, interval, looks)
        try:
            if json:
                _print_json(views)
            elif sys.stdout.isatty() and looks != 1:
                from oomproof.cli.render_top import show_live

                show_live(views)
            else:
                _print_text(views)
        except KeyboardInterrupt:
            return  # it is how this command ends


def _looks(interval: float, count: int | None, *, once: bool) -> int | None:
    """How often to look, None for without end.

    Raises:
        InputError: An option is out of its bounds.
    """
    if not (math.isfinite(interval) and MIN_INTERVAL_S <= interval <= MAX_INTERVAL_S):
        raise InputError(
            f"interval {interval:g} must be from {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} seconds"
        )
    if count is not None and not 1 <= count <= MAX_COUNT:
        raise InputError(f"count {count} must be from 1 to {MAX_COUNT:,}")
    if once and count not in (None, 1):
        raise InputError(f"--once looks once, not {count} times", remedy="leave one of them out")
    return 1 if once else count


def _paced(look: Callable[[], View], interval: float, looks: int | None) -> Iterator[View]:
    due = time.monotonic()
    done = 0
    while True:
        yield look()
        done += 1
        if done == looks:
            return
        # A look that took longer than the interval delays the next ones, and is not made up for.
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _print_json(views: Iterator[View]) -> None:
    for view in views:
        typer.echo(json_module.dumps(view.as_dict(), separators=(",", ":")))
        sys.stdout.flush()


def _print_text(views: Iterator[View]) -> None:
    from oomproof.cli.render_top import lines

    for number, view in enumerate(views):
        typer.echo(("\n" if number else "") + "\n".join(lines(view)))
        sys.stdout.flush()
