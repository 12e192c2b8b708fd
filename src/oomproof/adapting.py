"""Fine-tuning: from a user's words to its plan, and to an adapter."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from oomproof.agreement import Progress, fetch, of_stage, require_run_packages
from oomproof.errors import (
    InputError,
    MissingDependencyError,
    OomproofError,
    PlanDoesNotFitError,
)
from oomproof.hardware.describe import describe
from oomproof.hardware.probe import probe
from oomproof.models.checkpoint import TOKENIZER_FILES
from oomproof.models.resolve import resolve, with_checkpoint
from oomproof.models.spec import ModelSpec
from oomproof.planning.request import PlanRequest
from oomproof.planning.spelled import read_bytes, read_limits, read_tokens
from oomproof.units import GIB

if TYPE_CHECKING:
    from oomproof.tuning.options import TuningSettings
    from oomproof.tuning.plan import TrainingPlan
    from oomproof.tuning.planner import TrainingPlanner
    from oomproof.tuning.progress import OnTuning
    from oomproof.tuning.rehearsal import TuningRehearsal
    from oomproof.tuning.report import TuningReport

TUNE_PACKAGES = ("peft",)
DEFAULT_FORMAT = "nf4-dq"
_MAX_TOKENIZER_BYTES = GIB // 16
_NOT_OF_THE_WEIGHTS = (
    "micro_batch",
    "checkpointing",
    "keep_checkpoints",
    "save_every",
    "optimizer",
)
"""Options that a resumed run may change, or that the plan chooses."""


def require_tune_packages() -> None:
    """Checks that the packages of the [run] and [tune] extras are there, without importing them.

    Raises:
        MissingDependencyError: One of them is not, with the line that installs them all.
    """
    require_run_packages()
    for package in TUNE_PACKAGES:
        if find_spec(package) is None:
            raise MissingDependencyError(package, install="pip install 'oomproof[run,tune]'")


def plan_tuning(
    model: str | Path,
    data: str | Path,
    *,
    gpus: str | None = None,
    max_memory: Mapping[int | Literal["cpu"], int | str] | None = None,
    reserve: int | str = 0,
    cap: int | str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> TrainingPlan:
    """What fine-tuning a model on some data takes; nothing but its tokenizer is downloaded.

    Args:
        model: A folder, a hub id, a name of the catalog, or "tiny".
        data: A .jsonl or .txt file, or a dataset of the hub: "org/name", "org/name:file".
        gpus: A machine that is not here: "24GiB", "RTX 4090".
        max_memory: Device index → most bytes to use there; "cpu" → host RAM.
        reserve: Free memory of each device to leave alone.
        cap: Most bytes of the device.
        revision: Branch, tag or commit of a hub id.
        progress: Told of bytes read and tokenised.
        options: Those of `tune`.

    Raises:
        InputError: Any of these cannot be understood or served; a line of the data is named.
        MissingDependencyError: The [run] or [tune] extra is not installed.
    """
    require_tune_packages()
    from oomproof.tuning.hub_data import find_data
    from oomproof.tuning.prepare import make_training_plan, prepare

    settings = _settings(options)
    spec = resolve(str(model), revision=revision)
    settings = _with_format(settings, spec)
    path = find_data(data)
    planner = _planner(spec, settings, gpus=gpus, max_memory=max_memory, reserve=reserve, cap=cap)
    with tempfile.TemporaryDirectory(prefix="oomproof-") as folder:
        prepared = prepare(
            path,
            _tokenizer_folder(spec),
            Path(folder) / "data",
            spec,
            settings,
            told=progress,
        )
        return make_training_plan(planner, prepared, spec)


def tune(  # noqa: PLR0913 - one keyword an option of the command line
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    max_memory: Mapping[int | Literal["cpu"], int | str] | None = None,
    reserve: int | str = 0,
    cap: int | str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    on_plan: Any = None,
    on_event: OnTuning | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> TuningReport:
    """Trains a LoRA adapter on a model's quantized weights (QLoRA, Dettmers et al. 2023).

    The plan is made from the data first; the longest sequences are computed before anything else.
    A run that was ended goes on from its last checkpoint with `resume`, and ends at the weights
    that an unbroken one ends at, bit for bit on a processor.

    Args:
        model: A folder, a hub id, a name of the catalog, or "tiny".
        data: As for `plan_tuning`.
        out: The adapter's folder, in peft's form; it must not exist, or be one to `resume`.
        resume: Goes on in `out`, or begins there where there is nothing yet.
        max_memory: Device index → most bytes to use there; "cpu" → host RAM.
        reserve: Free memory of the device to leave alone.
        cap: Most bytes of the device, enforced while running.
        revision: Branch, tag or commit of a hub id.
        progress: Told of bytes read, tokenised, downloaded and loaded.
        on_plan: Called with the plan before anything is loaded.
        on_event: Told of steps, evaluations, and of what happens beside them.
        trust_remote_code: Lets transformers run code that the model's folder ships.
        options: Fields of tuning.options: rank, alpha, dropout, target_modules, context,
            long_samples, packing, batch_size, micro_batch, epochs, max_steps, learning_rate,
            warmup, weight_decay, max_grad_norm, optimizer, checkpointing, validation, evaluations,
            patience, save_every, keep_checkpoints, format, engine, compute_dtype, seed.

    Returns:
        What was done. An interrupt ends it after a checkpoint, with `finished` false.

    Raises:
        InputError: Any of these cannot be understood or served; a line of the data is named.
        PlanDoesNotFitError: The longest sequence does not fit; it says what would make it fit.
        TrainingMemoryError: Memory ran out all the same.
        MissingDependencyError, LoadError: As `load` does.
    """
    require_tune_packages()
    from oomproof.conversion.files import explained
    from oomproof.conversion.work import locked
    from oomproof.tuning.hub_data import find_data
    from oomproof.tuning.job import REPORT_FILE, agree_with_job, open_folder, read_chosen
    from oomproof.tuning.prepare import make_training_plan, prepare, settle
    from oomproof.tuning.progress import nobody
    from oomproof.tuning.remedies import describe_shortfall

    asked = _settings(options)
    spec = resolve(str(model), revision=revision)
    asked = _with_format(asked, spec)
    folder = open_folder(out, resume=resume)
    path = find_data(data)
    settings = settle(asked, dict(read_chosen(folder)))
    planner = _planner(spec, settings, gpus=None, max_memory=max_memory, reserve=reserve, cap=cap)
    tokenizer_folder = _tokenizer_folder(spec)
    if folder.is_finished:
        return _finished(folder.read(REPORT_FILE) or {}, folder.path)
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
                told=progress,
                trust_remote_code=trust_remote_code,
            )
            plan = make_training_plan(planner, prepared, spec)
            if on_plan is not None:
                on_plan(plan)
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
        from oomproof.tuning.assemble import assemble, close_device

        tuning = assemble(
            spec,
            fetch(spec, progress, trust_remote_code=trust_remote_code),
            folder,
            plan,
            settings,
            prepared,
            hardware=probe(),
            on_event=on_event or nobody,
            progress=of_stage(progress, "load"),
            trust_remote_code=trust_remote_code,
        )
        from oomproof.tuning.run import TuningRun

        try:
            return TuningRun(tuning).run()
        finally:
            close_device(plan)


def rehearse_tuning(
    model: str | Path,
    *,
    max_memory: Mapping[int | Literal["cpu"], int | str] | None = None,
    reserve: int | str = 0,
    cap: int | str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    on_plan: Any = None,
    **options: Any,
) -> TuningRehearsal:
    """Proves a fine-tuning's plan on this machine: no data, no download, a few steps at full size.

    Args:
        model: A folder, a hub id, a name of the catalog, or "tiny".
        max_memory: Device index → most bytes to use there; "cpu" → host RAM.
        reserve: Free memory of the device to leave alone.
        cap: Most bytes of the device, enforced while running.
        revision: Branch, tag or commit of a hub id.
        progress: Told of bytes made ("load", done, total).
        on_plan: Called with the plan before anything is made.
        options: Those of `tune` that are not about data.

    Raises:
        InputError, MissingDependencyError, PlanDoesNotFitError: As `tune` does.
    """
    require_tune_packages()
    from oomproof.tuning.prepare import context_of
    from oomproof.tuning.rehearsal import STEPS, made_up_data, rehearse_plan
    from oomproof.tuning.remedies import describe_shortfall

    settings = replace(_settings(options), validation=0.0, packing=False, max_steps=STEPS)
    spec = resolve(str(model), revision=revision)
    settings = _with_format(settings, spec)
    context = context_of(settings, spec)
    planner = _planner(spec, settings, gpus=None, max_memory=max_memory, reserve=reserve, cap=cap)
    plan = planner.plan(made_up_data(context), context=context, longest=context)
    if on_plan is not None:
        on_plan(plan)
    if not plan.fits:
        message, remedy = describe_shortfall(plan)
        raise PlanDoesNotFitError(message, shortfall_bytes=plan.shortfall_bytes, remedy=remedy)
    return rehearse_plan(
        plan, spec, settings, hardware=probe(), progress=of_stage(progress, "load")
    )


def _settings(options: Mapping[str, Any]) -> TuningSettings:
    from oomproof.tuning.options import AdapterSettings, TuningSettings

    rest = dict(options)
    adapter: dict[str, Any] = {
        name: rest.pop(name) for name in ("rank", "alpha", "dropout") if name in rest
    }
    targets = rest.pop("target_modules", None)
    if targets is not None:
        listed: Sequence[str] = targets.split(",") if isinstance(targets, str) else targets
        adapter["target_modules"] = tuple(one.strip() for one in listed if one.strip())
    if isinstance(rest.get("context"), str):
        rest["context"] = read_tokens(rest["context"])
        if rest["context"] == "auto":
            raise InputError(
                "context 'auto' has no meaning for training", remedy="give a number of tokens"
            )
    unknown = sorted(set(rest) - set(TuningSettings.__dataclass_fields__))
    if unknown:
        raise InputError(f"tune has no option {unknown[0][:40]!r}")
    return TuningSettings(adapter=AdapterSettings(**adapter), **rest)


def _with_format(settings: TuningSettings, spec: ModelSpec) -> TuningSettings:
    """The same with a format that is named."""
    if settings.format != "auto":
        return settings
    own = spec.checkpoint_quantization
    if own is None or own.format is None:
        return replace(settings, format=DEFAULT_FORMAT)
    return replace(settings, format=own.held_as or own.format.name)


def _planner(
    spec: ModelSpec,
    settings: TuningSettings,
    *,
    gpus: str | None,
    max_memory: Mapping[int | Literal["cpu"], int | str] | None,
    reserve: int | str,
    cap: int | str | None,
) -> TrainingPlanner:
    from oomproof.tuning.engines import choose_engine
    from oomproof.tuning.planner import TrainingPlanner

    limits = read_limits(max_memory)
    request = PlanRequest(
        format=settings.format,
        reserve_bytes=read_bytes(reserve, "reserve") or 0,
        max_memory={index: size for index, size in limits.items() if index != "cpu"},
        max_host_bytes=limits.get("cpu"),
        cap_bytes=read_bytes(cap, "cap"),
        compute_dtype=settings.compute_dtype,
    )
    hardware = probe() if gpus is None else describe(gpus)
    device = max(hardware.devices, key=lambda one: one.free_bytes)
    engine = choose_engine(settings.engine, spec, settings.format, settings.compute_dtype, device)
    return TrainingPlanner(
        spec,
        hardware,
        request,
        settings,
        engine=engine,
    )


def _tokenizer_folder(spec: ModelSpec) -> Path:
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
    options = {k: v for k, v in settings.as_dict().items() if k not in _NOT_OF_THE_WEIGHTS}
    return {
        "model": {
            "id": spec.source.path if spec.source.kind != "folder" else spec.id,
            "revision": spec.source.revision,
            "fingerprint": spec.fingerprint,
        },
        "data": sha256,
        "engine": plan.engine,
        "compute_dtype": plan.compute_dtype,
        "optimizer": plan.optimizer,
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
