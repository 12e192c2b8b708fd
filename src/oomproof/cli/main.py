"""The command `oomproof`: one file a command, errors as one line, exit codes a script can use.

Exit codes: 0 done or fits, 1 failed or bad input, 2 the command line cannot be parsed, 3 does not
fit.
"""

from __future__ import annotations

import os
import sys

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
from oomproof.errors import OomproofError, WorkerError

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


def main() -> None:
    """Runs the command line and exits."""
    try:
        app()
    except OomproofError as error:
        if isinstance(error, WorkerError):
            sys.stderr.write(error.stderr)
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
