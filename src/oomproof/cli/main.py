"""The command `oomproof`: one file a command, errors as one line, exit codes a script can use.

Exit codes: 0 done or fits, 1 failed or bad input, 2 the command line cannot be parsed, 3 does not
fit.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

import typer

from oomproof import __version__
from oomproof.cli.bench import bench
from oomproof.cli.chat import chat
from oomproof.cli.doctor import doctor
from oomproof.cli.eval import evaluate
from oomproof.cli.explain import explain
from oomproof.cli.merge import merge
from oomproof.cli.plan import plan
from oomproof.cli.quantize import quantize
from oomproof.cli.rehearse import rehearse
from oomproof.cli.run import run
from oomproof.cli.top import top
from oomproof.cli.tune import tune
from oomproof.errors import OomproofError, RankError, WorkerError
from oomproof.tuning.launched import world_size

_LAUNCHER_S = 5.0
"""In which a launcher finds out that a process has ended."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"

app = typer.Typer(
    name="oomproof",
    help="Run the largest model your GPUs can hold, and never meet `CUDA out of memory`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(plan)
app.command()(rehearse)
app.command()(run)
app.command()(chat)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(quantize)
app.command()(tune)
app.command()(merge)
app.command()(doctor)
app.command()(explain)
app.command()(top)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"oomproof {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options that every command has."""


def _recorded() -> None:
    """The command; torchrun is told of what ends it, and names the first error of all ranks."""
    if _ERROR_FILE not in os.environ:
        app()
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    error = record(_caught)()
    if error is not None:
        raise error


def _caught() -> OomproofError | None:
    """Runs the command: an error of ours needs no traceback, which `record` would write."""
    try:
        app()
    except OomproofError as error:
        return error
    return None


def _tell_launcher(error: OomproofError) -> None:
    """One line for torchrun's report, in the form that it reads."""
    if os.environ.get(_ERROR_FILE):
        told = {"message": f"error: {error}", "timestamp": int(time.time())}
        with suppress(OSError):  # the line on stderr is there all the same
            Path(os.environ[_ERROR_FILE]).write_text(json.dumps(told), encoding="utf-8")


def _show_what_can_be_shown() -> None:
    """A character that the encoding of stdout or stderr lacks becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def main() -> None:
    """Runs the command line and exits."""
    _show_what_can_be_shown()
    try:
        _recorded()
    except OomproofError as error:
        if isinstance(error, RankError):
            # Another rank has said what happened; its launcher ends this one before it wakes up.
            time.sleep(_LAUNCHER_S)
        if isinstance(error, WorkerError):
            sys.stderr.write(error.stderr)
        sys.stderr.write(f"error: {error}\n")
        _tell_launcher(error)
        if world_size() > 1:
            # Others may wait in the middle of a pass: what tidies up would wait for them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        sys.stderr.write(f"error: the output cannot be written ({error.strerror})\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
