"""A fine-tuning under way: what the first rank does, and the others; one process is the first.

The first one reads, plans and writes; the others come when all of that is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from oomproof.agreement import Progress, fetch, of_stage
from oomproof.errors import InputError, OomproofError, PlanDoesNotFitError
from oomproof.hardware.probe import probe
from oomproof.hardware.spec import Hardware
from oomproof.models.checkpoint import TOKENIZER_FILES
from oomproof.models.resolve import resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.planning.request import PlanRequest
from oomproof.planning.spelled import read_bytes, read_limits, read_reserve
from oomproof.units import GIB

if TYPE_CHECKING:
    from oomproof.tuning.distributed import Ranks
    from oomproof.tuning.job import TuneFolder
    from oomproof.tuning.options import TuningSettings
    from oomproof.tuning.plan import TrainingPlan
    from oomproof.tuning.planner import TrainingPlanner
    from oomproof.tuning.prepare import Prepared
    from oomproof.tuning.progress import OnTuning
    from oomproof.tuning.report import TuningReport

DEFAULT_FORMAT = "nf4-dq"
_MAX_TOKENIZER_BYTES = GIB // 16
_NOT_OF_THE_WEIGHTS = (
    "micro_batch",
    "checkpointing",
    "keep_checkpoints",
    "save_every",
    "optimizer",
    "shard",
)
"""Options that a resumed run may change, or that the plan chooses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The arguments of `tune`, as this rank goes about them."""

    model: str
    data: str | Path
    out: str | Path
    resume: bool
    asked: TuningSettings
    limits: Mapping[str, Any]
    revision: str | None
    progress: Progress | None
    on_plan: Any
    on_event: OnTuning
    trust_remote_code: bool


def lead(order: Order, ranks: Ranks, hardware: Hardware) -> TuningReport:
    """What the first rank does: it reads, plans and writes, and tells the others when to come."""
    from oomproof.conversion.files import explained
    from oomproof.conversion.work import locked
    from oomproof.tuning.cache import digest_of_data
    from oomproof.tuning.hub_data import find_data
    from oomproof.tuning.job import (
        REPORT_FILE,
        agree_with_finished,
        agree_with_job,
        open_folder,
        read_chosen,
    )
    from oomproof.tuning.prepare import make_training_plan, prepare, settle
    from oomproof.tuning.remedies import describe_shortfall

    spec = resolve(order.model, revision=order.revision)
    asked = with_format(order.asked, spec)
    folder = open_folder(order.out, resume=order.resume)
    path = find_data(order.data)
    settings = settle(asked, dict(read_chosen(folder)))
    planner = planner_of(spec, settings, hardware, ranks=ranks.size, **order.limits)
    tokenizer_folder = tokenizer_folder_of(spec)
    if folder.is_finished:
        sha256, _ = digest_of_data(path)
        agree_with_finished(folder, _asked_of(spec, asked, sha256))
        report = _finished(folder.read(REPORT_FILE) or {}, folder.path)
        ranks.share(report)
        return report
    is_new = not folder.path.exists()
    with explained(folder.work):
        folder.work.mkdir(parents=True, exist_ok=True)
    with locked(folder.work):
        try:
            prepared = prepare(
                path,
                tokenizer_folder,
                folder.cache,
                spec,
                settings,
                told=order.progress,
                trust_remote_code=order.trust_remote_code,
            )
            plan = make_training_plan(planner, prepared, spec)
            if order.on_plan is not None:
                order.on_plan(plan)
            if not plan.fits:
                message, remedy = describe_shortfall(plan)
                raise PlanDoesNotFitError(
                    message, shortfall_bytes=plan.shortfall_bytes, remedy=remedy
                )
        except OomproofError:
            if is_new:  # nothing of it is worth keeping
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        agree_with_job(
            folder,
            _job(spec, asked, plan, prepared.cache.facts.sha256),
            {
                "micro_batch": plan.micro_batch,
                "optimizer": plan.optimizer,
                "checkpointing": plan.checkpointing,
            },
        )
        spec = with_checkpoint(spec)
        base = fetch(spec, order.progress, trust_remote_code=order.trust_remote_code)
        ranks.share((folder, settings, plan))
        return _run(
            order,
            ranks,
            hardware,
            spec=spec,
            base=base,
            folder=folder,
            settings=settings,
            plan=plan,
            prepared=prepared,
        )


def follow(order: Order, ranks: Ranks, hardware: Hardware) -> TuningReport:
    """What the other ranks do: they find everything there."""
    from oomproof.tuning.hub_data import find_data
    from oomproof.tuning.prepare import prepare

    found = ranks.share()
    if not isinstance(found, tuple):
        report: TuningReport = found
        return report
    folder, settings, plan = found
    spec = resolve(order.model, revision=order.revision)
    prepared = prepare(
        find_data(order.data),
        tokenizer_folder_of(spec),
        folder.cache,
        spec,
        settings,
        trust_remote_code=order.trust_remote_code,
    )
    spec = with_checkpoint(spec)
    base = fetch(spec, None, trust_remote_code=order.trust_remote_code)
    return _run(
        order,
        ranks,
        hardware,
        spec=spec,
        base=base,
        folder=folder,
        settings=settings,
        plan=plan,
        prepared=prepared,
    )


def _run(  # noqa: PLR0913 - everything that a run is made of
    order: Order,
    ranks: Ranks,
    hardware: Hardware,
    *,
    spec: ModelSpec,
    base: Path,
    folder: TuneFolder,
    settings: TuningSettings,
    plan: TrainingPlan,
    prepared: Prepared,
) -> TuningReport:
    from oomproof.tuning.assemble import assemble, close_device
    from oomproof.tuning.joining import on_own_device

    plan = on_own_device(plan, ranks, hardware)
    if ranks.size == 1:
        hardware = probe()
    else:  # as it was before they came together: contexts and NCCL are in the plan
        hardware = replace(hardware, devices=(hardware.devices[ranks.rank],))
    tuning = assemble(
        spec,
        base,
        folder,
        plan,
        settings,
        prepared,
        hardware=hardware,
        on_event=order.on_event,
        ranks=ranks,
        progress=of_stage(order.progress, "load"),
        trust_remote_code=order.trust_remote_code,
    )
    from oomproof.tuning.run import TuningRun

    try:
        return TuningRun(tuning).run()
    finally:
        close_device(plan)


def with_format(settings: TuningSettings, spec: ModelSpec) -> TuningSettings:
    """The same with a format that is named."""
    if settings.format != "auto":
        return settings
    own = spec.checkpoint_quantization
    if own is None or own.format is None:
        return replace(settings, format=DEFAULT_FORMAT)
    return replace(settings, format=own.held_as or own.format.name)


def planner_of(
    spec: ModelSpec,
    settings: TuningSettings,
    hardware: Hardware,
    *,
    ranks: int = 1,
    max_memory: Mapping[int | Literal["cpu"], int | str] | None,
    reserve: int | str,
    cap: int | str | None,
) -> TrainingPlanner:
    """Plans that model with those options, on that machine or for ranks on it.

    Raises:
        InputError, HardwareError, NotRunnableError: It cannot be served; see TrainingPlanner.
    """
    from oomproof.tuning.engines import choose_engine
    from oomproof.tuning.planner import TrainingPlanner

    limits = read_limits(max_memory)
    request = PlanRequest(
        format=settings.format,
        reserve_bytes=read_reserve(reserve),
        max_memory={index: size for index, size in limits.items() if index != "cpu"},
        max_host_bytes=limits.get("cpu"),
        cap_bytes=read_bytes(cap, "cap"),
        compute_dtype=settings.compute_dtype,
    )
    device = max(hardware.devices, key=lambda one: one.free_bytes)
    engine = choose_engine(settings.engine, spec, settings.format, settings.compute_dtype, device)
    return TrainingPlanner(
        spec,
        hardware,
        request,
        settings,
        engine=engine,
        ranks=ranks,
    )


def tokenizer_folder_of(spec: ModelSpec) -> Path:
    """The model's tokenizer, downloaded without its weights where it is not here."""
    if spec.source.kind == "folder":
        return Path(spec.source.path)
    from oomproof.models.hub_client import HubClient

    hub = HubClient.from_environment()
    repo, commit = spec.source.path, spec.source.revision or "main"
    snapshot = hub.complete_snapshot(repo, commit)
    if snapshot is not None:
        return snapshot
    if hub.offline:
        raise hub.not_cached(repo, "its tokenizer is not")
    listing = hub.list_files(repo, commit)
    folders = [
        hub.fetch_small(repo, name, commit, listing, _MAX_TOKENIZER_BYTES).parent
        for name in ("config.json", "generation_config.json", *TOKENIZER_FILES)
        if name in listing.sizes
    ]
    return folders[-1]


def _job(
    spec: ModelSpec, settings: TuningSettings, plan: TrainingPlan, sha256: str
) -> dict[str, Any]:
    """Everything that decides the adapter's values."""
    asked = _asked_of(spec, settings, sha256)
    return {
        "model": asked["model"],
        "data": asked["data"],
        "engine": plan.engine,
        "compute_dtype": plan.compute_dtype,
        "optimizer": plan.optimizer,
        "ranks": plan.ranks,
        "options": asked["options"],
    }


def _asked_of(spec: ModelSpec, settings: TuningSettings, sha256: str) -> dict[str, Any]:
    """The part of it that is known without a plan."""
    options = {k: v for k, v in settings.as_dict().items() if k not in _NOT_OF_THE_WEIGHTS}
    return {
        "model": {
            "id": spec.source.path if spec.source.kind != "folder" else spec.id,
            "revision": spec.source.revision,
            "fingerprint": spec.fingerprint,
        },
        "data": sha256,
        "options": options,
    }


def _finished(content: Mapping[str, Any], folder: Path) -> TuningReport:
    from oomproof.tuning.report import TuningReport

    fields = TuningReport.__dataclass_fields__
    known = {name: content[name] for name in fields if name in content}
    if len(known) != len(fields):
        raise InputError(
            f"--out {folder} holds a finished adapter of another version",
            remedy="give another name",
        )
    return replace(TuningReport(**known), folder=str(folder))
