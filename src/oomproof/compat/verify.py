"""Compares every loaded parameter with the plan, before the first forward."""

from __future__ import annotations

from typing import Any

import torch

from oomproof.errors import CheckpointError, PlanMismatchError
from oomproof.formats import DType
from oomproof.memory.model import unit_of
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec, TensorSpec
from oomproof.planning.plan import Plan
from oomproof.units import round_up


def parameter_tensors(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
    """Every tensor that holds a parameter: itself, and bitsandbytes' scales and codebooks."""
    parts: list[torch.Tensor] = [parameter.data]
    # bitsandbytes hangs its statistics on the parameter: Params4bit.quant_state, Int8Params.SCB.
    state: Any = getattr(parameter, "quant_state", None)
    if state is not None:
        parts += [state.absmax, state.code]
        if state.nested:
            parts += [state.state2.absmax, state.state2.code, state.offset]
    scales: Any = getattr(parameter, "SCB", None)
    if scales is not None:
        parts.append(scales)
    return tuple(parts)


def parameter_bytes(parameter: torch.nn.Parameter, alignment: int = 1) -> int:
    """Bytes that hold a parameter, each tensor rounded up to `alignment`."""
    return sum(round_up(part.nbytes, alignment) for part in parameter_tensors(parameter))


def verify_parameters(model: torch.nn.Module, plan: Plan, spec: ModelSpec) -> None:
    """Compares device, dtype and bytes of every parameter with the plan.

    Raises:
        CheckpointError: The weights hold a head of their own where config.json ties it.
        PlanMismatchError: Any of them differs, or a parameter is there too many or too few.
    """
    weight_format = plan.weight_format
    compute_dtype = DType(plan.compute_dtype)
    roles = QUANTIZED_ROLES[plan.engine]
    expected = {
        tensor.name: (stored(tensor, weight_format, compute_dtype, roles), tensor)
        for tensor in spec.tensors
    }
    devices = _planned_devices(plan, spec)
    found = dict(model.named_parameters())
    if spec.tie_word_embeddings and "lm_head.weight" in found:
        raise CheckpointError(
            plan.source.path,
            "config.json ties lm_head to the embedding, and the weights hold another lm_head",
            remedy="config and weights do not belong together; download both again",
        )
    differences = [f"{name}: planned, not loaded" for name in expected.keys() - found.keys()]
    differences += [f"{name}: loaded, not planned" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        held, tensor = expected[name]
        parameter = found[name]
        planned = (devices(tensor), str(held.dtype), held.stored_bytes)
        actual = (
            _device_name(parameter.device),
            str(parameter.dtype).removeprefix("torch."),
            parameter_bytes(parameter),
        )
        if planned != actual:
            differences.append(f"{name}: planned {_words(planned)}, found {_words(actual)}")
    if differences:
        raise PlanMismatchError(tuple(sorted(differences)))


def _planned_devices(plan: Plan, spec: ModelSpec) -> Any:
    """TensorSpec → name of the device that the plan puts it on."""
    used = plan.devices_in_use
    by_unit: dict[int, str] = {}
    names = {
        device.index: f"cuda:{device.index}" if device.kind in ("cuda", "rocm") else device.kind
        for device in used
    }
    for device in used:
        if device.layers is not None:
            for layer in range(device.layers[0], device.layers[1] + 1):
                by_unit[layer + 1] = names[device.index]
    by_unit[0] = names[used[0].index]
    by_unit[spec.num_hidden_layers + 1] = names[used[-1].index]

    def device_of(tensor: TensorSpec) -> str:
        return by_unit[unit_of(tensor, spec)]

    return device_of


def _device_name(device: torch.device) -> str:
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type


def _words(values: tuple[str, str, int]) -> str:
    device, dtype, size_bytes = values
    return f"{size_bytes:,} bytes of {dtype} on {device}"
