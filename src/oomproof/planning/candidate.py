"""One format at one context and concurrency, placed as well as it can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from oomproof.formats import Format
from oomproof.memory.terms import DeviceTerms
from oomproof.planning.offload import StreamedPlacement, place_streaming
from oomproof.planning.placement import Placement, Slot, can_place, place_fastest
from oomproof.planning.plan import HostPlan
from oomproof.planning.shortfall import least_shortfall
from oomproof.planning.speed import SpeedModel, TokensPerSecond, predict_speed


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A choice that a plan can be made of."""

    format: Format
    kv_format: str
    context: int
    concurrency: int
    slots: tuple[Slot, ...]
    speeds: tuple[SpeedModel, ...]
    """One for each slot."""
    host: HostPlan
    """Without the layers that stay in host memory."""
    not_runnable: str | None
    """Why no engine runs it here, None where one does."""
    streaming: bool
    """Whether layers may stay in host memory."""
    fixed: Mapping[int, tuple[int, int]] | None = None
    """Device index → its units, where they are not to be searched for."""

    @cached_property
    def _streamed(self) -> StreamedPlacement | None:
        return place_streaming(self.slots) if self.streaming else None

    @cached_property
    def _placement(self) -> Placement:
        if self._streamed is not None:
            return Placement(ranges=self._streamed.ranges, shortfall_bytes=0)
        if self.fixed is not None:
            missing = (
                max(0, slot.model.peak_bytes(*self.fixed[index]) - slot.usable_bytes)
                for slot in self.slots
                if (index := slot.device.index) in self.fixed
            )
            return Placement(ranges=self.fixed, shortfall_bytes=sum(missing))
        return place_fastest(self.slots) or least_shortfall(self.slots)

    @property
    def ranges(self) -> Mapping[int, tuple[int, int]]:
        """Device index → (first unit, end unit), in order along the model."""
        return self._placement.ranges

    @property
    def streamed(self) -> Mapping[int, tuple[int, int]]:
        """Device index → (first, end) of its units that stay in host memory."""
        return {} if self._streamed is None else self._streamed.streamed

    @property
    def streamed_bytes(self) -> int:
        """Weights that travel in every decode step."""
        return 0 if self._streamed is None else self._streamed.streamed_bytes

    @property
    def host_plan(self) -> HostPlan:
        """What the process needs in host RAM, layers that stay there included."""
        rounding = 0 if self._streamed is None else self._streamed.rounding_bytes
        terms = replace(
            self.host.terms,
            pinned=self.host.terms.pinned + rounding,
            offloaded=self.streamed_bytes,
        )
        return replace(self.host, terms=terms)

    @property
    def device_shortfall_bytes(self) -> int:
        """What is missing on the devices."""
        return self._placement.shortfall_bytes

    @cached_property
    def host_shortfall_bytes(self) -> int:
        """What is missing in host RAM."""
        host = self.host_plan
        return 0 if host.usable_bytes is None else max(0, host.peak_bytes - host.usable_bytes)

    @property
    def shortfall_bytes(self) -> int:
        """What is missing on the devices and on the host."""
        return self.device_shortfall_bytes + self.host_shortfall_bytes

    @cached_property
    def fits(self) -> bool:
        """Whether every device and the host hold it."""
        if self.fixed is not None:
            placed = self._placement.fits
        else:
            placed = self._streamed is not None if self.streaming else can_place(self.slots)
        return placed and self.host_shortfall_bytes == 0

    @cached_property
    def tokens_per_second(self) -> TokensPerSecond:
        """Predicted speed."""
        by_index = {
            slot.device.index: speed for slot, speed in zip(self.slots, self.speeds, strict=True)
        }
        return predict_speed(
            [(by_index[index], first, end) for index, (first, end) in self.ranges.items()],
            streaming_s=0.0 if self._streamed is None else self._streamed.streaming_s,
        )

    @property
    def waiting_tokens_per_second(self) -> float:
        """A bound of the speed that streaming alone sets, whatever the devices compute."""
        waiting_s = 0.0 if self._streamed is None else self._streamed.streaming_s
        return 1 / waiting_s if waiting_s else float("inf")

    @property
    def decode_speed(self) -> float:
        """Tokens a second of one request; where the devices are unknown, what streaming allows."""
        known = self.tokens_per_second.decode
        return self.waiting_tokens_per_second if known is None else known

    def terms(self, slot: Slot) -> DeviceTerms:
        """Terms of one of the devices."""
        index = slot.device.index
        terms = slot.model.terms(*self.ranges.get(index, (0, 0)))
        if self._streamed is None or index not in self._streamed.streamed:
            return terms
        return replace(terms, weights=self._streamed.resident_bytes[index])
