"""`oomproof doctor`: what this machine can do, and what mends the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oomproof.cli import options

if TYPE_CHECKING:
    from oomproof.doctor.facts import Facts

SCHEMA = 1
"""Of `doctor --json`."""
_MAX_FACTS_BYTES = 10_000_000

FactsFile = Annotated[
    Path | None,
    typer.Option(
        "--facts",
        help="Judge a machine by what `doctor --json` wrote there, instead of this one.",
        show_default=False,
    ),
]


def doctor(json: options.Json = False, facts: FactsFile = None) -> None:
    """Check this machine: one verdict a capability, with the line that mends each failure."""
    from oomproof.doctor.checks import check_all
    from oomproof.doctor.facts import to_plain
    from oomproof.doctor.findings import is_well
    from oomproof.doctor.gather import gather

    machine = gather() if facts is None else _read(facts)
    verdicts = check_all(machine)
    well = is_well(verdicts)
    if json:
        from json import dumps

        answer = {
            "schema": SCHEMA,
            "ok": well,
            "verdicts": [verdict.as_dict() for verdict in verdicts],
            "facts": to_plain(machine),
        }
        typer.echo(dumps(answer, indent=2))
    else:
        from oomproof.cli.render import print_verdicts, say

        print_verdicts(verdicts)
        for probe in machine.probes:
            if probe.problem is not None:
                say(f"not known: {probe.name}, {probe.problem} ({probe.seconds:.1f} s)")
    if not well:
        raise typer.Exit(1)


def _read(file: Path) -> Facts:
    """Facts that another machine's doctor wrote.

    Raises:
        InputError: There is no such file, or no facts in it.
    """
    from json import loads

    from oomproof.doctor.facts import from_plain
    from oomproof.errors import InputError

    remedy = "give what `oomproof doctor --json` wrote"
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_FACTS_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", remedy=remedy) from None
    if len(text) > _MAX_FACTS_BYTES:
        raise InputError(f"{file} has more than {_MAX_FACTS_BYTES:,} bytes", remedy=remedy)
    try:
        return from_plain(loads(text))
    except (ValueError, RecursionError):
        raise InputError(f"{file} is not JSON", remedy=remedy) from None
