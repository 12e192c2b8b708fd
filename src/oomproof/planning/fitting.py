"""`--format fit`: the bytes that a plan in the smallest format leaves, spent on better ones.

Every projection of every layer begins in the smallest format, which says whether the model fits.
With several devices, how the layers are spread is found with all spare bytes in one budget, as much
of it as can still be placed; then each device's own bytes are spent on its own layers, exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oomproof.formats import DType, Format, mixture
from oomproof.memory.model import MemoryModel
from oomproof.memory.weights import resident_bytes, stored
from oomproof.models.spec import ModelSpec, TensorSpec
from oomproof.planning.candidate import Candidate
from oomproof.planning.damage import (
    FIT_FORMATS,
    NOT_ON_GPUS,
    UNQUANTIZED,
    WeightErrors,
    group_of,
    groups_of,
    item_of,
)
from oomproof.planning.fit import Choice, Fit, Item, choose, no_worse_than_uniform
from oomproof.planning.placement import Slot
from oomproof.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_HALVINGS = 12
"""Of the budget that all devices have together."""
_ROUNDS = 6
"""Other terms change a little with the formats: budgets are corrected so often."""

Ranges = Mapping[int, tuple[int, int]]
"""Device index → its units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A mixture that was chosen, placed."""

    candidate: Candidate
    reason: str


class Fitter:
    """Chooses formats for a model's groups.

    Args:
        spec: The model.
        compute_dtype: Of what is not quantized.
        errors: Of its weights.
        on_gpus: Whether a device is a GPU.
        place: A candidate with a mixture, on these units of the devices, or placed anew.
    """

    def __init__(
        self,
        spec: ModelSpec,
        compute_dtype: DType,
        errors: WeightErrors,
        place: Callable[[Format, Ranges | None], Candidate],
        *,
        on_gpus: bool,
    ) -> None:
        self._compute_dtype = compute_dtype
        self._errors = errors
        self._place = place
        left_out = NOT_ON_GPUS if on_gpus else frozenset()
        formats = (name for name in FIT_FORMATS if name not in left_out)
        self._formats = (*formats, UNQUANTIZED[compute_dtype])
        self._spec = spec

    def fill(self, base: Candidate) -> Fitted | None:
        """The mixture of least predicted damage that fits; None where none was found.

        Args:
            base: All groups in the smallest format.
        """
        # Without a quantized weight products need no scratch: a small model may fit then alone.
        groups = self._groups(base.slots[0].model)
        unquantized = self._formats[-1]
        whole = self._place(
            mixture({t.name: unquantized for group in groups.values() for t in group}), None
        )
        if whole.fits:
            return Fitted(candidate=whole, reason=f"all weights fit in {unquantized}")
        if not base.fits or base.streaming:
            return None
        ranges: Ranges = base.ranges
        if len(base.slots) > 1:
            ranges = self._spread(base)
        found, spare_bytes = self._fill_devices(ranges, base)
        counts = Counter(
            (found.format.by_tensor or {}).get(tensors[0].name, self._formats[-1])
            for tensors in groups.values()
        )
        parts = [f"{counts[name]} in {name}" for name in self._formats if counts[name]]
        left = sum(
            slot.usable_bytes - slot.model.peak_bytes(*ranges[slot.device.index])
            for slot in found.slots
            if slot.device.index in ranges
        )
        reason = (
            f"of {format_bytes(spare_bytes)} that {self._formats[0]} leaves {format_bytes(left)} "
            f"are left: of {counts.total()} groups of products {', '.join(parts)}; errors are "
            f"{self._errors.source}"
        )
        return Fitted(candidate=found, reason=reason)

    def _groups(self, model: MemoryModel) -> dict[str, list[TensorSpec]]:
        return groups_of(self._spec, model.profile.quantized_roles)

    def _items(self, model: MemoryModel, units: tuple[int, int]) -> list[Item]:
        profile = model.profile

        def size_bytes(tensor: TensorSpec, name: str) -> int:
            own = mixture({tensor.name: name})
            held = stored(tensor, own, self._compute_dtype, profile.quantized_roles)
            return resident_bytes(tensor, held, profile)

        first, end = units
        return [
            item_of(name, tensors, self._formats, self._errors, size_bytes)
            for name, tensors in self._groups(model).items()
            if tensors[0].layer is not None and first <= tensors[0].layer + 1 < end
        ]

    def _choose(self, items: Sequence[Item], budget_bytes: int) -> Fit | None:
        if self._errors.is_calibrated:
            return choose(items, budget_bytes)
        return choose(no_worse_than_uniform(items, budget_bytes), budget_bytes)

    def _mixture(self, chosen: Mapping[str, Choice], model: MemoryModel) -> Format:
        return mixture(
            {
                tensor.name: chosen[group_of(tensor)].format
                for tensors in self._groups(model).values()
                for tensor in tensors
            }
        )

    def _spread(self, base: Candidate) -> Ranges:
        """The placement with the largest budget that can still be placed."""
        model = base.slots[0].model
        items = self._items(model, (0, model.num_units))
        least = sum(min(one.size_bytes for one in item.choices) for item in items)
        most = sum(max(one.size_bytes for one in item.choices) for item in items)
        best, low, high = base, least, most
        for step in range(_HALVINGS):
            budget = high if step == 0 else (low + high) // 2
            fit = self._choose(items, budget)
            assert fit is not None
            found = self._place(self._mixture(_by_name(items, fit.chosen), model), None)
            if found.fits:
                best, low = found, budget
                if budget == high:
                    break
            else:
                high = budget
        return best.ranges

    def _fill_devices(self, ranges: Ranges, base: Candidate) -> tuple[Candidate, int]:
        """(Candidate with every device filled, bytes that were spare with the smallest format)."""
        by_index = {slot.device.index: slot for slot in base.slots}
        items = {
            index: self._items(by_index[index].model, units) for index, units in ranges.items()
        }
        smallest = {
            item.name: min(item.choices, key=lambda one: one.size_bytes)
            for of_device in items.values()
            for item in of_device
        }
        model = base.slots[0].model
        best = now = self._place(self._mixture(smallest, model), ranges)
        spare_bytes = sum(max(0, room) for room in _room(now, ranges).values())
        budgets = {
            index: sum(smallest[item.name].size_bytes for item in of_device)
            for index, of_device in items.items()
        }
        least, chosen = float("inf"), dict(smallest)
        for _ in range(_ROUNDS):
            rooms = _room(now, ranges)
            sizes = {
                index: sum(chosen[item.name].size_bytes for item in of_device)
                for index, of_device in items.items()
            }
            # Weights may take what all else leaves now.
            following = {index: sizes[index] + rooms[index] for index in items}
            if following == budgets:
                break
            budgets, chosen = following, {}
            for index, of_device in items.items():
                fit = self._choose(of_device, budgets[index])
                chosen |= (
                    {item.name: smallest[item.name] for item in of_device}
                    if fit is None
                    else _by_name(of_device, fit.chosen)
                )
            now = self._place(self._mixture(chosen, model), ranges)
            damage = sum(choice.damage for choice in chosen.values())
            if now.fits and damage < least:
                best, least = now, damage
        return best, spare_bytes


def _by_name(items: Sequence[Item], chosen: Sequence[Choice]) -> dict[str, Choice]:
    return {item.name: choice for item, choice in zip(items, chosen, strict=True)}


def _room(candidate: Candidate, ranges: Ranges) -> dict[int, int]:
    """Bytes that each device has left; below zero where they are missing."""

    def room(slot: Slot) -> int:
        return slot.usable_bytes - slot.model.peak_bytes(*ranges[slot.device.index])

    return {s.device.index: room(s) for s in candidate.slots if s.device.index in ranges}
