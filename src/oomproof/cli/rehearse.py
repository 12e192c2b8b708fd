"""`oomproof rehearse`: the plan at full size with random weights, measured."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from oomproof.cli import options
from oomproof.errors import InputError, LoadError

Tune = Annotated[
    bool, typer.Option("--tune", help="Rehearse a fine-tuning instead: a few steps, no data.")
]
_OF_TUNE = "With --tune: as of `tune`."
Rank = Annotated[int | None, typer.Option("--rank", help=_OF_TUNE, show_default=False)]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help=_OF_TUNE, show_default=False)]
MicroBatch = Annotated[int | None, typer.Option("--micro-batch", help=_OF_TUNE, show_default=False)]
Optimizer = Annotated[str | None, typer.Option("--optimizer", help=_OF_TUNE, show_default=False)]
Checkpointing = Annotated[
    str | None, typer.Option("--checkpointing", help=_OF_TUNE, show_default=False)
]


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
    tune: Tune = False,
    rank: Rank = None,
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = None,
    optimizer: Optimizer = None,
    checkpointing: Checkpointing = None,
    json: options.Json = False,
) -> None:
    """Prove a plan on this machine without a download: random weights, filled and timed."""
    from oomproof import session

    of_tune = {
        "rank": rank,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "optimizer": optimizer,
        "checkpointing": checkpointing,
    }
    if tune:
        others = {
            "kv-format": kv_format != "auto",
            "concurrency": concurrency != "1",
            "offload": offload != "none",
            "force": force,
            "search": search,
            "calibration": calibration is not None,
            "adapter": adapter is not None,
            "allow-pickle": allow_pickle,
        }
        for name, is_given in others.items():
            if is_given:
                raise InputError(f"--{name} has no meaning with --tune", remedy="leave it out")
        _rehearse_tuning(
            model,
            json=json,
            format=format,
            context=context,
            engine=engine,
            max_memory=options.parse_max_memory(max_memory),
            reserve=reserve or 0,
            cap=cap,
            revision=revision,
            **{name: value for name, value in of_tune.items() if value is not None},
        )
        return
    given = [name.replace("_", "-") for name, value in of_tune.items() if value is not None]
    if given:
        raise InputError(f"--{given[0]} is about training", remedy="add --tune, or leave it out")
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


def _rehearse_tuning(model: str, *, json: bool, **asked: Any) -> None:
    from oomproof import session
    from oomproof.cli.render import loading_progress
    from oomproof.cli.render_tune import print_rehearsal, say_rehearsed_plan

    with loading_progress() as progress:
        rehearsal = session.rehearse_tuning(
            model, progress=progress, on_plan=say_rehearsed_plan, **asked
        )
    if json:
        typer.echo(json_module.dumps(rehearsal.as_dict(), indent=2))
    else:
        print_rehearsal(rehearsal)
    if rehearsal.failed is not None:
        raise LoadError(f"the rehearsal ended early: {rehearsal.failed}", remedy="keep a --reserve")
    if rehearsal.exceeded:
        raise LoadError("; ".join(rehearsal.exceeded), remedy="keep a --reserve")
    if not rehearsal.kept_its_promise:
        raise LoadError("the loss is no number", remedy="use --compute-dtype float32 to tune")
