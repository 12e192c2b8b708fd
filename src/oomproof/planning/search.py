"""From a model, a machine and a request to the plan: the best format that fits, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from oomproof.errors import InputError
from oomproof.formats import FORMATS, QUALITY_ORDER, DType, Format, get_format
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.memory.kv_cache import KV_FORMATS, PAGE_TOKENS
from oomproof.memory.model import Demand, MemoryModel, WeightCosts
from oomproof.memory.profiles import EngineProfile, engine_profile
from oomproof.memory.terms import DeviceTerms, HostTerms
from oomproof.models.spec import ModelSpec
from oomproof.planning.explain import misfit, why_not_runnable
from oomproof.planning.placement import Placement, Slot, can_place, place_fastest
from oomproof.planning.plan import Alternative, DevicePlan, HostPlan, Plan
from oomproof.planning.request import DEFAULT_CONTEXT, PlanRequest
from oomproof.planning.shortfall import least_shortfall
from oomproof.planning.speed import predict_speed


def make_plan(spec: ModelSpec, hardware: Hardware, request: PlanRequest) -> Plan:
    """The plan for a model on a machine, fitting or not.

    Raises:
        InputError: A context beyond the model's maximum, an already quantized checkpoint, or a
            limit for a device that is not there.
    """
    return _Planner(spec, hardware, request).plan()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One format at one context, placed as well as it can be."""

    format: Format
    kv_format: str
    context: int
    slots: tuple[Slot, ...]
    host: HostPlan
    not_runnable: str | None
    """Why no engine runs it here, None where one does."""

    @cached_property
    def placement(self) -> Placement:
        """Ranges of units for the devices."""
        return place_fastest(self.slots) or least_shortfall(self.slots)

    @cached_property
    def shortfall_bytes(self) -> int:
        """What is missing on the devices and on the host."""
        return self.placement.shortfall_bytes + self.host_shortfall_bytes

    @property
    def host_shortfall_bytes(self) -> int:
        """What is missing in host RAM."""
        if self.host.usable_bytes is None:
            return 0
        return max(0, self.host.peak_bytes - self.host.usable_bytes)

    @cached_property
    def fits(self) -> bool:
        """Whether every device and the host hold it."""
        return self.host_shortfall_bytes == 0 and can_place(self.slots)

    def terms(self, slot: Slot) -> DeviceTerms:
        """Terms of one of the devices."""
        first, end = self.placement.ranges.get(slot.device.index, (0, 0))
        return slot.model.terms(first, end)

    def explain_misfit(self) -> str:
        """How many bytes are missing, and where."""
        if self.placement.fits:
            return f"host RAM: needs {self.host.peak_bytes:,}, has {self.host.usable_bytes:,} bytes"
        used = [slot for slot in self.slots if slot.device.index in self.placement.ranges]
        return misfit(
            {slot.device.index: self.terms(slot) for slot in used},
            {slot.device.index: slot.usable_bytes for slot in used},
            {slot.device.index: device_label(slot.device) for slot in used},
        )


def device_label(device: DeviceSpec) -> str:
    """How sentences name a device: "GPU 0 (NVIDIA H200)", or "the CPU's RAM"."""
    return "the CPU's RAM" if device.kind == "cpu" else f"GPU {device.index} ({device.name})"


class _Planner:
    """One model on one machine; keeps what the candidates share."""

    def __init__(self, spec: ModelSpec, hardware: Hardware, request: PlanRequest) -> None:
        self.spec = spec
        self.hardware = hardware
        self.request = request
        self.engine = "transformers" if request.engine == "auto" else request.engine
        self.profiles = tuple(
            engine_profile(self.engine, device, hardware.host) for device in hardware.devices
        )
        self._weight_costs: dict[tuple[str, EngineProfile], WeightCosts] = {}
        _refuse_impossible(spec, hardware, request)

    def plan(self) -> Plan:
        context = self._asked_context()
        candidates = [self._candidate(name, context) for name in self._format_names()]
        runnable = [c for c in candidates if c.not_runnable is None] or candidates
        chosen = next((c for c in runnable if c.fits), runnable[-1])
        max_context = self._max_context(chosen.format.name)
        if self.request.context == "auto" and max_context > 0:
            chosen = self._candidate(chosen.format.name, max_context)
        return self._assemble(chosen, candidates, max_context)

    def _asked_context(self) -> int:
        limit = self.spec.max_position_embeddings
        asked = self.request.context
        if not isinstance(asked, int):
            return min(DEFAULT_CONTEXT, limit)
        if asked > limit:
            raise InputError(
                f"context {asked:,} is beyond what {self.spec.id} was made for",
                remedy=f"ask for at most {limit:,} tokens",
            )
        return asked

    @cached_property
    def _auto_compute_dtype(self) -> DType:
        capabilities = [d.compute_capability for d in self.hardware.devices if d.compute_capability]
        return DType.FLOAT16 if min(capabilities, default=(8, 0)) < (8, 0) else DType.BFLOAT16

    def _compute_dtype(self, weight_format: Format) -> DType:
        return (
            self._auto_compute_dtype if weight_format.is_quantized else weight_format.weight_dtype
        )

    def _format_names(self) -> list[str]:
        """What to try, best quality first."""
        if self.request.format != "auto":
            return [self.request.format]
        return [
            name
            for name in QUALITY_ORDER
            if FORMATS[name].is_quantized or FORMATS[name].weight_dtype is self._auto_compute_dtype
        ]

    def _candidate(self, format_name: str, context: int) -> Candidate:
        weight_format = get_format(format_name)
        compute_dtype = self._compute_dtype(weight_format)
        kv_format = self.request.kv_format
        if kv_format == "auto":
            kv_format = "bf16" if compute_dtype is DType.BFLOAT16 else "fp16"
        demand = Demand(
            context=context,
            concurrency=self.request.concurrency,
            kv_dtype=KV_FORMATS[kv_format],
        )
        models = {
            profile: MemoryModel(self._costs(weight_format, profile), demand)
            for profile in self.profiles
        }
        host = self._host(weight_format)
        return Candidate(
            format=weight_format,
            kv_format=kv_format,
            context=context,
            slots=tuple(
                Slot(
                    device=device,
                    usable_bytes=self._usable_bytes(device, host),
                    model=models[profile],
                )
                for device, profile in zip(self.hardware.devices, self.profiles, strict=True)
            ),
            host=host,
            not_runnable=why_not_runnable(
                self.spec,
                weight_format,
                kv_format,
                compute_dtype,
                self.profiles,
                self.hardware.devices,
            ),
        )

    def _costs(self, weight_format: Format, profile: EngineProfile) -> WeightCosts:
        key = (weight_format.name, profile)
        if key not in self._weight_costs:
            compute_dtype = self._compute_dtype(weight_format)
            self._weight_costs[key] = WeightCosts(self.spec, weight_format, profile, compute_dtype)
        return self._weight_costs[key]

    def _host(self, weight_format: Format) -> HostPlan:
        staging = 0
        if weight_format.name == "llm-int8" and self.hardware.has_gpu:
            # bitsandbytes takes each tensor through host memory on its way to 8 bits.
            largest = max(t.numel for t in self.spec.tensors)
            staging = largest * self.spec.dtype.itemsize
        terms = HostTerms(
            runtime=max(profile.host_runtime_bytes for profile in self.profiles),
            staging=staging,
            pinned=max(profile.pinned_bytes for profile in self.profiles),
        )
        described = self.hardware.source == "described"
        usable = None if described else self.hardware.host.available_ram_bytes
        return HostPlan(usable_bytes=usable, terms=terms)

    def _usable_bytes(self, device: DeviceSpec, host: HostPlan) -> int:
        usable = device.free_bytes - self.request.reserve_bytes
        if device.kind == "cpu":
            usable -= host.peak_bytes
        limits = (self.request.max_memory.get(device.index), self.request.cap_bytes)
        return max(0, min([usable, *(limit for limit in limits if limit is not None)]))

    def _max_context(self, format_name: str) -> int:
        """The largest multiple of the KV page that fits, 0 where none does."""
        limit = self.spec.max_position_embeddings

        def fits(context: int) -> bool:
            return self._candidate(format_name, context).fits

        if not fits(1):
            return 0
        if fits(limit):
            return limit
        low, high = 0, -(-limit // PAGE_TOKENS)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * PAGE_TOKENS) else (low, middle)
        return low * PAGE_TOKENS

    def _assemble(
        self, chosen: Candidate, candidates: Sequence[Candidate], max_context: int
    ) -> Plan:
        devices = tuple(self._device_plan(chosen, slot) for slot in chosen.slots)
        stages = [
            (slot.device, slot.model, *chosen.placement.ranges[slot.device.index])
            for slot in chosen.slots
            if slot.device.index in chosen.placement.ranges
        ]
        spec = self.spec
        return Plan(
            model=spec.id,
            source=spec.source,
            fingerprint=spec.fingerprint,
            num_parameters=spec.num_parameters,
            format=chosen.format.name,
            fits=chosen.fits,
            runnable=chosen.not_runnable is None,
            engine=self.engine,
            compute_dtype=str(self._compute_dtype(chosen.format)),
            attention="eager" if spec.eager_attention else "sdpa",
            kv_format=chosen.kv_format,
            context=chosen.context,
            concurrency=self.request.concurrency,
            max_context=max_context,
            pipeline=len(stages),
            tensor_parallel=1,
            devices=devices,
            host=chosen.host,
            shortfall_bytes=0 if chosen.fits else chosen.shortfall_bytes,
            alternatives=self._alternatives(chosen, candidates),
            download_bytes=_download_bytes(spec),
            tokens_per_second=predict_speed(spec, chosen.format, self.engine, stages),
            reasons=tuple(self._reasons(chosen, candidates, max_context)),
            cap_bytes=self.request.cap_bytes,
            prefill_chunk_tokens=self.profiles[0].prefill_chunk_tokens,
            decoder_prefix=spec.decoder_prefix,
            extra_modules=spec.extra_modules,
        )

    def _device_plan(self, candidate: Candidate, slot: Slot) -> DevicePlan:
        first, end = candidate.placement.ranges.get(slot.device.index, (0, 0))
        num_layers = self.spec.num_hidden_layers
        # Units 1 … L are the decoder layers 0 … L-1.
        first_layer, last_layer = max(first, 1) - 1, min(end, num_layers + 1) - 2
        holds_last_unit = end == num_layers + 2
        tied = self.spec.tie_word_embeddings
        holds_embedding = end > 0 and first == 0
        return DevicePlan(
            index=slot.device.index,
            name=slot.device.name,
            kind=slot.device.kind,
            uuid=slot.device.uuid,
            usable_bytes=slot.usable_bytes,
            layers=(first_layer, last_layer) if first_layer <= last_layer else None,
            holds_embedding=holds_embedding,
            holds_norm=holds_last_unit,
            holds_head=holds_embedding if tied else holds_last_unit,
            terms=candidate.terms(slot),
        )

    def _alternatives(
        self, chosen: Candidate, candidates: Sequence[Candidate]
    ) -> tuple[Alternative, ...]:
        """The other formats, at the asked context, each with its largest context."""
        return tuple(
            Alternative(
                format=other.format.name,
                context=other.context,
                concurrency=self.request.concurrency,
                fits=other.fits,
                runnable=other.not_runnable is None,
                max_context=self._max_context(other.format.name),
                shortfall_bytes=0 if other.fits else other.shortfall_bytes,
            )
            for other in candidates
            if other.format.name != chosen.format.name
        )

    def _reasons(
        self, chosen: Candidate, candidates: Sequence[Candidate], max_context: int
    ) -> list[str]:
        reasons = []
        for other in candidates:
            if other.format.name == chosen.format.name:
                break
            if not other.fits:
                reasons.append(f"{other.format.name} does not fit: {other.explain_misfit()}")
            elif other.not_runnable is not None:
                reasons.append(f"{other.format.name} would fit, but {other.not_runnable}")
        if chosen.not_runnable is not None:
            reasons.append(chosen.not_runnable)
        if not chosen.fits:
            reasons.append(f"{chosen.format.name} does not fit: {chosen.explain_misfit()}")
            if max_context:
                reasons.append(f"it would fit with --context {max_context}")
        if self.spec.eager_attention:
            reasons.append("attention is eager: no fused kernel computes this model's")
        else:
            reasons.append("attention is torch's SDPA, which takes its fastest kernel that applies")
        return reasons


def _refuse_impossible(spec: ModelSpec, hardware: Hardware, request: PlanRequest) -> None:
    if spec.checkpoint_quantization is not None:
        raise InputError(
            f"{spec.id} is already quantized ({spec.checkpoint_quantization})",
            remedy="plan the 16-bit checkpoint it was made from",
        )
    present = [device.index for device in hardware.devices]
    for index in request.max_memory:
        if index not in present:
            raise InputError(
                f"max-memory names device {index}", remedy=f"the devices here are {present}"
            )


def _download_bytes(spec: ModelSpec) -> int:
    """Bytes to fetch: nothing for a folder, the files for a hub id, an estimate for the catalog."""
    if spec.source.kind == "folder":
        return 0
    if spec.checkpoint is not None:
        return spec.checkpoint.total_bytes
    return spec.num_parameters * spec.dtype.itemsize
