"""A LoRA adapter beside transformers' model, by peft, from our own reading of its file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from oomproof.errors import LoadError, MissingDependencyError, PlanMismatchError
from oomproof.loading.reader import CheckpointReader
from oomproof.models.adapter import AdapterSpec
from oomproof.planning.plan import Plan

_NAME = "default"


def import_peft() -> Any:
    """peft.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise MissingDependencyError("peft", install="pip install 'oomproof[tune]'") from None
    return peft


def add_adapter(model: Any, adapter: AdapterSpec, plan: Plan) -> Any:
    """A `peft.PeftModel` around a model, in evaluation mode; A and B are in the compute dtype.

    Its layers are made without memory, and then given the tensors of the file, each on the device
    of the weight that it changes.

    Raises:
        CheckpointError: The file is damaged, or holds a value that is not finite.
        LoadError: peft makes other layers than the file has tensors for.
        PlanMismatchError: They take other bytes than was planned.
    """
    peft = import_peft()
    folder = Path(adapter.path)
    dtype: torch.dtype = getattr(torch, plan.compute_dtype)
    devices = {name: parameter.device for name, parameter in model.named_parameters()}
    homes = {half.name: devices[one.weight] for one in adapter.weights for half in (one.a, one.b)}
    reader = CheckpointReader(folder, adapter.checkpoint, homes.__getitem__)
    with reader.open() as tensors:
        state = {name: tensor[...].to(dtype) for name, tensor in tensors.items()}
    config = _config(peft, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModelForCausalLM(
            model,
            config,
            adapter_name=_NAME,
            autocast_adapter_dtype=False,
            low_cpu_mem_usage=True,
        )
        peft.set_peft_model_state_dict(wrapped, state, adapter_name=_NAME, low_cpu_mem_usage=True)
    wrapped.eval().requires_grad_(requires_grad=False)
    _compare(wrapped, state, adapter, plan)
    return wrapped


def _config(peft: Any, adapter: AdapterSpec) -> Any:
    """What the file's tensors are, module by module: no pattern of its config is matched again."""
    first = adapter.weights[0]
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=first.rank,
        lora_alpha=first.scale * first.rank,
        lora_dropout=0.0,
        target_modules=[one.module for one in adapter.weights],
        rank_pattern={_exactly(one.module): one.rank for one in adapter.weights},
        alpha_pattern={_exactly(one.module): one.scale * one.rank for one in adapter.weights},
        inference_mode=True,
    )


def _exactly(module: str) -> str:
    return module.replace(".", r"\.")


def _compare(
    wrapped: Any, state: dict[str, torch.Tensor], adapter: AdapterSpec, plan: Plan
) -> None:
    """That peft holds each tensor of the file once, where it was read to, and nothing else."""
    found = {
        name.replace(f".{_NAME}.", "."): parameter
        for name, parameter in wrapped.named_parameters()
        if ".lora_" in name
    }
    problems = [f"{name}: not in the file" for name in found.keys() - state.keys()]
    problems += [f"{name}: not loaded" for name in state.keys() - found.keys()]
    problems += [
        f"{name}: {parameter.dtype} on {parameter.device}"
        for name, parameter in found.items()
        if name in state
        and (parameter.dtype, parameter.device) != (state[name].dtype, state[name].device)
    ]
    if problems:
        raise LoadError(
            f"{adapter.path}: {len(problems)} tensors are not as peft loaded them: "
            f"{'; '.join(sorted(problems)[:3])}",
            remedy="this is a bug in oomproof or an untested version of peft; report it",
        )
    size = sum(parameter.nbytes for parameter in found.values())
    if plan.adapter is not None and size > plan.adapter.weights_bytes:
        raise PlanMismatchError(
            (f"planned {plan.adapter.weights_bytes:,} bytes of adapter, it takes {size:,}",)
        )
