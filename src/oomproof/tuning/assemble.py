"""Puts a fine-tuning together: prepared data, a plan that fits, and how its model is built."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oomproof.errors import PlanDoesNotFitError
from oomproof.hardware.spec import Hardware
from oomproof.loading.devices import (
    check_cuda,
    limit_device,
    prepare_devices,
    release_device,
)
from oomproof.models.spec import ModelSpec
from oomproof.tuning.batches import BatchMaker
from oomproof.tuning.distributed import ALONE, Ranks
from oomproof.tuning.engines import build_native, build_with_peft
from oomproof.tuning.job import TuneFolder
from oomproof.tuning.options import TuningSettings
from oomproof.tuning.packing import Rows, schedule
from oomproof.tuning.plan import TrainingPlan
from oomproof.tuning.prepare import Prepared
from oomproof.tuning.progress import OnTuning
from oomproof.units import format_bytes

if TYPE_CHECKING:
    from oomproof.tuning.run import Tuning


def open_device(plan: TrainingPlan, hardware: Hardware) -> torch.device:
    """Where a plan is executed, with its limit set; `close_device` lifts that.

    Our own engine may take what its plan says and not a byte more, in whatever order its blocks
    come and go: torch's allocator gives back what it caches before it passes the limit.

    Raises:
        HardwareError, PlanDoesNotFitError: The device is not what was planned for.
    """
    [device] = plan.base.devices
    if plan.ranks == 1:
        prepare_devices(plan.base, hardware)
    elif device.kind == "cuda":  # the whole base need not fit
        check_cuda(device.index, device.uuid)
    free = next(one.free_bytes for one in hardware.devices if one.index == device.index)
    if device.kind == "cpu":
        free //= plan.ranks
    needed = plan.peak_bytes + (plan.base.host.peak_bytes if device.kind == "cpu" else 0)
    if free < needed:
        raise PlanDoesNotFitError(
            f"{plan.device} has {format_bytes(free)} free now, training needs "
            f"{format_bytes(needed)}",
            shortfall_bytes=needed - free,
            remedy="free it, or run the same command again: it plans anew",
        )
    if device.kind == "cpu":
        return torch.device("cpu")
    place = torch.device("cuda", device.index)
    torch.cuda.set_device(place)
    if plan.engine == "native":
        # What this process holds already is none of the plan's.
        own = plan.peak_bytes - plan.terms.comm
        limit_device(device, own + torch.cuda.memory_reserved(place))
    return place


def close_device(plan: TrainingPlan) -> None:
    """Lifts the limit of memory, when the model is gone."""
    [device] = plan.base.devices
    release_device(device)


def assemble(  # noqa: PLR0913 - everything that a run is made of
    spec: ModelSpec,
    model_folder: Path,
    folder: TuneFolder,
    plan: TrainingPlan,
    settings: TuningSettings,
    prepared: Prepared,
    *,
    hardware: Hardware,
    on_event: OnTuning,
    ranks: Ranks = ALONE,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> Tuning:
    """A fine-tuning, ready to be run.

    Args:
        spec: The model, with the headers of its checkpoint.
        model_folder: Where its files are.
        folder: Where the run lives.
        plan: What is executed.
        settings: What is asked.
        prepared: The data.
        hardware: The machine, before this process used it.
        on_event: Told of everything.
        ranks: The processes that train; this one's device is in the plan.
        progress: Told of bytes loaded.
        trust_remote_code: Lets transformers run code that the model's folder ships.

    Raises:
        HardwareError, PlanDoesNotFitError: The device is not what was planned for.
    """
    # Importing transformers' Trainer imports bitsandbytes, which talks of kernels it could do with.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from oomproof.tuning.run import Tuning

    place = open_device(plan, hardware)
    base_id = spec.source.path if spec.source.kind == "hub" else str(model_folder)

    def build() -> Any:
        if plan.engine == "native":
            return build_native(plan, spec, model_folder, settings, progress=progress, ranks=ranks)
        return build_with_peft(
            plan,
            spec,
            model_folder,
            settings,
            base_id=base_id,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )

    def makes(rows: Rows) -> BatchMaker:
        return BatchMaker(
            prepared.cache, rows, context=prepared.context, pad_token=prepared.pad_token
        )

    return Tuning(
        folder=folder,
        plan=plan,
        settings=settings,
        facts=prepared.cache.facts,
        training=makes(prepared.rows),
        validation=None if prepared.validation is None else makes(prepared.validation),
        schedule=schedule(
            len(prepared.rows),
            batch_size=plan.batch_size,
            micro_batch=plan.micro_batch,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            seed=settings.seed,
            ranks=plan.ranks,
        ),
        build=build,
        model_name=base_id if spec.source.kind == "hub" else model_folder.name,
        device=place,
        on_event=on_event,
        ranks=ranks,
    )
