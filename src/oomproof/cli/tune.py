"""`oomproof tune`: QLoRA fine-tuning that is planned before it begins, and resumable."""

from __future__ import annotations

import json as json_module
import logging
import warnings
from typing import Annotated, Any

import typer

from oomproof.cli import options
from oomproof.errors import InputError
from oomproof.tuning.launched import is_first

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="A .jsonl (messages, prompt and completion, or text) or .txt file, or a dataset of "
        "the hub: org/name, org/name:file.",
        metavar="FILE|ID",
        show_default=False,
    ),
]
Out = Annotated[
    str | None,
    typer.Option("--out", help="The adapter's folder to make.", metavar="DIR", show_default=False),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and write nothing; exit code 3: no fit.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on in --out from its last whole checkpoint.")
]
Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        help="With --dry-run: a machine that is not here: 24GiB, 2x RTX 4090.",
        show_default=False,
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        min=1,
        help="With --dry-run: processes that train together, a GPU each. [default: as many as a "
        "launcher started]",
        show_default=False,
    ),
]
Shard = Annotated[
    str,
    typer.Option(
        "--shard",
        help="Whether each of several processes holds a part of the frozen layers: on, off, or "
        "auto: where whole ones leave too little room.",
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="Of the frozen weights; auto: nf4-dq, or what the checkpoint is quantized in.",
    ),
]
Rank = Annotated[int, typer.Option("--rank", help="Of the adapter.")]
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha", help="The adapter counts alpha / rank. [default: 2 × rank]", show_default=False
    ),
]
Dropout = Annotated[float, typer.Option("--dropout", help="Of the adapter's input.")]
Targets = Annotated[
    str, typer.Option("--target-modules", help="Linears that get one: q_proj,v_proj.")
]
Context = Annotated[
    str | None,
    typer.Option(
        "--context",
        help="Tokens of a sequence: 1024, 4k. [default: 2k, or the model's maximum]",
        show_default=False,
    ),
]
LongSamples = Annotated[
    str, typer.Option("--long-samples", help="Longer ones: refuse, truncate or drop.")
]
Packing = Annotated[
    bool, typer.Option("--packing/--no-packing", help="Put several samples into a sequence.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Sequences of an optimizer step.")]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        "--micro-batch", help="Sequences at once. [default: as many as fit]", show_default=False
    ),
]
Epochs = Annotated[float, typer.Option("--epochs", help="Times through the data.")]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", help="Optimizer steps at most.", show_default=False)
]
LearningRate = Annotated[
    float, typer.Option("--learning-rate", help="At its height; it falls along a cosine.")
]
Warmup = Annotated[float, typer.Option("--warmup", help="Share of the steps in which it rises.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="Of the adapter.")]
MaxGradNorm = Annotated[float, typer.Option("--max-grad-norm", help="Gradients are clipped at it.")]
Optimizer = Annotated[
    str,
    typer.Option(
        "--optimizer",
        help="adamw, adamw-8bit, paged-adamw, paged-adamw-8bit, or auto: the first that fits.",
    ),
]
Checkpointing = Annotated[
    str,
    typer.Option(
        "--checkpointing",
        help="Of activations: none, layers (computed again), offload (their inputs in host "
        "memory), or auto: the fastest that fits.",
    ),
]
Validation = Annotated[
    float, typer.Option("--validation", help="Share of the samples that is held out; 0 for none.")
]
Evaluations = Annotated[
    int, typer.Option("--evaluations", help="How often they are evaluated over the run.")
]
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience", help="Stop after so many evaluations without a new best.", show_default=False
    ),
]
SaveEvery = Annotated[
    int | None,
    typer.Option(
        "--save-every",
        help="Steps between checkpoints. [default: at each evaluation]",
        show_default=False,
    ),
]
Keep = Annotated[int, typer.Option("--keep-checkpoints", help="How many stay.")]
ComputeDtype = Annotated[
    str, typer.Option("--compute-dtype", help="auto, bfloat16, float16 or float32.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of adapter, split, order and dropout.")]


def tune(
    model: options.Model,
    data: Data,
    out: Out = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    gpus: Gpus = None,
    ranks: Ranks = None,
    shard: Shard = "auto",
    format: Format = "auto",
    rank: Rank = 16,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    context: Context = None,
    long_samples: LongSamples = "refuse",
    packing: Packing = True,
    batch_size: BatchSize = 16,
    micro_batch: MicroBatch = None,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = None,
    learning_rate: LearningRate = 2e-4,
    warmup: Warmup = 0.03,
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    optimizer: Optimizer = "auto",
    checkpointing: Checkpointing = "auto",
    validation: Validation = 0.05,
    evaluations: Evaluations = 10,
    patience: Patience = None,
    save_every: SaveEvery = None,
    keep_checkpoints: Keep = 2,
    engine: options.Engine = "auto",
    compute_dtype: ComputeDtype = "auto",
    seed: Seed = 0,
    max_memory: options.MaxMemory = None,
    reserve: options.Reserve = None,
    cap: options.Cap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Fine-tune a LoRA adapter on quantized weights (QLoRA), planned, checkpointed, resumable."""
    from oomproof import session
    from oomproof.cli.render import loading_progress, say
    from oomproof.cli.render_tune import (
        print_training_plan,
        print_tuning,
        say_training_plan,
        training_progress,
    )

    wanted: dict[str, Any] = {
        "format": format,
        "rank": rank,
        "alpha": float(2 * rank) if alpha is None else alpha,
        "dropout": dropout,
        "target_modules": target_modules,
        "context": context,
        "long_samples": long_samples,
        "packing": packing,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "epochs": epochs,
        "max_steps": max_steps,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "optimizer": optimizer,
        "checkpointing": checkpointing,
        "validation": validation,
        "evaluations": evaluations,
        "patience": patience,
        "save_every": save_every,
        "keep_checkpoints": keep_checkpoints,
        "engine": engine,
        "shard": shard,
        "compute_dtype": compute_dtype,
        "seed": seed,
    }
    limits: dict[str, Any] = {
        "max_memory": options.parse_max_memory(max_memory),
        "reserve": reserve or 0,
        "cap": cap,
        "revision": revision,
    }
    tells = is_first()
    if not tells:
        # Of several processes one speaks; the others have errors to tell, and nothing else.
        logging.disable(logging.ERROR)
        warnings.simplefilter("ignore")
    if dry_run:
        if not tells:
            return
        with loading_progress() as progress:
            plan = session.plan_tuning(
                model, data, gpus=gpus, ranks=ranks, progress=progress, **limits, **wanted
            )
        if json:
            typer.echo(plan.to_json())
        else:
            print_training_plan(plan)
        raise typer.Exit(0 if plan.fits else 3)
    if gpus is not None:
        raise InputError("--gpus describes a machine that is not here", remedy="add --dry-run")
    if ranks is not None:
        raise InputError(
            f"--ranks {ranks} says what a launcher would start",
            remedy=f"add --dry-run, or start with torchrun --nproc-per-node {ranks} -m oomproof",
        )
    if out is None:
        raise InputError("--out is missing", remedy="give the folder to make: --out DIR")
    with training_progress(quiet=not tells) as live:
        report = session.tune(
            model,
            data,
            out,
            resume=resume,
            progress=live.stage,
            on_plan=say_training_plan,
            on_event=live.event,
            trust_remote_code=trust_remote_code,
            **limits,
            **wanted,
        )
    if not tells:
        raise typer.Exit(0 if report.finished else 130)
    if json:
        typer.echo(json_module.dumps(report.as_dict(), indent=2))
    elif report.finished:
        print_tuning(report, out)
    if not report.finished:
        say(
            f"stopped after step {report.steps:,} of {report.planned_steps:,}, and saved: "
            "the same command with --resume goes on"
        )
        raise typer.Exit(130)
