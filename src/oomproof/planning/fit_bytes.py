"""The mixture of least predicted damage within a number of bytes, whatever the device."""

from __future__ import annotations

from oomproof.errors import InputError
from oomproof.formats import DType, Format, get_format, mixture
from oomproof.memory.weights import stored
from oomproof.models.spec import ModelSpec, Role, TensorSpec
from oomproof.planning.damage import FIT_FORMATS, UNQUANTIZED, WeightErrors, groups_of, item_of
from oomproof.planning.fit import choose, no_worse_than_uniform
from oomproof.units import format_bytes


def fit_bytes(
    spec: ModelSpec,
    budget_bytes: int,
    *,
    compute_dtype: DType,
    roles: frozenset[Role],
    errors: WeightErrors,
) -> Format:
    """Formats for all groups, of a model that takes at most so many bytes.

    Args:
        spec: The model.
        budget_bytes: For all weights, those that stay in the compute dtype too.
        compute_dtype: Of what is not quantized.
        roles: What can be quantized.
        errors: Of the weights.

    Raises:
        InputError: The smallest format has more bytes.
    """

    def size_bytes(tensor: TensorSpec, name: str) -> int:
        return stored(tensor, get_format(name), compute_dtype, roles).stored_bytes

    formats = (*FIT_FORMATS, UNQUANTIZED[compute_dtype])
    groups = groups_of(spec, roles)
    of_groups = {tensor.name for tensors in groups.values() for tensor in tensors}
    kept_bytes = sum(
        size_bytes(tensor, formats[-1]) for tensor in spec.tensors if tensor.name not in of_groups
    )
    items = [item_of(name, group, formats, errors, size_bytes) for name, group in groups.items()]
    left = budget_bytes - kept_bytes
    fit = choose(items if errors.is_calibrated else no_worse_than_uniform(items, left), left)
    if fit is None:
        least = kept_bytes + sum(min(one.size_bytes for one in item.choices) for item in items)
        raise InputError(
            f"fit:{budget_bytes} is less than {spec.id} takes in {formats[0]}, "
            f"{least:,} bytes ({format_bytes(least)})",
            remedy=f"use fit:{least} or more",
        )
    return mixture(
        {
            tensor.name: choice.format
            for tensors, choice in zip(groups.values(), fit.chosen, strict=True)
            for tensor in tensors
        }
    )
