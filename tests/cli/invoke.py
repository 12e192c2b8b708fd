"""Runs the command line in this process, as a terminal or a pipe would."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from oomproof.cli.main import main


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a refused command writes, checked to be one, alone, and of ours."""
        assert self.code == 1, (self.code, self.err)
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1
        return self.err


class _Pipe(io.TextIOWrapper):
    """A stream that is no terminal."""


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def invoke(*arguments: str, stdin: bytes | str = b"", terminal: bool = False) -> Outcome:
    """Runs `oomproof ARGUMENTS`."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    source: Any = (_Terminal if terminal else _Pipe)(io.BytesIO(data), encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with (
        patch.object(sys, "argv", ["oomproof", *arguments]),
        patch.object(sys, "stdin", source),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
        else:
            raise AssertionError("the command line returned without an exit code")
    assert code is None or isinstance(code, int), code
    return Outcome(code=code or 0, out=out.getvalue(), err=err.getvalue())
