"""Wires probe, plan, load and engine together; every interface enters here.

plan(model, …)             → Plan
hand_off(model, target, …) → HandOff: the plan of another engine
load(plan or model, …)     → Model, which answers prompts
from_pretrained(model, …)  → an ordinary transformers model, placed by a plan
rehearse(plan or model, …) → Rehearsal: the plan at full size, with random weights
bench(plan or model, …)    → BenchReport: its speed against the machine's limits, and a peer's
tune(plan or model, …)     → TuningReport: the fastest launches of its products here, kept
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from oomproof.errors import (
    InputError,
    MissingDependencyError,
    NotRunnableError,
    PlanDoesNotFitError,
    PlanMismatchError,
)
from oomproof.hardware.describe import describe
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import Hardware
from oomproof.models.resolve import resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.planning.notes import read_notes, write_notes
from oomproof.planning.plan import Plan
from oomproof.planning.request import Offload, PlanRequest
from oomproof.planning.search import make_plan
from oomproof.planning.spelled import read_bytes, read_count, read_limits, read_tokens
from oomproof.starting import (
    Contract,
    import_engine,
    rehearsable,
    start_engine,
    start_timed,
    tune_launches,
)
from oomproof.units import format_bytes

if TYPE_CHECKING:
    from oomproof.engine.bench import BenchReport, Timing
    from oomproof.engine.model import Model
    from oomproof.engine.rehearsal import Rung
    from oomproof.engine.rehearse import Rehearsal
    from oomproof.engine.tune import Told, TuningReport
    from oomproof.guard.events import OnEvent
    from oomproof.planning.handoffs.handoff import HandOff

RUN_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "jinja2")

Progress = Callable[[str, int, int], None]
"""Called with ("download" or "load", bytes done, bytes in all)."""


def plan(  # noqa: PLR0913 - one keyword an option of the command line
    model: str | Path,
    *,
    gpus: str | None = None,
    format: str = "auto",  # noqa: A002 - the command line's word
    kv_format: str = "auto",
    context: int | str | None = None,
    concurrency: int | str = 1,
    max_memory: Mapping[int | Literal["cpu"], int | str] | None = None,
    reserve: int | str = 0,
    cap: int | str | None = None,
    engine: str = "auto",
    compute_dtype: str = "auto",
    offload: str = "none",
    force: bool = False,
    what_would_it_take: bool = False,
    revision: str | None = None,
) -> Plan:
    """Plans a model on this machine, or on a described one.

    Args:
        model: A folder, a hub id ("org/name"), a name of the catalog, or "tiny".
        gpus: A machine that is not here: "4x RTX 4090", "2x24GiB,1x12GiB".
        format: A weight format, or "auto": the best quality that fits.
        kv_format: "bf16", "fp16", "fp8", or "auto".
        context: Prompt and answer in tokens (8192, "8k"), "auto" for the largest that fits, None
            for min(8192, the model's maximum).
        concurrency: Requests at once; "auto" for as many as fit.
        max_memory: Device index → most bytes the plan may use there ("20GiB"); "cpu" → host RAM.
        reserve: Free memory of each device to leave alone.
        cap: Most bytes of each device, enforced while running too.
        engine: "native", "transformers", or "auto": ours where it knows the architecture.
        compute_dtype: What quantized weights are computed in: "bfloat16", "float16", "float32", or
            "auto": what the devices are made for.
        offload: "cpu" keeps layers that fit on no device in host memory, streamed in every step.
        force: Accepts a plan that streams at less than a token a second.
        what_would_it_take: Also looks for the smallest listed hardware on which it would fit.
        revision: Branch, tag or commit of a hub id.

    Raises:
        InputError: Any of these cannot be understood or served; see oomproof.errors.
    """
    spec = resolve(str(model), revision=revision)
    limits = read_limits(max_memory)
    request = PlanRequest(
        format=format,
        kv_format=kv_format,
        context=read_tokens(context),
        concurrency=read_count(concurrency),
        reserve_bytes=read_bytes(reserve, "reserve") or 0,
        max_memory={index: size for index, size in limits.items() if index != "cpu"},
        max_host_bytes=limits.get("cpu"),
        cap_bytes=read_bytes(cap, "cap"),
        engine=engine,
        compute_dtype=compute_dtype,
        offload=cast(Offload, offload),
        force=force,
        what_would_it_take=what_would_it_take,
    )
    return make_plan(spec, _hardware(gpus), request, read_notes() if gpus is None else None)


def hand_off(  # noqa: PLR0913 - one keyword an option of the command line
    model: str | Path,
    target: str,
    *,
    gpus: str | None = None,
    format: str = "auto",  # noqa: A002 - the command line's word
    kv_format: str = "auto",
    context: int | str | None = None,
    concurrency: int | str = 1,
    max_memory: Mapping[int | Literal["cpu"], int | str] | None = None,
    reserve: int | str = 0,
    cap: int | str | None = None,
    revision: str | None = None,
) -> HandOff:
    """Plans a model for another engine, in that engine's own format and words.

    Args:
        model: As for `plan`.
        target: "vllm", "llama.cpp" or "mlx".
        gpus: As for `plan`; for MLX also several Macs: "2x M2 Ultra 192GB".
        format: A format of the target, or "auto": the best quality that fits.
        kv_format: "fp8" for an 8-bit cache where the target has one.
        context: As for `plan`.
        concurrency: As for `plan`; "auto" is one.
        max_memory: As for `plan`.
        reserve: As for `plan`.
        cap: As for `plan`.
        revision: As for `plan`.

    Raises:
        InputError: Any of these cannot be understood or served.
        NotRunnableError: The target cannot run it: FP8 on a GPU without it, say.
    """
    from oomproof.planning.handoffs import hand_off as hand_over
    from oomproof.planning.handoffs import require_target

    require_target(target)
    spec = resolve(str(model), revision=revision)
    hardware = probe() if gpus is None else describe(gpus, several_machines=target == "mlx")
    limits = read_limits(max_memory)
    request = PlanRequest(
        kv_format=kv_format,
        context=read_tokens(context),
        concurrency=read_count(concurrency),
        reserve_bytes=read_bytes(reserve, "reserve") or 0,
        max_memory={index: size for index, size in limits.items() if index != "cpu"},
        cap_bytes=read_bytes(cap, "cap"),
    )
    return hand_over(target, spec, hardware, request, format_name=format)


def load(
    model: Plan | str | Path,
    *,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent | None = None,
    **options: Any,
) -> Model:
    """Loads a model as planned, ready to answer, and watches its memory (`oomproof top`).

    Args:
        model: A plan of this machine, or what `plan` takes.
        progress: Told of bytes downloaded and loaded.
        trust_remote_code: Lets transformers run code that the model's folder ships.
        on_event: Told once of each leak and of each term above its plan, in the thread that steps.
        options: Those of `plan`, where `model` is not a plan.

    Raises:
        MissingDependencyError: The [run] extra is not installed.
        PlanDoesNotFitError: The plan needs more memory than there is.
        NotRunnableError: No engine here runs it.
        LoadError: The checkpoint does not give what the plan promises.
        InputError: See `plan`.
    """
    contract = _agree(model, options)
    folder = _fetch(contract.spec, progress, trust_remote_code=trust_remote_code)
    from oomproof.compat.tokenizer import TransformersTokenizer, read_generation_defaults
    from oomproof.engine.model import Model
    from oomproof.guard.monitor import monitored

    defaults = read_generation_defaults(folder)
    parsing: list[Future[TransformersTokenizer]] = []
    with ThreadPoolExecutor(1) as beside:

        def parse() -> None:
            parsing.append(
                beside.submit(
                    TransformersTokenizer,
                    folder,
                    defaults=defaults,
                    trust_remote_code=trust_remote_code,
                )
            )

        # The tokenizer's files are parsed while the weights are on their way.
        engine = start_engine(
            contract,
            folder,
            _of_stage(progress, "load"),
            trust_remote_code=trust_remote_code,
            on_reading=parse,
        )
        try:
            tokenizer = parsing[0].result()
            watched = monitored(engine, contract.plan, on_event)
        except BaseException:
            engine.close()
            raise
    return Model(watched, tokenizer, contract.plan, defaults)


def from_pretrained(
    model: Plan | str | Path,
    *,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """An ordinary `transformers.PreTrainedModel`, placed and quantized by a plan.

    Its KV cache is transformers' own and grows as it generates; the plan left room for it. A cap
    stays in force for as long as the process lives.

    Args:
        model: A plan of this machine, or what `plan` takes.
        progress: Told of bytes downloaded and loaded.
        trust_remote_code: Lets transformers run code that the model's folder ships.
        options: Those of `plan`, where `model` is not a plan.

    Raises:
        OomproofError: As `load` does.
    """
    if not isinstance(model, Plan):
        options.setdefault("engine", "transformers")
    contract = _agree(model, options)
    _require_transformers(contract.plan)
    folder = _fetch(contract.spec, progress, trust_remote_code=trust_remote_code)
    from oomproof.compat.model import load_model
    from oomproof.loading.devices import prepare_devices

    prepare_devices(contract.plan, contract.hardware)
    return load_model(
        contract.plan,
        contract.spec,
        folder,
        progress=_of_stage(progress, "load"),
        trust_remote_code=trust_remote_code,
    )


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
    contract = _agree(model, options, needs_checkpoint=False)
    _refuse_made_up(contract.plan, "rehearse")
    from oomproof.engine.rehearse import rehearse_plan

    notes = read_notes()
    rehearsal = rehearse_plan(
        contract.plan,
        contract.spec,
        contract.hardware,
        rehearsable(contract, _of_stage(progress, "load")),
        on_rung=on_rung,
    )
    if keep_note and (found := rehearsal.notes(notes)):
        write_notes(found)
    return rehearsal


def _refuse_made_up(agreed: Plan, verb: str) -> None:
    if agreed.quantized_checkpoint is not None:
        raise NotRunnableError(
            f"{agreed.model} is quantized already, and random weights are made in 16 bits",
            remedy=f"{verb} its 16-bit model with --format {agreed.format}",
        )


def _require_transformers(agreed: Plan) -> None:
    if agreed.engine != "transformers":
        raise InputError(
            f"{agreed.model} is planned for the {agreed.engine} engine, not for transformers",
            remedy='plan it with engine="transformers"',
        )


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
    contract = _agree(model, options, needs_checkpoint=False)
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
        folder = _fetch(spec, progress, trust_remote_code=False)
    for one in contracts:
        import_engine(one)
    told_bytes = _of_stage(progress, "load")
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


def tune(
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
    if not isinstance(model, Plan):
        options.setdefault("concurrency", max(requests))
    return tune_launches(_agree(model, options, needs_checkpoint=False), told)


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
    nearest = {"int8": "llm-int8", "fp8": "llm-int8", "int4": "nf4"}
    limits = {d.index: d.limit_bytes for d in own.devices if d.limit_bytes is not None}
    other = plan(
        own.source.path,
        **{
            "max_memory": limits,
            **options,
            "format": nearest.get(own.format, own.format),
            "engine": engine,
            "kv_format": "auto",
            "context": own.context,
            "concurrency": own.concurrency,
            "revision": own.source.revision,
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
    return Contract(plan=other, spec=contract.spec, hardware=contract.hardware)


def require_run_packages() -> None:
    """Checks that the packages of the [run] extra are there, without importing them.

    Raises:
        MissingDependencyError: One of them is not, with the line that installs them all.
    """
    for package in RUN_PACKAGES:
        if find_spec(package) is None:
            raise MissingDependencyError(package, install="pip install 'oomproof[run]'")


def _agree(
    model: Plan | str | Path, options: Mapping[str, Any], *, needs_checkpoint: bool = True
) -> Contract:
    """The plan to execute, or the reason why there is none."""
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
    _refuse_unexecutable(agreed)
    spec = resolve(agreed.source.path, revision=agreed.source.revision)
    if needs_checkpoint:
        spec = with_checkpoint(spec)
    if spec.fingerprint != agreed.fingerprint:
        raise PlanMismatchError(
            (f"{agreed.source.path} is another model than the one that was planned",)
        )
    return Contract(plan=agreed, spec=spec, hardware=probe())


def _refuse_unexecutable(agreed: Plan) -> None:
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
        raise PlanDoesNotFitError(
            f"{agreed.model} does not fit: {format_bytes(agreed.shortfall_bytes)} missing",
            shortfall_bytes=agreed.shortfall_bytes,
            remedy=_what_would_fit(agreed),
        )
    if agreed.refused is not None:
        raise NotRunnableError(agreed.refused, remedy="use a smaller format, or --force")


def _engine_that_runs(agreed: Plan) -> str | None:
    """The engine that would run a plan here, had none been asked for; None where none does."""
    spec = resolve(agreed.source.path, revision=agreed.source.revision)
    request = PlanRequest(
        format=agreed.format,
        kv_format=agreed.kv_format,
        context=agreed.context,
        concurrency=agreed.concurrency,
        compute_dtype=agreed.compute_dtype,
        offload=agreed.offload,
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


def _fetch(spec: ModelSpec, progress: Progress | None, *, trust_remote_code: bool) -> Path:
    """The folder with the model's files, downloaded where they are not here yet."""
    if spec.source.kind == "folder":
        return Path(spec.source.path)
    from oomproof.models.hub import download

    return download(
        spec.source.path,
        spec.source.revision or "main",
        progress=_of_stage(progress, "download"),
        trust_remote_code=trust_remote_code,
    )


def _of_stage(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)


def _hardware(gpus: str | None) -> Hardware:
    return probe() if gpus is None else describe(gpus)
