"""`oomproof plan`: what fits where, before a byte is downloaded."""

from __future__ import annotations

from typing import Annotated

import typer

from oomproof.cli import options
from oomproof.errors import NotRunnableError

Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        help='A machine that is not here: "4x RTX 4090", "8xA100-80GB", "2x24GiB,1x12GiB".',
        show_default=False,
    ),
]

WhatWouldItTake = Annotated[
    bool,
    typer.Option(
        "--what-would-it-take", help="Also name the smallest listed hardware that would do."
    ),
]


def plan(
    model: options.Model,
    gpus: Gpus = None,
    format: options.Format = "auto",
    kv_format: options.KVFormat = "auto",
    context: options.Context = None,
    concurrency: options.Concurrency = "1",
    max_memory: options.MaxMemory = None,
    reserve: options.Reserve = None,
    cap: options.Cap = None,
    engine: options.Engine = "auto",
    offload: options.Offload = "none",
    force: options.Force = False,
    what_would_it_take: WhatWouldItTake = False,
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Say what each device will hold, and whether it fits. Needs no GPU and no download."""
    from oomproof import session

    made = session.plan(
        model,
        gpus=gpus,
        format=format,
        kv_format=kv_format,
        context=context,
        concurrency=concurrency,
        max_memory=options.parse_max_memory(max_memory),
        reserve=reserve or 0,
        cap=cap,
        engine=engine,
        offload=offload,
        force=force,
        what_would_it_take=what_would_it_take,
        revision=revision,
    )
    if json:
        typer.echo(made.to_json())
    else:
        from oomproof.cli.render import print_plan

        print_plan(made)
    if not made.fits:
        raise typer.Exit(3)
    if made.refused is not None:
        raise NotRunnableError(made.refused, remedy="use a smaller format, or accept it by --force")
