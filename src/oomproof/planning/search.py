"""From a model, a machine and a request to the plan: the best format that fits, and why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from oomproof.errors import InputError
from oomproof.formats import (
    FIT,
    FORMATS,
    QUALITY_ORDER,
    DType,
    Format,
    get_format,
    held_format,
    mixture,
)
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.memory.kv_cache import KV_FORMATS, PAGE_TOKENS
from oomproof.memory.model import Demand, MemoryModel, WeightCosts
from oomproof.memory.profiles import QUANTIZED_ROLES, EngineProfile, engine_profile
from oomproof.memory.terms import HostTerms
from oomproof.models.spec import ModelSpec
from oomproof.planning import explain
from oomproof.planning.candidate import Candidate
from oomproof.planning.damage import FIT_FORMATS, WeightErrors, groups_of
from oomproof.planning.download import disk_of, download_bytes
from oomproof.planning.engines import choose_engine
from oomproof.planning.explain import NOT_SEARCHED, NOT_STREAMED, why_not_runnable
from oomproof.planning.fitting import Fitter
from oomproof.planning.notes import Notes, kind_of
from oomproof.planning.placement import Slot
from oomproof.planning.plan import AdapterPlan, Alternative, DevicePlan, HostPlan, Plan
from oomproof.planning.refusals import another_format, refuse_impossible
from oomproof.planning.request import DEFAULT_CONTEXT, MAX_CONCURRENCY, PlanRequest
from oomproof.planning.speed import HOP_S, MIN_TOKENS_PER_SECOND, SpeedModel, load_seconds
from oomproof.units import format_bytes


def make_plan(
    spec: ModelSpec,
    hardware: Hardware,
    request: PlanRequest,
    notes: Notes | None = None,
    errors: WeightErrors | None = None,
) -> Plan:
    """The plan for a model on a machine, fitting or not.

    Args:
        spec: The model.
        hardware: The machine.
        request: What is asked of the plan.
        notes: What rehearsals measured on this machine.
        errors: How well the weights can be stored, where it was measured; for "fit".

    Raises:
        InputError: A context beyond the model's maximum, an already quantized checkpoint, or a
            limit for a device that is not there.
    """
    planner = Planner(spec, hardware, request, notes or Notes(), errors=errors)
    plan = planner.plan()
    if not request.what_would_it_take:
        return plan
    from oomproof.planning.requirements import what_it_would_take

    return replace(
        plan, what_it_would_take=what_it_would_take(planner, plan.context, plan.concurrency)
    )


class Planner:
    """One model on one machine; keeps what the candidates share."""

    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        request: PlanRequest,
        notes: Notes,
        weight_costs: dict[tuple[str, EngineProfile], WeightCosts] | None = None,
        errors: WeightErrors | None = None,
    ) -> None:
        self.spec = spec
        self.hardware = hardware
        self.request = request
        self.notes = notes
        self._engines: dict[str, str] = {}
        self._profiles: dict[tuple[str, str], tuple[EngineProfile, ...]] = {}
        self._weight_costs = {} if weight_costs is None else weight_costs
        self._errors = errors or WeightErrors()
        self._fit_reason: str | None = None
        refuse_impossible(spec, hardware, request)

    def plan(self) -> Plan:
        """The plan, fitting or not."""
        context = self._asked_context()
        concurrency = 1 if self.request.concurrency == "auto" else self.request.concurrency
        candidates = [self.candidate(name, context, concurrency) for name in self.format_names()]
        chosen = self._filled(self._choose(candidates))
        name = chosen.format.name
        if self.request.context == "auto" and (largest := self.max_context(chosen)) > 0:
            chosen = self._like(chosen, largest, concurrency)
        if self.request.concurrency == "auto" and (most := self.max_concurrency(chosen)) > 0:
            chosen = self._like(chosen, chosen.context, most)
        others = [other for other in candidates if other.format.name != name]
        better = candidates[: [other.format.name for other in candidates].index(name)]
        return self._assemble(chosen, others, better)

    def _filled(self, chosen: Candidate) -> Candidate:
        """What fits in "fit" with its spare bytes spent; any other as it is."""
        if chosen.format.name != FIT or chosen.not_runnable is not None:
            return chosen
        fitter = Fitter(
            self.spec,
            self._compute_dtype(chosen.format),
            self._errors,
            lambda weights, ranges: self.candidate_in(
                weights, chosen.context, chosen.concurrency, fixed=ranges
            ),
            on_gpus=self.hardware.has_gpu,
        )
        fitted = fitter.fill(chosen)
        if fitted is None:
            return chosen
        self._fit_reason = fitted.reason
        return fitted.candidate

    def engine(self, weight_format: Format) -> str:
        """The engine that runs the model in a format."""
        key = weight_format.name
        if key not in self._engines:
            self._engines[key] = (
                "transformers"
                if self._is_bitsandbytes_faster(weight_format) or self._lacks_triton
                else choose_engine(
                    self.request.engine, self.spec, weight_format, self.hardware.devices
                )
            )
        return self._engines[key]

    @cached_property
    def _lacks_triton(self) -> bool:
        """Whether this very machine has GPUs, and a system that Triton is not made for."""
        hardware = self.hardware
        here = hardware.source != "described" and self.request.engine == "auto"
        return here and hardware.has_gpu and sys.platform != "linux"

    def _is_bitsandbytes_faster(self, weight_format: Format) -> bool:
        """Whether nobody asked for an engine, and a processor has better kernels in bitsandbytes.

        58 tokens a second against 5 of our plain-torch products: a 135M model in nf4-dq, two cores
        (benchmarks/results/bench-cpu.json).
        """
        request, hardware = self.request, self.hardware
        asked = (request.engine, request.kv_format, request.compute_dtype)
        if asked != ("auto",) * 3 or hardware.has_gpu or weight_format.quant_type is None:
            return False
        if request.search:
            return False
        compute_dtype = self._compute_dtype(weight_format)
        profiles = [
            engine_profile("transformers", device, hardware.host) for device in hardware.devices
        ]
        kv_format = self._kv_format(compute_dtype)
        refusal = why_not_runnable(
            self.spec, weight_format, kv_format, compute_dtype, profiles, hardware.devices
        )
        return refusal is None

    def candidate(
        self, format_name: str, context: int, concurrency: int, *, streaming: bool = False
    ) -> Candidate:
        """One format at one context and concurrency, to be placed."""
        return self.candidate_in(
            self._format(format_name), context, concurrency, streaming=streaming
        )

    def candidate_in(
        self,
        weight_format: Format,
        context: int,
        concurrency: int,
        *,
        streaming: bool = False,
        fixed: Mapping[int, tuple[int, int]] | None = None,
    ) -> Candidate:
        """As `candidate`, of a format that may be a mixture, on units that may be fixed."""
        compute_dtype = self._compute_dtype(weight_format)
        profiles = self._profiles_for(weight_format)
        kv_format = self._kv_format(compute_dtype)
        demand = Demand(context=context, concurrency=concurrency, kv_dtype=KV_FORMATS[kv_format])
        models = {
            profile: MemoryModel(self._costs(weight_format, profile), demand)
            for profile in profiles
        }
        host = self._host(weight_format, profiles)
        not_runnable = why_not_runnable(
            self.spec, weight_format, kv_format, compute_dtype, profiles, self.hardware.devices
        )
        if streaming and not_runnable is None:
            not_runnable = self._why_not_streamed(weight_format)
        if not_runnable is None:
            not_runnable = self._why_not_searched(weight_format)
        speeds = [
            self._speed(device, models[profile], weight_format)
            for device, profile in zip(self.hardware.devices, profiles, strict=True)
        ]
        return Candidate(
            format=weight_format,
            kv_format=kv_format,
            context=context,
            concurrency=concurrency,
            slots=tuple(
                Slot(
                    device=device,
                    usable_bytes=self._usable_bytes(device, host),
                    model=speed.model,
                    unit_seconds=speed.unit_s,
                    alone_seconds=speed.alone_s,
                    hop_seconds=HOP_S,
                )
                for device, speed in zip(self.hardware.devices, speeds, strict=True)
            ),
            speeds=tuple(speeds),
            host=host,
            not_runnable=not_runnable,
            streaming=streaming,
            fixed=fixed,
        )

    def on(self, hardware: Hardware) -> Planner:
        """A planner of the same model for another machine, without this one's limits and notes."""
        free = replace(self.request, max_memory={}, cap_bytes=None, reserve_bytes=0)
        return Planner(self.spec, hardware, free, Notes(), self._weight_costs)

    def least_weights_bytes(self, format_name: str) -> int:
        """Fewest bytes that the weights take on any devices."""
        weight_format = self._format(format_name)
        profile = self._profiles_for(weight_format)[0]
        return self._costs(weight_format, profile).weights[-1]

    def max_context(self, like: Candidate) -> int:
        """The largest multiple of the KV page that fits, 0 where none does."""
        limit = self.spec.max_position_embeddings
        pages = _most(
            -(-limit // PAGE_TOKENS),
            lambda pages: self._like(like, min(limit, pages * PAGE_TOKENS), like.concurrency).fits,
        )
        return min(limit, pages * PAGE_TOKENS)

    def max_concurrency(self, like: Candidate) -> int:
        """Most requests at once that fit at the candidate's context, 0 where not one does."""
        return _most(MAX_CONCURRENCY, lambda count: self._like(like, like.context, count).fits)

    def _like(self, like: Candidate, context: int, concurrency: int) -> Candidate:
        if (context, concurrency) == (like.context, like.concurrency):
            return like
        return self.candidate_in(
            like.format, context, concurrency, streaming=like.streaming, fixed=like.fixed
        )

    def _choose(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best quality that fits and runs; with layers in host memory only where none does."""
        runnable = [c for c in candidates if c.not_runnable is None] or list(candidates)
        fitting = next((c for c in runnable if c.fits), None)
        if fitting is not None:
            return fitting
        if self.request.offload == "cpu" and self.hardware.has_gpu:
            streamed = [
                self.candidate(c.format.name, c.context, c.concurrency, streaming=True)
                for c in runnable
            ]
            fitting_streamed = [c for c in streamed if c.fits]
            quick = [c for c in fitting_streamed if c.decode_speed >= MIN_TOKENS_PER_SECOND]
            if quick:
                return quick[0]
            if fitting_streamed:
                return max(fitting_streamed, key=lambda c: c.decode_speed)
            return min((runnable[-1], streamed[-1]), key=lambda c: c.shortfall_bytes)
        return runnable[-1]

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
        if not weight_format.is_quantized:
            return weight_format.weight_dtype
        asked = self.request.compute_dtype
        return self._auto_compute_dtype if asked == "auto" else DType(asked)

    def _kv_format(self, compute_dtype: DType) -> str:
        if self.request.kv_format != "auto":
            return self.request.kv_format
        return next(name for name, dtype in KV_FORMATS.items() if dtype is compute_dtype)

    def format_names(self) -> list[str]:
        """What to try, best quality first."""
        own = self._own_format
        if own is not None:
            published = self.spec.checkpoint_quantization
            assert published is not None
            assert published.format is not None
            if self.request.format not in ("auto", own.name, published.format.name):
                raise another_format(self.spec, own.name, self.request.format)
            return [own.name]
        if self.request.format != "auto":
            return [self.request.format]
        names = [
            name
            for name in QUALITY_ORDER
            if FORMATS[name].is_quantized or FORMATS[name].weight_dtype is self._auto_compute_dtype
        ]
        # Where our own engine has 8 bits, bitsandbytes' are no choice of their own.
        if self.engine(FORMATS["int8"]) == "native":
            names.remove("llm-int8")
        return names

    @cached_property
    def _own_format(self) -> Format | None:
        """What is held of a checkpoint that is quantized already; None of any other."""
        own = self.spec.checkpoint_quantization
        if own is None or own.format is None:
            return None
        if own.held_as is None or self.engine(own.format) != "native":
            return own.format
        return held_format(own.held_as)

    def _format(self, name: str) -> Format:
        """The checkpoint's own format where it is quantized already, else ours of that name."""
        published, own = self.spec.checkpoint_quantization, self._own_format
        if own is not None and published is not None and published.format is not None:
            names = (own.name, published.format.name, published.held_as)
            own = own if name in names else None
        if own is not None:
            return own
        if name == FIT:
            groups = groups_of(self.spec, QUANTIZED_ROLES["native"])
            return mixture(
                {tensor.name: FIT_FORMATS[0] for group in groups.values() for tensor in group}
            )
        return get_format(name)

    def _profiles_for(self, weight_format: Format) -> tuple[EngineProfile, ...]:
        key = (self.engine(weight_format), kind_of(weight_format))
        if key not in self._profiles:
            engine, kind = key
            self._profiles[key] = tuple(
                self.notes.adjust(engine_profile(engine, device, self.hardware.host), device, kind)
                for device in self.hardware.devices
            )
        return self._profiles[key]

    def _costs(self, weight_format: Format, profile: EngineProfile) -> WeightCosts:
        if weight_format.by_tensor is not None:
            compute_dtype = self._compute_dtype(weight_format)
            return WeightCosts(self.spec, weight_format, profile, compute_dtype)
        key = (weight_format.name, profile)
        if key not in self._weight_costs:
            compute_dtype = self._compute_dtype(weight_format)
            self._weight_costs[key] = WeightCosts(self.spec, weight_format, profile, compute_dtype)
        return self._weight_costs[key]

    def _speed(self, device: DeviceSpec, model: MemoryModel, weight_format: Format) -> SpeedModel:
        engine = self.engine(weight_format)
        decode, prefill = self.notes.speed_factors(device, engine, kind_of(weight_format))
        return SpeedModel(engine, device, model, decode_factor=decode, prefill_factor=prefill)

    def _host(self, weight_format: Format, profiles: Sequence[EngineProfile]) -> HostPlan:
        staging = 0
        if weight_format.name == "llm-int8" and self.hardware.has_gpu:
            # bitsandbytes takes each tensor through host memory on its way to 8 bits.
            largest = max(t.numel for t in self.spec.tensors)
            staging = largest * self.spec.dtype.itemsize
        terms = HostTerms(
            runtime=max(profile.host_runtime_bytes for profile in profiles),
            staging=staging,
            pinned=max(profile.pinned_bytes for profile in profiles),
        )
        described = self.hardware.source == "described"
        usable = None if described else self.hardware.host.available_ram_bytes
        limit = "described" if described else self.hardware.host.ram_limit_source
        most = self.request.max_host_bytes
        if most is not None and (usable is None or most < usable):
            usable, limit = most, "--max-memory"
        return HostPlan(
            usable_bytes=usable,
            limit=limit,
            terms=terms,
        )

    def _usable_bytes(self, device: DeviceSpec, host: HostPlan) -> int:
        usable = device.free_bytes - self.request.reserve_bytes
        if device.kind == "cpu":
            usable -= host.peak_bytes
        limit = self._limit_bytes(device)
        return max(0, usable if limit is None else min(usable, limit))

    def _limit_bytes(self, device: DeviceSpec) -> int | None:
        limits = (self.request.max_memory.get(device.index), self.request.cap_bytes)
        return min((limit for limit in limits if limit is not None), default=None)

    def _assemble(
        self, chosen: Candidate, others: Sequence[Candidate], better: Sequence[Candidate]
    ) -> Plan:
        spec = self.spec
        max_context = self.max_context(chosen)
        max_concurrency = self.max_concurrency(chosen)
        return Plan(
            model=spec.id,
            source=spec.source,
            fingerprint=spec.fingerprint,
            num_parameters=spec.num_parameters,
            format=chosen.format.name,
            fits=chosen.fits,
            runnable=chosen.not_runnable is None,
            not_runnable=chosen.not_runnable,
            refused=self._refused(chosen),
            engine=self.engine(chosen.format),
            compute_dtype=str(self._compute_dtype(chosen.format)),
            attention=self._attention(chosen.format),
            kv_format=chosen.kv_format,
            context=chosen.context,
            concurrency=chosen.concurrency,
            max_context=max_context,
            max_concurrency=max_concurrency,
            pipeline=len(chosen.ranges),
            tensor_parallel=1,
            offload="cpu" if chosen.streaming else "none",
            devices=tuple(self._device_plan(chosen, slot) for slot in chosen.slots),
            host=chosen.host_plan,
            disk=disk_of(self.spec, self.hardware),
            shortfall_bytes=0 if chosen.fits else chosen.shortfall_bytes,
            alternatives=self._alternatives(others),
            download_bytes=download_bytes(spec),
            tokens_per_second=chosen.tokens_per_second,
            load_s=load_seconds(spec, chosen.format, self.engine(chosen.format)),
            reasons=self._reasons(chosen, better, max_context, max_concurrency, others),
            cap_bytes=self.request.cap_bytes,
            reserve_bytes=self.request.reserve_bytes,
            prefill_chunk_tokens=self._profiles_for(chosen.format)[0].prefill_chunk_tokens,
            decoder_prefix=spec.decoder_prefix,
            extra_modules=spec.extra_modules,
            search=self._searches(chosen.format),
            tensor_formats=chosen.format.by_tensor or {},
            adapter=self._adapter_plan(chosen),
            quantized_checkpoint=(
                None
                if spec.checkpoint_quantization is None
                else spec.checkpoint_quantization.method
            ),
        )

    def _adapter_plan(self, chosen: Candidate) -> AdapterPlan | None:
        adapter = self.spec.adapter
        if adapter is None:
            return None
        return AdapterPlan(
            path=adapter.path,
            fingerprint=adapter.fingerprint,
            rank=adapter.rank,
            num_weights=len(adapter.weights),
            num_parameters=adapter.num_parameters,
            weights_bytes=chosen.slots[0].model.adapter_bytes(),
            warning=adapter.warning,
        )

    def _attention(self, weight_format: Format) -> str:
        if self.engine(weight_format) == "native":
            return "paged"
        return "eager" if self.spec.eager_attention else "sdpa"

    def _why_not_streamed(self, weight_format: Format) -> str | None:
        return NOT_STREAMED if self.engine(weight_format) != "native" else None

    def _searches(self, weight_format: Format) -> bool:
        asked = self.request.search or weight_format.name == FIT
        return asked and weight_format.has_block_scales

    def _why_not_searched(self, weight_format: Format) -> str | None:
        searches = self._searches(weight_format) and self.engine(weight_format) != "native"
        return NOT_SEARCHED if searches else None

    def _refused(self, chosen: Candidate) -> str | None:
        """Why a plan that fits is not executed: it streams too slowly, and nobody forced it."""
        if not (chosen.streaming and chosen.fits) or self.request.force:
            return None
        if chosen.decode_speed >= MIN_TOKENS_PER_SECOND:
            return None
        return (
            f"{chosen.decode_speed:.2g} tokens/s is under {MIN_TOKENS_PER_SECOND:g}: "
            f"{format_bytes(chosen.streamed_bytes)} travel from host memory for every token"
        )

    def _reasons(
        self,
        chosen: Candidate,
        better: Sequence[Candidate],
        max_context: int,
        max_concurrency: int,
        others: Sequence[Candidate],
    ) -> tuple[str, ...]:
        reasons = [reason for other in better if (reason := explain.why_not(other)) is not None]
        if self._fit_reason is not None:
            reasons.append(self._fit_reason)
        if chosen.not_runnable is not None:
            reasons.append(chosen.not_runnable)
        if not chosen.fits:
            reasons.append(explain.why_not(chosen) or "")
            reasons += explain.nearest(
                chosen, others, max_context, max_concurrency, self._streamed_instead(chosen)
            )
        if chosen.streaming and chosen.fits:
            reasons.append(explain.price_of_streaming(chosen))
        if self.engine(chosen.format) == "native":
            held = explain.held_otherwise(self.spec, chosen.format)
            reasons += [] if held is None else [held]
        if self._is_bitsandbytes_faster(chosen.format) and self.spec.forward is not None:
            reasons.append(explain.BITSANDBYTES_ON_A_PROCESSOR)
        reasons += explain.adapter(self.spec, chosen)
        reasons.append(explain.attention(self.spec, self.engine(chosen.format)))
        disk = disk_of(self.spec, self.hardware)
        if disk.free_bytes is not None and disk.needed_bytes > disk.free_bytes:
            reasons.append(
                f"the download needs {format_bytes(disk.needed_bytes)}, and the disk has "
                f"{format_bytes(disk.free_bytes)} free: set HF_HOME to a larger one"
            )
        for device in self.hardware.devices[:1]:
            if (measured := self.notes.describe(device, self.engine(chosen.format))) is not None:
                reasons.append(f"calibrated by {measured}")
        return tuple(reasons)

    def _streamed_instead(self, chosen: Candidate) -> Candidate | None:
        """The same choice with layers in host memory, where that would fit."""
        if chosen.streaming or not self.hardware.has_gpu or self.request.offload == "cpu":
            return None
        streamed = self.candidate(
            chosen.format.name, chosen.context, chosen.concurrency, streaming=True
        )
        return streamed if streamed.fits else None

    def _device_plan(self, candidate: Candidate, slot: Slot) -> DevicePlan:
        index = slot.device.index
        first, end = candidate.ranges.get(index, (0, 0))
        num_layers = self.spec.num_hidden_layers
        # Units 1 … L are the decoder layers 0 … L-1.
        first_layer, last_layer = max(first, 1) - 1, min(end, num_layers + 1) - 2
        holds_last_unit = end == num_layers + 2
        tied = self.spec.tie_word_embeddings
        holds_embedding = end > 0 and first == 0
        streamed = candidate.streamed.get(index)
        return DevicePlan(
            index=index,
            name=slot.device.name,
            kind=slot.device.kind,
            uuid=slot.device.uuid,
            usable_bytes=slot.usable_bytes,
            limit_bytes=self._limit_bytes(slot.device),
            layers=(first_layer, last_layer) if first_layer <= last_layer else None,
            streamed_layers=None if streamed is None else (streamed[0] - 1, streamed[1] - 2),
            holds_embedding=holds_embedding,
            holds_norm=holds_last_unit,
            holds_head=holds_embedding if tied else holds_last_unit,
            terms=candidate.terms(slot),
        )

    def _alternatives(self, others: Sequence[Candidate]) -> tuple[Alternative, ...]:
        """The other formats, at the asked context, each with its largest context."""
        return tuple(
            Alternative(
                format=other.format.name,
                context=other.context,
                concurrency=other.concurrency,
                fits=other.fits,
                runnable=other.not_runnable is None,
                max_context=self.max_context(other),
                shortfall_bytes=0 if other.fits else other.shortfall_bytes,
            )
            for other in others
        )


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, 0 where 1 does not; what is less fits too."""
    if not fits(1):
        return 0
    if fits(limit):
        return limit
    low, high = 1, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
