"""From a plan to a contract that can be executed here and now, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from oomproof.asking import plan
from oomproof.errors import (
    InputError,
    MissingDependencyError,
    NotRunnableError,
    PlanDoesNotFitError,
    PlanMismatchError,
)
from oomproof.hardware.probe import probe
from oomproof.models.adapter import with_adapter
from oomproof.models.resolve import resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.starting import Contract
from oomproof.units import format_bytes

RUN_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "jinja2", "tenacity")

Progress = Callable[[str, int, int], None]
"""Called with ("download" or "load", bytes done, bytes in all)."""


def require_run_packages() -> None:
    """Checks that the packages of the [run] extra are there, without importing them.

    Raises:
        MissingDependencyError: One of them is not, with the line that installs them all.
    """
    for package in RUN_PACKAGES:
        if find_spec(package) is None:
            raise MissingDependencyError(package, install="pip install 'oomproof[run]'")


def agree(
    model: Plan | str | Path, options: Mapping[str, Any], *, needs_checkpoint: bool = True
) -> Contract:
    """The plan to execute, or the reason why there is none."""
    contract, refusal = agree_or_refuse(model, options, needs_checkpoint=needs_checkpoint)
    if refusal is not None:
        raise refusal
    return contract


def agree_or_refuse(
    model: Plan | str | Path, options: Mapping[str, Any], *, needs_checkpoint: bool = True
) -> tuple[Contract, PlanDoesNotFitError | None]:
    """As `agree`; where memory alone is missing, with that refusal."""
    require_run_packages()
    if isinstance(model, Plan):
        if options:
            raise InputError(
                f"a plan is loaded as it is; {', '.join(options)} cannot change it",
                remedy="give them to oomproof.plan",
            )
        agreed = model
    else:
        agreed = plan(model, **options)
    refusal = _refuse_unexecutable(agreed)
    spec = _spec_of(agreed)
    if needs_checkpoint:
        spec = with_checkpoint(spec)
    if spec.fingerprint != agreed.fingerprint:
        raise PlanMismatchError(
            (f"{agreed.source.path} is another model than the one that was planned",)
        )
    return Contract(plan=agreed, spec=spec, hardware=probe()), refusal


def _spec_of(agreed: Plan) -> ModelSpec:
    """The model of a plan, with the adapter that was planned."""
    spec = resolve(agreed.source.path, revision=agreed.source.revision)
    return with_planned_adapter(spec, agreed)


def with_planned_adapter(spec: ModelSpec, agreed: Plan) -> ModelSpec:
    """A plan's model with its adapter, where it has one.

    Raises:
        MissingDependencyError: The plan's engine needs peft for it, which is not installed.
        PlanMismatchError: The folder holds another adapter than was planned.
        OomproofError: As `with_adapter`.
    """
    if agreed.adapter is None:
        return spec
    require_adapter_packages(agreed)
    spec = with_adapter(spec, agreed.adapter.path)
    assert spec.adapter is not None
    if spec.adapter.fingerprint != agreed.adapter.fingerprint:
        raise PlanMismatchError(
            (f"{agreed.adapter.path} is another adapter than the one that was planned",)
        )
    return spec


def require_adapter_packages(agreed: Plan) -> None:
    """Checks that peft is there, where a plan needs it, without importing it.

    Raises:
        MissingDependencyError: It is not.
    """
    if agreed.adapter is None or agreed.engine != "transformers":
        return
    if find_spec("peft") is None:
        raise MissingDependencyError("peft", install="pip install 'oomproof[tune]'")


def _refuse_unexecutable(agreed: Plan) -> PlanDoesNotFitError | None:
    """Raises what nothing helps against; returns that memory is missing."""
    if not agreed.runnable:
        other = _engine_that_runs(agreed)
        if other is not None:
            raise NotRunnableError(
                f"{agreed.model} in {agreed.format} cannot be run as asked: {agreed.not_runnable}",
                remedy=f"use --engine {other}, or leave --engine out",
            )
        raise NotRunnableError(
            f"no engine here runs {agreed.model} in {agreed.format}: {agreed.not_runnable}"
        )
    if not agreed.fits:
        return PlanDoesNotFitError(
            f"{agreed.model} does not fit: {format_bytes(agreed.shortfall_bytes)} missing",
            shortfall_bytes=agreed.shortfall_bytes,
            remedy=_what_would_fit(agreed),
        )
    if agreed.refused is not None:
        raise NotRunnableError(agreed.refused, remedy="use a smaller format, or --force")
    return None


def _engine_that_runs(agreed: Plan) -> str | None:
    """The engine that would run a plan here, had none been asked for; None where none does."""
    spec = resolve(agreed.source.path, revision=agreed.source.revision)
    if agreed.adapter is not None:
        spec = with_adapter(spec, agreed.adapter.path)
    request = PlanRequest(
        format=agreed.format,
        kv_format=agreed.kv_format,
        context=agreed.context,
        concurrency=agreed.concurrency,
        compute_dtype=agreed.compute_dtype,
        offload=agreed.offload,
        search=agreed.search,
    )
    free = make_plan(spec, probe(), request)
    return free.engine if free.runnable and free.engine != agreed.engine else None


def _what_would_fit(agreed: Plan) -> str:
    if agreed.max_context:
        return f"use --context {agreed.max_context}"
    for other in agreed.alternatives:
        if other.fits and other.runnable:
            return f"use --format {other.format}"
    return "use a smaller model, or see `oomproof plan`"


def fetch(spec: ModelSpec, progress: Progress | None, *, trust_remote_code: bool) -> Path:
    """The folder with the model's files, downloaded where they are not here yet."""
    if spec.source.kind == "folder":
        return Path(spec.source.path)
    from oomproof.models.hub import download

    return download(
        spec.source.path,
        spec.source.revision or "main",
        progress=of_stage(progress, "download"),
        trust_remote_code=trust_remote_code,
    )


def of_stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """Who is told of one stage's bytes; None where nobody listens."""
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)
