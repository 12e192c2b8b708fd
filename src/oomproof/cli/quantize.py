"""`oomproof quantize`: a model's checkpoint in 4 bits, as a folder that transformers reads."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from oomproof.cli import options
from oomproof.errors import InputError

QuantizeFormat = Annotated[
    str, typer.Option("--format", help="nf4, nf4-dq, fp4 or fp4-dq, as bitsandbytes has them.")
]
Out = Annotated[
    str | None,
    typer.Option("--out", help="The folder to make.", metavar="DIR", show_default=False),
]
DType = Annotated[
    str,
    typer.Option(
        "--dtype", help="Of what is not quantized: bf16, fp16, fp32, or auto: the model's own."
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="What quantizes: auto (a GPU, if any), cpu, cuda, cuda:1.")
]
Search = Annotated[
    bool | None,
    typer.Option(
        "--search/--no-search",
        help="Search block scales for the least error (the default), or take bitsandbytes' own.",
        show_default=False,
    ),
]
Shard = Annotated[str, typer.Option("--shard", help="The most that a file of weights has.")]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Instead: compare a folder that this command wrote with its digests."
    ),
]


def quantize(
    model: options.Model,
    out: Out = None,
    format: QuantizeFormat = "nf4-dq",
    dtype: DType = "auto",
    device: Device = "auto",
    search: Search = None,
    shard: Shard = "1GiB",
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    verify: Verify = False,
    json: options.Json = False,
) -> None:
    """Write a model in 4 bits, in bounded memory, while it downloads; resumable and checksummed."""
    from oomproof import session
    from oomproof.cli.render import loading_progress, say
    from oomproof.units import format_bytes

    if verify:
        if out is not None:
            raise InputError("--verify writes nothing", remedy="leave --out or --verify out")
        files = session.verify(model)
        typer.echo(json_module.dumps({"files": files}) if json else f"{files} files are as written")
        return
    if out is None:
        raise InputError("--out is missing", remedy="give the folder to make: --out DIR")
    options.convert_pickle(model, allowed=allow_pickle)
    try:
        with loading_progress() as progress:
            report = session.quantize(
                model,
                out,
                format=format,
                dtype=dtype,
                device=device,
                search=search,
                shard=shard,
                revision=revision,
                allow_pickle=allow_pickle,
                progress=progress,
            )
    except KeyboardInterrupt:
        say("[files that are finished are kept: the same command goes on behind them]")
        raise
    if report.was_there:
        say("[it was there already, whole: nothing was written]")
    elif report.resumed_files:
        say(f"[shards finished before: {report.resumed_files}]")
    if json:
        typer.echo(json_module.dumps(report.as_dict(), indent=2))
        return
    typer.echo(
        f"{out}: {format_bytes(report.source_bytes)} of weights → "
        f"{format_bytes(report.output_bytes)} in {report.format} and {report.dtype}, "
        f"block scales {report.block_scales}, {report.files} files, "
        f"{report.seconds:.1f} s on {report.device}"
    )
