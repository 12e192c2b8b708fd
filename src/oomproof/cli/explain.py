"""`oomproof explain`: what a pasted traceback or a log says, and the command that works."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, BinaryIO

import typer

from oomproof.cli import options
from oomproof.errors import InputError

File = Annotated[
    str | None,
    typer.Argument(
        help="A traceback or a log; read from stdin where it is left out or -.", show_default=False
    ),
]


def explain(file: File = None, json: options.Json = False) -> None:
    """Say what went wrong in a traceback or a log, and what would have worked."""
    from oomproof.postmortem.explain import explain as explain_lines
    from oomproof.postmortem.source import read_lines

    name = "stdin" if file is None or file == "-" else repr(file[:200])
    with _opened(file) as stream:
        explanation = explain_lines(read_lines(stream, name), name=name)
    if json:
        typer.echo(json_module.dumps(explanation.as_dict(), indent=2))
    else:
        from oomproof.cli.render_explain import print_explanation

        print_explanation(explanation)


@contextmanager
def _opened(file: str | None) -> Iterator[BinaryIO]:
    from oomproof.postmortem.source import open_log

    if file is not None and file != "-":
        with open_log(file) as stream:
            yield stream
        return
    if sys.stdin is None:
        raise InputError("there is no stdin", remedy="give a file")
    if sys.stdin.isatty():
        sys.stderr.write("paste the traceback, then press Ctrl-D on a line of its own\n")
    yield sys.stdin.buffer
