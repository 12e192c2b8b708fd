"""Makes the plan of a fine-tuning. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil

from oomproof.formats import get_format
from oomproof.hardware.spec import DeviceSpec, Hardware
from oomproof.memory.peft import Tuned, adapter_tensors, training_terms
from oomproof.memory.profiles import engine_profile
from oomproof.models.spec import ModelSpec, Role
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.planning.speed import CALIBRATIONS
from oomproof.tuning.options import TuningSettings
from oomproof.tuning.plan import Bucket, TrainingData, TrainingPlan, TrainingTerms, as_terms
from oomproof.units import format_bytes, round_up

_BASE_CONTEXT = 256
_CHECKPOINTING = ("none", "layers", "offload")
_OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit")
_CPU_OPTIMIZERS = ("adamw",)
_LEAST_BATCH = 4
"""Sequences at once below which recomputing activations is chosen instead."""

TermsOf = Callable[[Tuned, int, int], tuple[Mapping[str, int], Mapping[str, int]]]
"""(what is trained and how, sequences at once, tokens of each) → bytes of device and host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    tuned: Tuned
    micro_batch: int
    """0 where not even one sequence fits."""


class TrainingPlanner:
    """Plans one model, one device and one set of options, for any data.

    Args:
        spec: The model.
        hardware: The machine; the device with the most free memory is used.
        request: Limits of memory, and the base's format.
        settings: What is asked.
        terms_of: The engine's memory model.
        engine: Its name.
    """

    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        request: PlanRequest,
        settings: TuningSettings,
        *,
        terms_of: TermsOf | None = None,
        engine: str = "transformers",
    ) -> None:
        self._spec, self._settings, self._engine = spec, settings, engine
        self.device = max(hardware.devices, key=lambda one: one.free_bytes)
        self._machine = replace(hardware, devices=(self.device,), links=())
        self._devices = len(hardware.devices)
        if self.device.kind == "cpu" and request.compute_dtype == "auto":
            # Products of bfloat16 are no faster on most processors, and attention is slower.
            request = replace(request, compute_dtype="float32")
        context = min(_BASE_CONTEXT, spec.max_position_embeddings)
        # The base is loaded for training alone: it keeps no cache worth the name.
        self.base: Plan = make_plan(
            spec, self._machine, replace(request, context=context, concurrency=1, engine=engine)
        )
        [planned] = self.base.devices
        self.usable_bytes = planned.usable_bytes
        self.host_bytes = self.base.host.usable_bytes
        profile = engine_profile(engine, self.device, hardware.host)
        self._library_bytes = profile.library_workspace_bytes + profile.fragmentation_bytes
        self._terms_of = terms_of or self._peft_terms

    def _peft_terms(
        self, tuned: Tuned, micro_batch: int, length: int
    ) -> tuple[Mapping[str, int], Mapping[str, int]]:
        return training_terms(self._spec, tuned, micro_batch=micro_batch, length=length)

    def plan(
        self,
        data: TrainingData,
        *,
        context: int,
        longest: int,
        chunked_loss: bool = True,
    ) -> TrainingPlan:
        """The plan for some data.

        Args:
            data: What is known of it.
            context: Tokens of a sequence.
            longest: Tokens of the longest sequence, as it is padded.
            chunked_loss: Whether logits are made in chunks.
        """
        settings = self._settings
        batch_size = min(settings.batch_size, max(1, data.rows))
        choice = self._choose(longest, batch_size)
        tuned, micro = choice.tuned, max(1, choice.micro_batch)
        # As many passes as needed, each about as large: the peak is no higher than it has to be.
        passes = ceil(batch_size / micro)
        micro = ceil(batch_size / passes)
        terms, host = self._terms(tuned, micro, longest)
        short = max(0, terms.peak_bytes - self.usable_bytes)
        fits = choice.micro_batch > 0 and short == 0
        steps = max(1, ceil(round(settings.epochs * data.rows, 6) / batch_size))
        if settings.max_steps is not None:
            steps = min(steps, settings.max_steps)
        tokens = steps * batch_size * data.tokens_per_row
        flops = self._flops(tokens, longest, recompute=tuned.checkpointing != "none")
        return TrainingPlan(
            base=self.base,
            engine=self._engine,
            format=self.base.format,
            compute_dtype=self.base.compute_dtype,
            rank=settings.adapter.rank,
            alpha=settings.adapter.alpha,
            target_modules=settings.adapter.target_modules,
            trainable_parameters=sum(adapter_tensors(self._spec, tuned)),
            context=context,
            packing=settings.packing,
            longest=longest,
            fits=fits,
            shortfall_bytes=short,
            micro_batch=micro,
            batch_size=batch_size,
            micro_batches_per_step=passes,
            optimizer=tuned.optimizer,
            checkpointing=tuned.checkpointing,
            chunked_loss=chunked_loss,
            device=self.device.name,
            device_index=self.device.index,
            usable_bytes=self.usable_bytes,
            terms=terms,
            host_bytes=sum(host.values()),
            buckets=self._buckets(tuned, data, longest, batch_size),
            data=data,
            steps=steps,
            epochs=steps * batch_size / max(1, data.rows),
            flops=flops,
            train_s=self._seconds(flops),
            remedies=() if fits else self._remedies(tuned, longest),
            reasons=self._reasons(tuned, batch_size, chunked_loss=chunked_loss),
        )

    def _terms(
        self, tuned: Tuned, micro_batch: int, length: int
    ) -> tuple[TrainingTerms, Mapping[str, int]]:
        device, host = self._terms_of(tuned, micro_batch, length)
        return as_terms(self.base, device, self._library_bytes), host

    def _fits(self, tuned: Tuned, micro_batch: int, length: int) -> bool:
        terms, host = self._terms(tuned, micro_batch, length)
        free = self.base.host.usable_bytes
        host_fits = free is None or self.base.host.peak_bytes + sum(host.values()) <= free
        return terms.peak_bytes <= self.usable_bytes and host_fits

    def _largest(self, tuned: Tuned, length: int, most: int) -> int:
        """The most sequences of a length at once; 0 where not one fits."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(tuned, middle, length):
                low = middle
            else:
                high = middle - 1
        return low

    def _tuned(self, optimizer: str, checkpointing: str) -> Tuned:
        adapter = self._settings.adapter
        return Tuned(
            rank=adapter.rank,
            target_modules=adapter.target_modules,
            optimizer=optimizer,
            checkpointing=checkpointing,
            compute_bytes=4 if self.base.compute_dtype == "float32" else 2,
            packed=self._settings.packing,
        )

    def _ways(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Optimizers and ways to keep activations that may be chosen, the first the fastest."""
        settings = self._settings
        on_cpu = self.device.kind == "cpu"
        optimizers: tuple[str, ...] = _CPU_OPTIMIZERS if on_cpu else _OPTIMIZERS
        kept: tuple[str, ...] = _CHECKPOINTING[:2] if on_cpu else _CHECKPOINTING
        if settings.optimizer != "auto":
            optimizers = (settings.optimizer,)
        if settings.checkpointing != "auto":
            kept = (settings.checkpointing,)
        return optimizers, kept

    def _choose(self, length: int, batch_size: int) -> _Choice:
        """The fastest way in which the longest sequences fit."""
        settings = self._settings
        most = settings.micro_batch or batch_size
        wanted = min(most, _LEAST_BATCH)
        optimizers, kept = self._ways()
        best: _Choice | None = None
        for optimizer in optimizers:
            for checkpointing in kept:
                tuned = self._tuned(optimizer, checkpointing)
                micro = self._largest(tuned, length, most)
                if settings.micro_batch is not None and micro < settings.micro_batch:
                    micro = 0
                if micro >= wanted:
                    return _Choice(tuned=tuned, micro_batch=micro)
                if best is None or micro > best.micro_batch:
                    best = _Choice(tuned=tuned, micro_batch=micro)
        assert best is not None
        if best.micro_batch:
            return best
        # Nothing fits: what misses the least is told.
        choices = [self._tuned(one, other) for one in optimizers for other in kept]
        least = min(choices, key=lambda one: self._terms(one, 1, length)[0].peak_bytes)
        return _Choice(tuned=least, micro_batch=0)

    def _buckets(
        self, tuned: Tuned, data: TrainingData, longest: int, batch_size: int
    ) -> tuple[Bucket, ...]:
        counts = dict(data.lengths)
        lengths = sorted({*(length for length in counts if length < longest), longest})
        found = []
        for length in lengths:
            micro = self._largest(tuned, length, batch_size)
            terms, _ = self._terms(tuned, max(1, micro), length)
            samples = counts.get(length, 0)
            if length == longest:
                samples = sum(count for size, count in counts.items() if size >= length)
            found.append(
                Bucket(
                    longest=length, samples=samples, micro_batch=micro, peak_bytes=terms.peak_bytes
                )
            )
        return tuple(found)

    def _remedies(self, tuned: Tuned, longest: int) -> tuple[str, ...]:
        """What would make one of the longest sequences fit, each alone."""
        found = []
        length = round_up(max(1, longest // 2), 64)
        while length >= 64:
            if self._fits(tuned, 1, length):
                found.append(f"--context {self._longest_that_fits(tuned, longest)}")
                break
            length = length // 2 // 64 * 64
        for flag, other in (
            ("--checkpointing layers", replace(tuned, checkpointing="layers")),
            ("--checkpointing offload", replace(tuned, checkpointing="offload")),
            ("--optimizer adamw-8bit", replace(tuned, optimizer="adamw-8bit")),
            ("--optimizer paged-adamw-8bit", replace(tuned, optimizer="paged-adamw-8bit")),
            (f"--rank {max(1, tuned.rank // 4)}", replace(tuned, rank=max(1, tuned.rank // 4))),
            ("--no-packing", replace(tuned, packed=False)),
        ):
            works_here = self.device.kind != "cpu" or flag == "--checkpointing layers"
            if other != tuned and works_here and self._fits(other, 1, longest):
                found.append(flag)
        if self.base.format != "nf4-dq" and not found:
            found.append("--format nf4-dq")
        return tuple(found) or ("a smaller model, or a device with more memory",)

    def _longest_that_fits(self, tuned: Tuned, longest: int) -> int:
        low, high = 1, longest // 64
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(tuned, 1, middle * 64):
                low = middle
            else:
                high = middle - 1
        return low * 64

    def _reasons(self, tuned: Tuned, batch_size: int, *, chunked_loss: bool) -> tuple[str, ...]:
        settings, found = self._settings, []
        if self._devices > 1:
            found.append(
                f"one device of {self._devices} is used, the one with the most free memory"
            )
        if batch_size < settings.batch_size:
            found.append(f"the data has {batch_size:,} sequences: as many make a step")
        if settings.optimizer == "auto" and tuned.optimizer != "adamw":
            found.append(f"{tuned.optimizer} is taken: 32-bit states leave too little room")
        if settings.checkpointing == "auto" and tuned.checkpointing != "none":
            where = ", their inputs kept in host memory" if tuned.checkpointing == "offload" else ""
            found.append(f"layers are computed again in the backward pass{where}")
        if not chunked_loss:
            found.append("logits of a whole sequence exist at once: this model scales them")
        if not settings.packing:
            found.append("each sequence has one sample")
        return tuple(found)

    def _flops(self, tokens: float, length: int, *, recompute: bool) -> float:
        """Forward, through the frozen weights backward, and forward again where recomputed.

        A frozen weight has no gradient of its own: two products instead of three.
        """
        weights = sum(
            one.numel for one in self._spec.tensors if one.role in (Role.LINEAR, Role.HEAD)
        )
        if self._spec.tie_word_embeddings:
            weights += self._spec.vocab_size * self._spec.hidden_size
        attention = sum(
            self._spec.num_attention_heads * (one.query_head_dim + one.output_head_dim)
            for one in self._spec.attention
        )
        passes = 3 if recompute else 2
        return tokens * (2 * weights * passes + length * attention * (passes + 1))

    def _seconds(self, flops: float) -> float | None:
        device: DeviceSpec = self.device
        if device.flops_per_s is None:
            return None
        kind = "4-bit" if get_format(self.base.format).quant_type is not None else "16-bit"
        return flops / (device.flops_per_s * CALIBRATIONS["transformers", kind].flops_efficiency)


def describe_shortfall(plan: TrainingPlan) -> tuple[str, str]:
    """What does not fit, and what would help."""
    message = (
        f"one sequence of {plan.longest:,} tokens needs {format_bytes(plan.peak_bytes)}, "
        f"{plan.device} has {format_bytes(plan.usable_bytes)}: "
        f"{format_bytes(plan.shortfall_bytes)} missing"
    )
    return message, "use " + ", or ".join(plan.remedies)
