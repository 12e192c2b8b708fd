"""`oomproof rehearse`: the plan at full size with random weights, measured."""

from __future__ import annotations

import json as json_module

import typer

from oomproof.cli import options
from oomproof.errors import LoadError


def rehearse(
    model: options.Model,
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
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    note: options.Note = True,
    json: options.Json = False,
) -> None:
    """Prove a plan on this machine without a download: random weights, filled and timed."""
    from oomproof import session
    from oomproof.cli.render import (
        loading_progress,
        print_memory,
        print_plan_line,
        print_rung,
    )

    session.require_run_packages()
    options.convert_pickle(model, allowed=allow_pickle)
    made = options.planned(
        model,
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
        revision=revision,
        allow_pickle=allow_pickle,
    )
    print_plan_line(made)
    with loading_progress() as progress:
        rehearsal = session.rehearse(made, progress=progress, on_rung=print_rung, keep_note=note)
    if json:
        typer.echo(json_module.dumps(rehearsal.as_dict(), indent=2))
    else:
        print_memory(made, rehearsal.measured, to_stdout=True)
    if rehearsal.failed is not None:
        raise LoadError(
            f"the rehearsal ended early: {rehearsal.failed}",
            remedy="plan again: what it lacked is noted" if note else "plan a smaller context",
        )
    if rehearsal.exceeded:
        raise LoadError(
            "; ".join(rehearsal.exceeded),
            remedy="plan again: the difference is noted" if note else "keep a --reserve",
        )
