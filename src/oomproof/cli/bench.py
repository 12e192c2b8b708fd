"""`oomproof bench`: how fast a model is here, against the machine's limits and against a peer."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from oomproof.cli import options
from oomproof.errors import InputError

Against = Annotated[
    str | None,
    typer.Option("--against", help="Time this engine too, in the same run: transformers."),
]
Requests = Annotated[str, typer.Option("--requests", help="Requests at once to time, with commas.")]
Contexts = Annotated[
    str, typer.Option("--contexts", help="Tokens of context to time, with commas: 128,2k,8k.")
]
RandomWeights = Annotated[
    bool,
    typer.Option(
        "--random-weights", help="Make the weights up: no download, no file. Speeds are the same."
    ),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Instead: find the fastest launch of each product of a 4-bit format on this GPU, for "
        "decode steps of up to the largest of --requests, and keep it for every later run.",
    ),
]
_MAX_POINTS = 32
_MAX_DIGITS = 9


def bench(
    model: options.Model,
    against: Against = None,
    requests: Requests = "1,4,16",
    contexts: Contexts = "128,2k,8k",
    random_weights: RandomWeights = False,
    tune: Tune = False,
    format: options.Format = "auto",
    kv_format: options.KVFormat = "auto",
    context: options.Context = None,
    max_memory: options.MaxMemory = None,
    reserve: options.Reserve = None,
    cap: options.Cap = None,
    engine: options.Engine = "auto",
    offload: options.Offload = "none",
    force: options.Force = False,
    search: options.Search = False,
    calibration: options.Calibration = None,
    adapter: options.Adapter = None,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Time loading, prompts and decoding against what this machine's memory and cores allow."""
    from oomproof import session
    from oomproof.cli.render import loading_progress
    from oomproof.cli.render_bench import print_bench, print_timing, print_tuned, print_tuning
    from oomproof.units import parse_tokens

    counts = [_count(text) for text in _listed(requests, "requests")]
    lengths = [parse_tokens(text, what="contexts") for text in _listed(contexts, "contexts")]
    session.require_run_packages()
    options.convert_pickle(model, allowed=allow_pickle)
    planned: dict[str, Any] = {
        "format": format,
        "kv_format": kv_format,
        "context": context,
        "max_memory": options.parse_max_memory(max_memory),
        "reserve": reserve or 0,
        "cap": cap,
        "engine": engine,
        "offload": offload,
        "force": force,
        "search": search,
        "calibration": calibration,
        "adapter": adapter,
        "revision": revision,
        "allow_pickle": allow_pickle,
    }
    if tune:
        if against is not None:
            raise InputError(
                f"--tune compares launches of our own, not with {against[:40]!r}",
                remedy="leave --against out, or --tune",
            )
        tuning = session.tune_kernels(model, requests=counts, told=print_tuned, **planned)
        if json:
            typer.echo(json_module.dumps(tuning.as_dict(), indent=2))
        else:
            print_tuning(tuning)
        return
    with loading_progress() as progress:
        report = session.bench(
            model,
            against=against,
            random_weights=random_weights,
            requests=counts,
            contexts=lengths,
            progress=progress,
            told=print_timing,
            **planned,
        )
    if json:
        typer.echo(json_module.dumps(report.as_dict(), indent=2))
    else:
        print_bench(report)


def _listed(text: str, name: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not 1 <= len(parts) <= _MAX_POINTS:
        raise InputError(
            f"{name} {text[:80]!r} lists {len(parts)} values, not 1 to {_MAX_POINTS}",
            remedy='write "1,4,16"',
        )
    return parts


def _count(text: str) -> int:
    is_short = text.isdecimal() and len(text) <= _MAX_DIGITS
    if not is_short or not 1 <= int(text) <= options.MAX_REQUESTS:
        raise InputError(
            f"requests {text[:40]!r} is no whole number from 1 to {options.MAX_REQUESTS}"
        )
    return int(text)
