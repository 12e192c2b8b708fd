"""Fine-tuning: from a user's words to its plan, and to an adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from oomproof.agreement import Progress, of_stage, require_run_packages
from oomproof.errors import (
    InputError,
    MissingDependencyError,
    PlanDoesNotFitError,
)
from oomproof.hardware.describe import describe
from oomproof.hardware.probe import probe
from oomproof.leading import Order, follow, lead, planner_of, tokenizer_folder_of, with_format
from oomproof.models.resolve import resolve
from oomproof.planning.spelled import read_tokens

if TYPE_CHECKING:
    from oomproof.tuning.options import TuningSettings
    from oomproof.tuning.plan import TrainingPlan
    from oomproof.tuning.progress import OnTuning
    from oomproof.tuning.rehearsal import TuningRehearsal
    from oomproof.tuning.report import TuningReport

TUNE_PACKAGES = ("peft",)


def require_tune_packages() -> None:
    """Checks that the packages of the [run] and [tune] extras are there, without importing them.

    Raises:
        MissingDependencyError: One of them is not, with the line that installs them all.
    """
    require_run_packages()
    for package in TUNE_PACKAGES:
        if find_spec(package) is None:
            raise MissingDependencyError(package, install="pip install 'oomproof[run,tune]'")


def plan_tuning(  # noqa: PLR0913 - one keyword an option of the command line
    model: str | Path,
    data: str | Path,
    *,
    gpus: str | None = None,
    ranks: int | None = None,
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
        gpus: A machine that is not here: "24GiB", "2x RTX 4090".
        ranks: Processes that train together, a GPU each; None for those that a launcher started.
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
    from oomproof.tuning.launched import world_size
    from oomproof.tuning.prepare import make_training_plan, prepare

    settings = _settings(options)
    spec = resolve(str(model), revision=revision)
    settings = with_format(settings, spec)
    path = find_data(data)
    planner = planner_of(
        spec,
        settings,
        probe() if gpus is None else describe(gpus),
        ranks=world_size() if ranks is None else ranks,
        max_memory=max_memory,
        reserve=reserve,
        cap=cap,
    )
    with tempfile.TemporaryDirectory(prefix="oomproof-") as folder:
        prepared = prepare(
            path,
            tokenizer_folder_of(spec),
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
    Processes that a launcher started (torchrun, accelerate launch) train together, a GPU each.
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
    from oomproof.tuning.progress import nobody

    # Before this process uses a device: what it holds itself is in the plan.
    hardware = probe()
    from oomproof.tuning.joining import joined

    asked = _settings(options)
    with joined(hardware) as (ranks, hardware):
        tells = ranks.is_first
        order = Order(
            model=str(model),
            data=data,
            out=out,
            resume=resume,
            asked=asked,
            limits={"max_memory": max_memory, "reserve": reserve, "cap": cap},
            revision=revision,
            progress=progress if tells else None,
            on_plan=on_plan if tells else None,
            on_event=on_event if tells and on_event is not None else nobody,
            trust_remote_code=trust_remote_code,
        )
        return lead(order, ranks, hardware) if tells else follow(order, ranks, hardware)


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
    settings = with_format(settings, spec)
    context = context_of(settings, spec)
    planner = planner_of(spec, settings, probe(), max_memory=max_memory, reserve=reserve, cap=cap)
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
