"""What is measured on this machine: a plan at full size, its speed, its fastest launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oomproof.agreement import (
    Progress,
    agree,
    fetch,
    of_stage,
    require_adapter_packages,
    require_run_packages,
)
from oomproof.asking import plan
from oomproof.errors import InputError, NotRunnableError, PlanDoesNotFitError
from oomproof.formats import FIT, FORMATS
from oomproof.models.resolve import with_checkpoint
from oomproof.planning.notes import read_notes, write_notes
from oomproof.planning.plan import Plan
from oomproof.starting import Contract, import_engine, rehearsable, start_timed, tune_launches
from oomproof.units import format_bytes

if TYPE_CHECKING:
    from oomproof.engine.bench import BenchReport, Timing
    from oomproof.engine.rehearsal import Rung
    from oomproof.engine.rehearse import Rehearsal
    from oomproof.engine.tune import Told, TuningReport


def rehearse(
    model: Plan | str | Path,
    *,
    progress: Progress | None = None,
    on_rung: Callable[[Rung], None] | None = None,
    keep_note: bool = True,
    **options: Any,
) -> Rehearsal:
    """Runs a plan at full size with random weights made on the devices: no download, no file.

    Allocates, loads, climbs a prefill ladder up to the planned context and requests, decodes, and
    compares every term with its prediction. What it measures is noted, also of one that fails, and
    the next plan on this machine uses it.

    Args:
        model: A plan of this machine, or what `plan` takes.
        progress: Told of bytes made ("load", done, total).
        on_rung: Told of each rung of the ladder.
        keep_note: Whether what was measured is noted.
        options: Those of `plan`, where `model` is not a plan.

    Raises:
        MissingDependencyError, PlanDoesNotFitError, NotRunnableError, InputError: As `load` does.
    """
    contract = agree(model, options, needs_checkpoint=False)
    _refuse_made_up(contract.plan, "rehearse")
    from oomproof.engine.rehearse import rehearse_plan

    notes = read_notes()
    rehearsal = rehearse_plan(
        contract.plan,
        contract.spec,
        contract.hardware,
        rehearsable(contract, of_stage(progress, "load")),
        on_rung=on_rung,
    )
    if keep_note and (found := rehearsal.notes(notes)):
        write_notes(found)
    return rehearsal


def bench(
    model: Plan | str | Path,
    *,
    against: str | None = None,
    random_weights: bool = False,
    requests: Sequence[int] = (1, 4, 16),
    contexts: Sequence[int] = (128, 2048, 8192),
    progress: Progress | None = None,
    told: Callable[[str, Timing], None] | None = None,
    **options: Any,
) -> BenchReport:
    """Times a model on this machine: loading, prompts, and decoding over requests and context.

    Args:
        model: A plan of this machine, or what `plan` takes.
        against: "transformers": the same model, format and machine through that engine, in turn.
        random_weights: Weights made up on the devices instead of the checkpoint's; what a model of
            the catalog has anyway.
        requests: Requests at once; more than the plan's concurrency count as that.
        contexts: Tokens of context; more than the plan has room for count as what it has.
        progress: Told of bytes loaded.
        told: Told of each figure, with the engine's name.
        options: Those of `plan`, where `model` is not a plan.

    Raises:
        InputError: Nothing to compare with, nothing to time, or as `plan`.
        MissingDependencyError, PlanDoesNotFitError, NotRunnableError: As `load` does, of either
            engine.
    """
    if against not in (None, "transformers"):
        raise InputError(
            f"nothing to compare with is called {against[:40]!r}", remedy="use transformers"
        )
    require_run_packages()
    from oomproof.engine.bench import Contender, check_points, run_bench
    from oomproof.loading.devices import prepare_devices, release_devices

    check_points(requests, contexts)
    if not isinstance(model, Plan):
        options.setdefault("concurrency", max(requests))
    contract = agree(model, options, needs_checkpoint=False)
    own = contract.plan
    made_up = random_weights or contract.spec.source.kind == "catalog"
    if made_up:
        _refuse_made_up(own, "bench")
    contracts = [contract]
    if against is not None:
        contracts.append(_peer(contract, against, options))
    folder = None
    if not made_up:
        spec = with_checkpoint(contract.spec)
        contracts = [replace(one, spec=spec) for one in contracts]
        folder = fetch(spec, progress, trust_remote_code=False)
    for one in contracts:
        import_engine(one)
    told_bytes = of_stage(progress, "load")
    contenders = [
        Contender(plan=one.plan, start=partial(start_timed, one, folder, told_bytes))
        for one in contracts
    ]
    # The machine is measured before an engine is there: CUDA starts then.
    prepare_devices(own, contract.hardware)
    try:
        return run_bench(contenders, contracts[0].spec, requests, contexts, told=told)
    finally:
        release_devices(own)


def tune_kernels(
    model: Plan | str | Path,
    *,
    requests: Sequence[int] = (1, 4, 16),
    told: Told | None = None,
    **options: Any,
) -> TuningReport:
    """Times every launch that the products of decode steps can have here, and keeps the fastest.

    Weights are made up, in the model's shapes; from then on loading on such a GPU uses what was
    found. Results change by their rounding alone.

    Args:
        model: A plan of this machine, or what `plan` takes, with a format of 4 bits.
        requests: Requests at once; steps of up to so many are tuned, of 16 at most.
        told: Told of each product, with the device's name.
        options: Those of `plan`, where `model` is not a plan.

    Raises:
        InputError: The format has no launches to choose from, or what is found cannot be kept.
        NotRunnableError: No GPU, or not the native engine.
        MissingDependencyError, PlanDoesNotFitError: As `load` does.
    """
    require_run_packages()
    from oomproof.engine.bench import check_points

    check_points(requests, [1])
    if isinstance(model, Plan):
        adapted = model.adapter is not None
    else:
        adapted = options.get("adapter") is not None
    if adapted:
        raise InputError(
            "launches are tuned for the base model's products, whatever is added to them",
            remedy="leave --adapter out",
        )
    if not isinstance(model, Plan):
        options.setdefault("concurrency", max(requests))
    return tune_launches(agree(model, options, needs_checkpoint=False), told)


def _refuse_made_up(agreed: Plan, verb: str) -> None:
    if agreed.quantized_checkpoint is not None:
        raise NotRunnableError(
            f"{agreed.model} is quantized already, and random weights are made in 16 bits",
            remedy=f"{verb} its 16-bit model"
            + (f" with --format {agreed.format}" if agreed.format in FORMATS else ""),
        )


def _peer(contract: Contract, engine: str, options: Mapping[str, Any]) -> Contract:
    """The same plan for another engine, in the format that is nearest to it."""
    own = contract.plan
    if own.engine == engine:
        raise InputError(
            f"{own.model} in {own.format} is planned for {engine} itself, so there is nothing to "
            "compare with",
            remedy="leave --against out, or add --engine native",
        )
    if own.format == "fp32":
        raise InputError(
            f"{engine} has no format to compare fp32 with",
            remedy="use --format bf16, or leave --against out",
        )
    nearest = {"int8": "llm-int8", "fp8": "llm-int8", "int4": "nf4", "nf4-g16": "nf4", FIT: "nf4"}
    limits = {d.index: d.limit_bytes for d in own.devices if d.limit_bytes is not None}
    other = plan(
        own.source.path,
        **{
            "max_memory": limits,
            **options,
            "format": nearest.get(own.format, own.format),
            "engine": engine,
            "search": False,
            "calibration": None,
            "kv_format": "auto",
            "context": own.context,
            "concurrency": own.concurrency,
            "revision": own.source.revision,
            "adapter": None if own.adapter is None else own.adapter.path,
        },
    )
    remedy = "leave --against out, or plan what both engines run"
    what = f"{engine}, to be compared with,"
    if not other.runnable:
        raise NotRunnableError(
            f"{what} does not run {own.model} in {other.format}: {other.not_runnable}",
            remedy=remedy,
        )
    if not other.fits:
        raise PlanDoesNotFitError(
            f"{what} has no room for {own.model} in {other.format}, context {other.context} and "
            f"{other.concurrency} requests: {format_bytes(other.shortfall_bytes)} missing",
            shortfall_bytes=other.shortfall_bytes,
            remedy="use a smaller --context, fewer --requests, or leave --against out",
        )
    require_adapter_packages(other)
    return Contract(plan=other, spec=contract.spec, hardware=contract.hardware)
