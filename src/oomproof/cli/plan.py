"""`oomproof plan`: what fits where, before a byte is downloaded."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oomproof.cli import options
from oomproof.errors import InputError, NotRunnableError

if TYPE_CHECKING:
    from oomproof.planning.handoffs.handoff import HandOff
    from oomproof.planning.plan import Plan

Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        help='A machine that is not here: "4x RTX 4090", "8xA100-80GB", "2x24GiB,1x12GiB".',
        show_default=False,
    ),
]

For = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Plan for another engine and print its commands: vllm, llama.cpp or mlx.",
        show_default=False,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="Draw the plan into this .svg file.", show_default=False),
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
    search: options.Search = False,
    calibration: options.Calibration = None,
    adapter: options.Adapter = None,
    target: For = None,
    plot: Plot = None,
    what_would_it_take: WhatWouldItTake = False,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
) -> None:
    """Say what each device will hold, and whether it fits. Needs no GPU and no download."""
    from oomproof import session

    if plot is not None:
        _check_plot(plot)
    options.convert_pickle(model, allowed=allow_pickle)
    if target is not None:
        _refuse_beside_for(
            {
                "--engine": engine != "auto",
                "--offload": offload != "none",
                "--force": force,
                "--search": search,
                "--calibration": calibration is not None,
                "--adapter": adapter is not None,
                "--plot": plot is not None,
                "--what-would-it-take": what_would_it_take,
            }
        )
        _hand_off(
            session.hand_off(
                model,
                target,
                gpus=gpus,
                format=format,
                kv_format=kv_format,
                context=context,
                concurrency=concurrency,
                max_memory=options.parse_max_memory(max_memory),
                reserve=reserve or 0,
                cap=cap,
                revision=revision,
                allow_pickle=allow_pickle,
            ),
            as_json=json,
        )
        return
    made = options.planned(
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
        search=search,
        calibration=calibration,
        adapter=adapter,
        what_would_it_take=what_would_it_take,
        revision=revision,
        allow_pickle=allow_pickle,
    )
    if plot is not None:
        _draw(made, plot)
    if json:
        typer.echo(made.to_json())
    else:
        from oomproof.cli.render import print_plan

        print_plan(made)
    if not made.fits:
        raise typer.Exit(3)
    if made.refused is not None:
        raise NotRunnableError(made.refused, remedy="use a smaller format, or accept it by --force")


def _refuse_beside_for(given: dict[str, bool]) -> None:
    """These speak of our own engine; ignoring one would promise what no command does."""
    for option, is_given in given.items():
        if is_given:
            raise InputError(
                f"{option} does not go with --for, which plans another engine",
                remedy=f"leave out {option} or --for",
            )


def _hand_off(found: HandOff, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json_module.dumps(found.as_dict(), indent=2))
    else:
        from oomproof.cli.render_handoff import print_hand_off

        print_hand_off(found)
    if not found.fits:
        raise typer.Exit(3)


def _check_plot(path: Path) -> None:
    """Refuses a picture that could not be written, before anything is planned."""
    if path.suffix.lower() != ".svg":
        raise InputError(f"plot {str(path)!r} is no .svg file", remedy='write "--plot plan.svg"')
    if not path.parent.is_dir():
        raise InputError(f"plot {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise InputError(f"plot {str(path)!r} is a folder")


def _draw(made: Plan, path: Path) -> None:
    from oomproof.planning.plot import plot_svg

    try:
        path.write_text(plot_svg(made), encoding="utf-8")
    except OSError as error:
        raise InputError(f"plot {str(path)!r} cannot be written ({error.strerror})") from None
