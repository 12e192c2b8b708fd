"""What a format is predicted to do to a model's answers: a weight's error times its sensitivity.

The divergence of a quantized model's answers grows with the sum, over its linear layers, of the
relative squared errors of their weights (the linearity theorem of HIGGS, arXiv:2411.17525); what a
layer's error counts is its sensitivity. Without data it goes by the projection alone: each product
adds noise to its part of the residual stream in proportion to its relative error, whatever its
size, so small projections are worth more bits a weight than large ones. The factors of the MLP's
are below 1 as measured by quantizing one projection at a time (the bundled model, divergence over
relative error: qkv 0.57, o 0.58, gate and up 0.39, down 0.18 on average over its layers, with no
trend along the depth), halfway towards 1, for other models differ. A calibration text gives better
ones (evaluation/calibrate.py), which `WeightErrors.sensitivities` takes: nats a token then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from oomproof.formats import DType
from oomproof.models.spec import ModelSpec, Role, TensorSpec
from oomproof.planning.fit import Choice, Item

FIT_FORMATS = ("nf4-dq", "nf4-g16", "int8")
"""What a projection can be stored in below 16 bits, smallest first; others are larger or worse."""
NOT_ON_GPUS = frozenset({"nf4-g16"})
"""What a mixture leaves out on GPUs: without tiles, products are a fourth as fast there."""
UNQUANTIZED = {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16", DType.FLOAT32: "fp32"}
"""Compute dtype → the format of what is not quantized."""

NORMAL_ERRORS: Mapping[str, float] = {"nf4-dq": 7.28e-3, "nf4-g16": 5.2e-3, "int8": 7.57e-5}
"""Relative squared error of normally distributed weights, scales searched, rows of 4,096."""
_GROUPS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
}
_SENSITIVITY = {"gate_up": 0.8, "down_proj": 0.65}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightErrors:
    """How well the weights of a model can be stored."""

    of_tensors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Tensor → format → relative squared error; NORMAL_ERRORS for what is not here."""
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    """Group (`group_of`) → damage for its relative error; by its projection for what is not
    here."""
    source: str = "those of normally distributed weights"
    """Where they come from, for people."""

    @property
    def is_calibrated(self) -> bool:
        """Whether sensitivities were measured."""
        return bool(self.sensitivities)

    def relative(self, tensor: TensorSpec, format_name: str) -> float:
        """Squared error of a tensor in a format over its squared norm; 0 in 16 bits."""
        if format_name in UNQUANTIZED.values():
            return 0.0
        own = self.of_tensors.get(tensor.name, {})
        return own.get(format_name, NORMAL_ERRORS[format_name])


def group_of(tensor: TensorSpec) -> str:
    """What gets one format: products that share an input, such as "12.qkv" or "12.down_proj"."""
    module = tensor.name.split(".")[-2]
    return f"{tensor.layer}.{_GROUPS.get(module, module)}"


def groups_of(spec: ModelSpec, roles: frozenset[Role]) -> dict[str, list[TensorSpec]]:
    """Every group that can be quantized, in the model's order."""
    found: dict[str, list[TensorSpec]] = {}
    for tensor in spec.tensors:
        if tensor.role in roles and len(tensor.shape) == 2 and tensor.layer is not None:
            found.setdefault(group_of(tensor), []).append(tensor)
    return found


def item_of(
    name: str,
    tensors: list[TensorSpec],
    formats: tuple[str, ...],
    errors: WeightErrors,
    size_bytes: Callable[[TensorSpec, str], int],
) -> Item:
    """A group as the knapsack takes it.

    Args:
        name: Of the group.
        tensors: In it.
        formats: What it can be stored in.
        errors: Of the weights.
        size_bytes: Of a tensor in a format, as its device holds it.
    """
    numel = sum(tensor.numel for tensor in tensors)
    sensitivity = errors.sensitivities.get(name, _SENSITIVITY.get(name.partition(".")[2], 1.0))
    return Item(
        name=name,
        choices=tuple(
            Choice(
                format=each,
                size_bytes=sum(size_bytes(tensor, each) for tensor in tensors),
                damage=sensitivity
                * sum(tensor.numel * errors.relative(tensor, each) for tensor in tensors)
                / numel,
            )
            for each in formats
        ),
    )
