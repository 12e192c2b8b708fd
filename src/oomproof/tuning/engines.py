"""Which code trains a model, and how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from oomproof.errors import NotRunnableError
from oomproof.formats import FORMATS, get_format
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.peft import FLOAT32, target_linears
from oomproof.memory.training_shape import ALL_LINEARS as DECODER_LINEARS
from oomproof.memory.training_shape import Kept
from oomproof.models.spec import ModelSpec
from oomproof.planning.engines import why_not_native
from oomproof.tuning.distributed import ALONE, Ranks
from oomproof.tuning.frozen import check_trainable
from oomproof.tuning.model import (
    LoraSettings,
    TrainingModel,
    TrainingOptions,
    build_training_model,
)
from oomproof.tuning.options import ALL_LINEARS, AdapterSettings, TuningSettings
from oomproof.tuning.plan import TrainingPlan
from oomproof.units import format_bytes

Progress = Callable[[int, int], None]


def choose_engine(
    asked: str, spec: ModelSpec, format_name: str, compute_dtype: str, device: DeviceSpec
) -> str:
    """Says "native" where our core trains the model there, else "transformers".

    Raises:
        NotRunnableError: The native engine was asked for, and does not train it.
    """
    if asked == "transformers":
        return asked
    problem = _why_not_core(spec, format_name, device)
    if problem is None and compute_dtype != "float16":
        return "native"
    if asked != "native":
        return "transformers"
    if problem is None:
        raise NotRunnableError(
            "gradients overflow in float16", remedy="use --compute-dtype bfloat16"
        )
    raise NotRunnableError(problem, remedy="use --engine transformers")


def _why_not_core(spec: ModelSpec, format_name: str, device: DeviceSpec) -> str | None:
    own = spec.checkpoint_quantization
    if own is not None:
        if own.held_as not in FORMATS or FORMATS[own.held_as].quant_type is None:
            return f"{own.method}'s weights have no gradient here, but those of its 4-bit formats"
        format_name = own.held_as
    problem = why_not_native(spec, get_format(format_name), (device,))
    if problem is not None:
        return problem
    try:
        check_trainable(spec, format_name)
    except NotRunnableError as error:
        return error.message
    return None


def lora_settings(adapter: AdapterSettings) -> LoraSettings:
    """The core's words for an adapter."""
    everything = adapter.target_modules == (ALL_LINEARS,)
    return LoraSettings(
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=DECODER_LINEARS if everything else adapter.target_modules,
    )


def core_options(plan: TrainingPlan) -> TrainingOptions:
    """What the core allocates for a plan: exactly what was counted."""
    assert plan.kept is not None
    documents = plan.data.documents
    return TrainingOptions(
        tokens=plan.micro_batch * plan.longest,
        positions=plan.longest,
        # The padding behind a sequence's last document is one more.
        sequences=plan.micro_batch * (documents + 1) if documents else 0,
        format=plan.format,
        kept=Kept(**plan.kept),
        offload_checkpoints=plan.checkpointing == "offload",
        sharded=plan.sharded,
    )


def build_native(
    plan: TrainingPlan,
    spec: ModelSpec,
    folder: Path | None,
    settings: TuningSettings,
    *,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> TrainingModel:
    """The base in our core, with a new adapter.

    Args:
        plan: What is executed.
        spec: The model, with the headers of its checkpoint where there is a folder.
        folder: Where its files are; None for random weights.
        settings: What is asked.
        progress: Told of bytes loaded.
        ranks: The processes that train it.

    Raises:
        OomproofError: As the core's `build_training_model`.
    """
    [device] = plan.base.devices
    place = torch.device("cpu" if device.kind == "cpu" else f"cuda:{device.index}")
    return build_training_model(
        spec,
        folder,
        lora_settings(settings.adapter),
        device=place,
        compute_dtype=getattr(torch, plan.compute_dtype),
        options=core_options(plan),
        seed=settings.seed,
        progress=progress,
        ranks=ranks,
    )


def build_with_peft(
    plan: TrainingPlan,
    spec: ModelSpec,
    folder: Path | None,
    settings: TuningSettings,
    *,
    base_id: str,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The base as planned, with a new adapter, on transformers and peft.

    Without a folder the weights are random.

    Raises:
        OomproofError: As `compat.model.load_model`.
        NotRunnableError: Packed documents would see each other, or peft would train other
            parameters than were planned.
    """
    from oomproof.compat.model import load_model, load_random_model
    from oomproof.tuning.peft_model import PeftTrainingModel, refuse_leaking_packs

    if folder is None:
        model = load_random_model(plan.base, spec, progress=progress)
    else:
        model = load_model(
            plan.base, spec, folder, progress=progress, trust_remote_code=trust_remote_code
        )
    adapter = settings.adapter
    if spec.num_experts:
        # "all-linear" is every expert to peft, which it computes in 16 bits, merged.
        linears = target_linears(spec, adapter.target_modules)
        names = {one.name.removesuffix(".weight").rpartition(".")[2] for one in linears}
        adapter = replace(adapter, target_modules=tuple(sorted(names)))
    built = PeftTrainingModel(
        model,
        adapter,
        base_id=base_id,
        revision=spec.source.revision,
        checkpointing=plan.checkpointing,
        seed=settings.seed,
    )
    trained = FLOAT32 * sum(one.numel() for one in built.parameters() if one.requires_grad)
    if trained != plan.terms.adapters:
        raise NotRunnableError(
            f"peft trains {format_bytes(trained)} of this architecture, planned were "
            f"{format_bytes(plan.terms.adapters)}: experts have names of linears",
            remedy="name linears that no expert has: --target-modules q_proj,o_proj",
        )
    if plan.packing:
        device = next(built.parameters()).device
        refuse_leaking_packs(built, spec.vocab_size, torch.device(device))
    return built
