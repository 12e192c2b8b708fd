"""`oomproof doctor`: what this machine can do, and what mends the rest."""

from __future__ import annotations

import typer

from oomproof.cli import options


def doctor(json: options.Json = False) -> None:
    """Check this machine: one verdict a capability, with the line that mends each failure."""
    from oomproof.doctor.checks import check_all
    from oomproof.doctor.facts import gather

    verdicts = check_all(gather())
    if json:
        from json import dumps

        typer.echo(dumps([verdict.as_dict() for verdict in verdicts], indent=2))
    else:
        from oomproof.cli.render import print_verdicts

        print_verdicts(verdicts)
    if any(verdict.required and verdict.status == "missing" for verdict in verdicts):
        raise typer.Exit(1)
