"""`oomproof eval`: what formats cost on a model and a text."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from oomproof.cli import options
from oomproof.errors import InputError

Text = Annotated[
    Path, typer.Option("--text", help="A file of UTF-8 text to predict.", show_default=False)
]
Formats = Annotated[
    str | None,
    typer.Option(
        "--formats",
        help="What to compare with 16 bits, with commas: nf4,nf4-dq+search,fit,fit:40MiB,./folder. "
        "[default: all formats that run]",
        show_default=False,
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens", help="The most tokens to predict: 4096, 64k. [default: 32k]", show_default=False
    ),
]
Window = Annotated[
    str | None,
    typer.Option(
        "--context",
        "--max-model-len",
        help="Tokens of a window: 512, 2k, auto for the model's maximum. [default: 2k, or that]",
        show_default=False,
    ),
]
ComputeDtype = Annotated[
    str,
    typer.Option(
        "--compute-dtype",
        help="auto, bfloat16, float16, or float32, which leaves no rounding but the formats' own.",
    ),
]
Html = Annotated[
    Path | None,
    typer.Option("--html", help="Write a report with plots to this file.", show_default=False),
]


def evaluate(
    model: options.Model,
    text: Text,
    formats: Formats = None,
    tokens: Tokens = None,
    context: Window = None,
    calibration: options.Calibration = None,
    compute_dtype: ComputeDtype = "auto",
    html: Html = None,
    max_memory: options.MaxMemory = None,
    reserve: options.Reserve = None,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Measure what formats cost on a text: perplexity, KL divergence, agreement, with intervals."""
    from oomproof import session
    from oomproof.cli.render import loading_progress, say

    if html is not None:
        _check_html(html)
    session.require_run_packages()
    from oomproof.cli.render_eval import print_eval

    options.convert_pickle(model, allowed=allow_pickle)
    with loading_progress() as progress:
        report = session.evaluate(
            model,
            text,
            formats=formats,
            tokens=tokens,
            context=context,
            calibration=calibration,
            compute_dtype=compute_dtype,
            max_memory=options.parse_max_memory(max_memory),
            reserve=reserve or 0,
            revision=revision,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if json:
        typer.echo(json_module.dumps(report.as_dict(), indent=2))
    else:
        print_eval(report)
    if html is not None:
        from oomproof.evaluation.html import report_html

        try:
            # A name that is no UTF-8 has lone surrogates.
            html.write_text(report_html(report), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"html {str(html)!r} cannot be written ({error.strerror})") from None
        say(f"report: {html}")


def _check_html(path: Path) -> None:
    """Refuses a report that could not be written, before anything is computed."""
    if path.suffix.lower() not in {".html", ".htm"}:
        raise InputError(f"html {str(path)!r} is no .html file", remedy='write "--html eval.html"')
    if not path.parent.is_dir():
        raise InputError(f"html {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise InputError(f"html {str(path)!r} is a folder")
