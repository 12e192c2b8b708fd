"""Which code trains a model, and how it is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from oomproof.errors import NotRunnableError
from oomproof.formats import get_format
from oomproof.hardware.spec import DeviceSpec
from oomproof.memory.peft import FLOAT32, Tuned, adapter_tensors, optimizer_bytes
from oomproof.models.spec import ModelSpec
from oomproof.planning.engines import why_not_native
from oomproof.tuning.options import ALL_LINEARS, TuningSettings
from oomproof.tuning.plan import TrainingPlan

Progress = Callable[[int, int], None]

_CORE = "oomproof.tuning.model"
_STATES = {"paged-adamw": "adamw-paged", "paged-adamw-8bit": "adamw-paged"}


def choose_engine(asked: str, spec: ModelSpec, format_name: str, device: DeviceSpec) -> str:
    """Says "native" where our core trains the model there, else "transformers".

    Raises:
        NotRunnableError: The native engine was asked for, and does not train it.
    """
    if asked == "transformers":
        return asked
    problem = _why_not_core(spec, format_name, device)
    if problem is None:
        return "native"
    if asked == "native":
        raise NotRunnableError(problem, remedy="use --engine transformers")
    return "transformers"


def _why_not_core(spec: ModelSpec, format_name: str, device: DeviceSpec) -> str | None:
    if find_spec(_CORE) is None:
        return "this version has no training core of its own"
    problem = why_not_native(spec, get_format(format_name), (device,))
    if problem is None and spec.checkpoint_quantization is not None:
        problem = "a checkpoint that is quantized already is trained by transformers"
    if problem is not None:
        return problem
    try:
        import_module("oomproof.tuning.frozen").check_trainable(spec, format_name)
    except NotRunnableError as error:
        return error.message
    return None


def native_terms(
    spec: ModelSpec,
    settings: TuningSettings,
    tuned: Tuned,
    micro_batch: int,
    length: int,
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """The core's own memory model, in the terms of a training plan."""
    import torch

    core, memory = import_module(_CORE), import_module("oomproof.memory.training")
    shape = core.shape_of(
        spec,
        _lora(settings),
        torch.float32 if tuned.compute_bytes == FLOAT32 else torch.bfloat16,
        _options(spec, settings.format, tuned.checkpointing, micro_batch, length),
    )
    found = memory.training_memory(
        spec, shape, optimizer=_STATES.get(tuned.optimizer, tuned.optimizer)
    )
    device = {
        "weights": found.weights,
        "adapters": found.adapters,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
        # Logits share their memory with a layer's activations: they are in the workspace.
        "activations": found.checkpoints
        + found.kept
        + found.buffers
        + found.workspace
        + found.batch,
        "dequantization": found.scratch,
        "library": found.libraries + found.rounding,
    }
    paged = tuned.optimizer.startswith("paged")
    states = optimizer_bytes(adapter_tensors(spec, tuned), tuned.optimizer) if paged else 0
    return device, {"offloaded": memory.host_bytes(spec, shape), "optimizer": states}


def _lora(settings: TuningSettings) -> Any:
    adapter = settings.adapter
    targets = adapter.target_modules
    named = {} if targets == (ALL_LINEARS,) else {"target_modules": targets}
    return import_module(_CORE).LoraSettings(
        rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, **named
    )


def _options(
    spec: ModelSpec, format_name: str, checkpointing: str, micro_batch: int, length: int
) -> Any:
    """Inputs of layers are always kept; "none" keeps all that spares computing again."""
    layers = spec.num_hidden_layers
    kept = {"attention": layers}
    if checkpointing == "none":
        kept |= {"mid": layers, "qkv": layers, "gate_up": layers}
    return import_module(_CORE).TrainingOptions(
        tokens=micro_batch * length,
        positions=length,
        format=format_name,
        kept=import_module("oomproof.memory.training_shape").Kept(**kept),
        offload_checkpoints=checkpointing == "offload",
    )


def build_native(
    plan: TrainingPlan,
    spec: ModelSpec,
    folder: Path,
    settings: TuningSettings,
    *,
    progress: Progress | None = None,
) -> Any:
    """The base in our core, with a new adapter.

    Raises:
        OomproofError: As the core's `build_training_model`.
    """
    import torch

    core = import_module(_CORE)
    [device] = plan.base.devices
    place = torch.device("cpu" if device.kind == "cpu" else f"cuda:{device.index}")
    model = core.build_training_model(
        spec,
        folder,
        _lora(settings),
        device=place,
        compute_dtype=getattr(torch, plan.compute_dtype),
        options=_options(spec, plan.format, plan.checkpointing, plan.micro_batch, plan.longest),
        seed=settings.seed,
        progress=progress,
    )
    model.accepts_loss_kwargs = True
    if not hasattr(model, "seek"):
        # Dropout is drawn from the number of the pass, which a resumed run has to go on with.
        model.seek = partial(setattr, model._core, "_passes_begun")  # noqa: SLF001
    return model


def chunks_loss(config: Mapping[str, object]) -> bool:
    """Whether logits are made in chunks: what the model does behind its head is known."""
    scaled = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier_scale")
    return not any(config.get(name) for name in scaled)


def build_with_peft(
    plan: TrainingPlan,
    spec: ModelSpec,
    folder: Path,
    settings: TuningSettings,
    *,
    base_id: str,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The base as planned, with a new adapter, on transformers and peft.

    Raises:
        OomproofError: As `compat.model.load_model`.
        NotRunnableError: Packed documents would see each other.
    """
    import torch

    from oomproof.compat.model import load_model
    from oomproof.tuning.peft_model import PeftTrainingModel, refuse_leaking_packs

    model = load_model(
        plan.base, spec, folder, progress=progress, trust_remote_code=trust_remote_code
    )
    built = PeftTrainingModel(
        model,
        settings.adapter,
        base_id=base_id,
        revision=spec.source.revision,
        checkpointing=plan.checkpointing,
        seed=settings.seed,
    )
    if plan.packing:
        device = next(built.parameters()).device
        refuse_leaking_packs(built, spec.vocab_size, torch.device(device))
    return built
