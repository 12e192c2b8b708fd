"""`oomproof merge`: a model with a LoRA adapter added to its weights, as a folder in 16 bits."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from oomproof.cli import options

Adapter = Annotated[
    str,
    typer.Option(
        "--adapter",
        help="The adapter's folder, as peft keeps it.",
        metavar="DIR",
        show_default=False,
    ),
]
Out = Annotated[
    str, typer.Option("--out", help="The folder to make.", metavar="DIR", show_default=False)
]
DType = Annotated[
    str, typer.Option("--dtype", help="Of the weights: bf16, fp16, fp32, or auto: the model's own.")
]
Device = Annotated[
    str, typer.Option("--device", help="What computes: auto (a GPU, if any), cpu, cuda, cuda:1.")
]
Shard = Annotated[str, typer.Option("--shard", help="The most that a file of weights has.")]


def merge(
    model: options.Model,
    adapter: Adapter,
    out: Out,
    dtype: DType = "auto",
    device: Device = "auto",
    shard: Shard = "4GiB",
    revision: options.Revision = None,
    json: options.Json = False,
) -> None:
    """Write a model with a LoRA adapter merged, in 16 bits, in bounded memory; resumable."""
    from oomproof import session
    from oomproof.cli.render import loading_progress, say
    from oomproof.units import format_bytes

    with loading_progress() as progress:
        report = session.merge(
            model,
            adapter,
            out,
            dtype=dtype,
            device=device,
            shard=shard,
            revision=revision,
            progress=progress,
        )
    if report.resumed_files:
        say(f"[shards finished before: {report.resumed_files}]")
    if json:
        typer.echo(json_module.dumps(report.as_dict(), indent=2))
        return
    typer.echo(
        f"{out}: {report.merged} weights merged, {format_bytes(report.output_bytes)} in "
        f"{report.dtype}, {report.files} files, {report.seconds:.1f} s on {report.device}"
    )
