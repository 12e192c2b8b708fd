"""Makes the plan of a fine-tuning. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil

from oomproof.errors import NotRunnableError
from oomproof.hardware.spec import Hardware
from oomproof.memory.peft import Tuned, adapter_tensors
from oomproof.memory.profiles import engine_profile
from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.tuning.options import TuningSettings
from oomproof.tuning.plan import Bucket, TrainingData, TrainingPlan, TrainingTerms, as_terms
from oomproof.tuning.remedies import remedies
from oomproof.tuning.requirements import check_peft, check_ranks, device_of
from oomproof.tuning.speed import Work, seconds_of, work_of
from oomproof.tuning.step_memory import NativeMemory, PeftMemory, StepMemory

_BASE_CONTEXT = 256
_OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit")
_CPU_OPTIMIZERS = ("adamw",)
_LEAST_BATCH = 4
"""Sequences at once below which recomputing activations is chosen instead."""

_FASTER = 0.95
"""Of the predicted time of a step: what fewer sequences at once are worth."""


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
        engine: "native" or "transformers".
        ranks: Processes that train together, a device each: it is planned for the smallest of them.

    Raises:
        NotRunnableError: The engine does not hold that format, or trains in one process only.
        HardwareError: More ranks than devices.
        InputError: A batch that ranks cannot share evenly, nobody to share layers with, or a target
            module that the model has not.
    """

    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        request: PlanRequest,
        settings: TuningSettings,
        *,
        engine: str = "transformers",
        ranks: int = 1,
    ) -> None:
        self._spec, self._settings, self._engine = spec, settings, engine
        self._hardware, self._request, self._ranks = hardware, request, ranks
        check_ranks(ranks, settings, engine)
        self.device = device_of(hardware, ranks)
        self._machine = replace(hardware, devices=(self.device,), links=())
        self._devices = len(hardware.devices)
        context = min(_BASE_CONTEXT, spec.max_position_embeddings)
        # The base is loaded for training alone: it keeps no cache worth the name.
        request = replace(request, context=context, concurrency=1, engine=engine)
        held = make_plan(spec, self._machine, replace(request, compute_dtype="auto"))
        if not held.runnable:
            raise NotRunnableError(
                f"{spec.id} cannot be trained in {held.format}: {held.not_runnable}",
                remedy="use --format nf4-dq",
            )
        if self.device.kind == "cpu" and request.compute_dtype == "auto":
            # Products of bfloat16 are no faster on most processors, and attention is slower.
            request = replace(request, compute_dtype="float32")
        self.base: Plan = make_plan(spec, self._machine, request)
        [planned] = self.base.devices
        self.usable_bytes = planned.usable_bytes
        if self.device.kind == "cpu":
            self.usable_bytes //= ranks
        self.host_bytes = self.base.host.usable_bytes
        profile = engine_profile(engine, self.device, hardware.host)
        self._library_bytes = profile.library_workspace_bytes + profile.fragmentation_bytes
        on_gpu = self.device.kind != "cpu"
        self._memory: StepMemory = PeftMemory(spec, on_gpu=on_gpu)
        self._sharded = False
        if engine == "native":
            self._share(ranks > 1 and settings.shard == "on")
        else:
            check_peft(spec, settings, on_gpu=on_gpu)

    def _share(self, sharded: bool) -> None:
        """Plans on with layers that are cut among ranks, or whole ones on each."""
        self._sharded = sharded
        self._memory = NativeMemory(
            self._spec,
            self.base.format,
            dropout=self._settings.adapter.dropout > 0,
            on_gpu=self.device.kind != "cpu",
            ranks=self._ranks,
            sharded=sharded,
        )

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
        settings, ranks = self._settings, self._ranks
        batch_size = min(settings.batch_size, max(ranks, data.rows // ranks * ranks))
        share = batch_size // ranks
        choice = self._choose_shared(longest, share, data.documents)
        least = choice.tuned
        micro = _even(share, choice.micro_batch or self._least_rows(share))
        faster = None
        if choice.micro_batch and settings.micro_batch is None:
            micro, faster = self._fastest(least, data, longest, share, micro)
        passes = ceil(share / micro)
        tuned = self._filled(least, micro, longest)
        terms, host = self._terms_and_slack(tuned, micro, longest)
        short, host_short = self._missing(tuned, micro, longest)
        fits = choice.micro_batch > 0 and short == 0
        steps = max(1, ceil(round(settings.epochs * data.rows, 6) / batch_size))
        if settings.max_steps is not None:
            steps = min(steps, settings.max_steps)
        work, seconds = self._timed(tuned, data, longest, steps * share, steps * passes)
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
            shortfall_bytes=short or (0 if fits else host_short),
            micro_batch=micro,
            batch_size=batch_size,
            micro_batches_per_step=passes,
            optimizer=tuned.optimizer,
            checkpointing=tuned.checkpointing,
            kept=None if tuned.kept is None else asdict(tuned.kept),
            chunked_loss=chunked_loss,
            device=self.device.name,
            device_index=self.device.index,
            usable_bytes=self.usable_bytes,
            terms=terms,
            host_bytes=sum(host.values()),
            buckets=self._buckets(least, data, longest, share),
            data=data,
            steps=steps,
            epochs=steps * batch_size / max(1, data.rows),
            flops=ranks * work.flops,
            train_s=seconds,
            remedies=()
            if fits
            else remedies(
                self._fits,
                least,
                longest,
                micro_batch=micro,
                fewer=self._largest(least, longest, micro - 1),
                ways=self._memory.ways,
                on_gpu=self.device.kind != "cpu",
                truncates=settings.long_samples == "refuse" and not data.is_cut,
                longest_sample=data.longest,
                others={
                    "--shard on": lambda: self._fits_sharded(longest, share, data.documents),
                    "--format nf4-dq": lambda: self._fits_in_nf4(longest, share, data.documents),
                },
                otherwise="a smaller model, or a device with more memory"
                if short
                else "more host memory",
            ),
            reasons=(
                *self._reasons(tuned, batch_size, chunked_loss=chunked_loss),
                *(() if faster is None else (faster,)),
            ),
            ranks=ranks,
            sharded=self._sharded,
        )

    def _choose_shared(self, longest: int, share: int, documents: int) -> _Choice:
        """With whole layers on every rank; where that does not fit, with parts of them."""
        if self._ranks == 1 or self._settings.shard != "auto":
            return self._choose(longest, share, documents)
        for sharded in (False, True):
            self._share(sharded)
            choice = self._choose(longest, share, documents)
            if choice.micro_batch:
                break
        return choice

    def _timed(
        self, tuned: Tuned, data: TrainingData, longest: int, rows: int, micro_batches: int
    ) -> tuple[Work, float | None]:
        work = work_of(
            self._spec,
            tokens=rows * data.tokens_per_row,
            document=min(longest, data.document_tokens),
            kept=tuned.kept,
            recompute=tuned.checkpointing != "none",
        )
        return work, seconds_of(
            self._spec, self.device, self._engine, work, micro_batches=micro_batches
        )

    def _fastest(
        self, least: Tuned, data: TrainingData, longest: int, share: int, most: int
    ) -> tuple[int, str | None]:
        """Fewer sequences at once leave room to keep more: how many are fastest, and why fewer.

        Args:
            least: What is trained and how, with nothing kept.
            data: What is known of it.
            longest: Tokens of the longest sequence.
            share: A rank's sequences of a step.
            most: Those that fit at once.
        """
        # What layers take to travel, in every pass, is not predicted.
        if least.checkpointing != "auto" or self._sharded:
            return most, None
        found: list[tuple[float, int]] = []
        micro = most
        while micro:
            tuned, passes = self._filled(least, micro, longest), ceil(share / micro)
            _, seconds = self._timed(tuned, data, longest, share, passes)
            if seconds is None:
                return most, None
            found.append((seconds, micro))
            micro = ceil(micro / 2) if micro > 1 else 0
        took, micro = min(found)
        less = 1 - took / found[0][0]
        if less < 1 - _FASTER:
            return most, None
        reason = f"{micro} at once and not {most}: activations are kept, about {less:.0%} less time"
        return micro, reason

    def _terms(
        self, tuned: Tuned, micro_batch: int, length: int
    ) -> tuple[TrainingTerms, Mapping[str, int]]:
        device, host = self._memory.terms(tuned, micro_batch, length)
        return as_terms(self.base, device, self._library_bytes), host

    def _filled(self, tuned: Tuned, micro_batch: int, length: int) -> Tuned:
        """The same with as many activations kept as there is memory left for."""
        terms, _ = self._terms(tuned, micro_batch, length)
        outside = terms.cuda_context + terms.margin
        filled = tuned
        for _ in range(2):  # what is kept needs no room to be computed again: more is left
            slack = self._memory.slack_bytes(filled, micro_batch, length)
            # Where there is no room for the slack, nothing is kept beside it either.
            limit = max(self.usable_bytes - slack, terms.peak_bytes) - outside
            filled = replace(tuned, kept=self._memory.kept(tuned, micro_batch, length, limit))
        return filled

    def _terms_and_slack(
        self, tuned: Tuned, micro_batch: int, length: int
    ) -> tuple[TrainingTerms, Mapping[str, int]]:
        terms, host = self._terms(tuned, micro_batch, length)
        slack = self._memory.slack_bytes(tuned, micro_batch, length)
        left = max(0, self.usable_bytes - terms.peak_bytes)
        return replace(terms, allocator=min(slack, left)), host

    def _missing(self, tuned: Tuned, micro_batch: int, length: int) -> tuple[int, int]:
        """Bytes that the device lacks, and the host."""
        terms, host = self._terms(tuned, micro_batch, length)
        free = self.base.host.usable_bytes
        # Ranks of one machine have one host.
        needed = self.base.host.peak_bytes + self._ranks * sum(host.values())
        host_short = 0 if free is None else max(0, needed - free)
        return max(0, terms.peak_bytes - self.usable_bytes), host_short

    def _fits(self, tuned: Tuned, micro_batch: int, length: int) -> bool:
        return not any(self._missing(tuned, micro_batch, length))

    def _fits_sharded(self, length: int, share: int, documents: int) -> bool:
        if self._ranks == 1 or self._sharded:
            return False
        self._share(True)
        choice = self._choose(length, share, documents)
        self._share(False)
        return choice.micro_batch > 0

    def _fits_in_nf4(self, length: int, share: int, documents: int) -> bool:
        if self.base.format == "nf4-dq" or self._spec.checkpoint_quantization is not None:
            return False
        other = TrainingPlanner(
            self._spec,
            self._hardware,
            replace(self._request, format="nf4-dq"),
            self._settings,
            engine=self._engine,
            ranks=self._ranks,
        )
        return other._choose_shared(length, share, documents).micro_batch > 0

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

    def _tuned(self, optimizer: str, checkpointing: str, documents: int) -> Tuned:
        adapter = self._settings.adapter
        return Tuned(
            rank=adapter.rank,
            target_modules=adapter.target_modules,
            optimizer=optimizer,
            checkpointing=checkpointing,
            compute_bytes=4 if self.base.compute_dtype == "float32" else 2,
            packed=self._settings.packing,
            documents=documents,
            dropout=adapter.dropout > 0,
        )

    def _ways(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Optimizers and ways to keep activations that may be chosen, the first the fastest."""
        settings = self._settings
        on_cpu = self.device.kind == "cpu"
        optimizers: tuple[str, ...] = _CPU_OPTIMIZERS if on_cpu else _OPTIMIZERS
        kept = self._memory.ways
        if settings.optimizer != "auto":
            optimizers = (settings.optimizer,)
        if settings.checkpointing != "auto":
            kept = (settings.checkpointing,)
        return optimizers, kept

    def _least_rows(self, share: int) -> int:
        """Sequences that have to fit at once: those that are asked for, or one."""
        return _even(share, self._settings.micro_batch or 1)

    def _choose(self, length: int, batch_size: int, documents: int) -> _Choice:
        """The fastest way in which the longest sequences fit."""
        settings, rows = self._settings, self._least_rows(batch_size)
        most = batch_size if settings.micro_batch is None else rows
        wanted = min(most, _LEAST_BATCH)
        optimizers, kept = self._ways()
        best: _Choice | None = None
        for optimizer in optimizers:
            for checkpointing in kept:
                tuned = self._tuned(optimizer, checkpointing, documents)
                micro = self._largest(tuned, length, most)
                if settings.micro_batch is not None and micro < most:
                    micro = 0
                if micro >= wanted:
                    return _Choice(tuned=tuned, micro_batch=micro)
                if best is None or micro > best.micro_batch:
                    best = _Choice(tuned=tuned, micro_batch=micro)
        assert best is not None
        if best.micro_batch:
            return best
        # Nothing fits: what misses the least is told.
        choices = [self._tuned(one, other, documents) for one in optimizers for other in kept]
        least = min(
            choices,
            key=lambda one: (
                sum(self._missing(one, rows, length)),
                self._terms(one, rows, length)[0].peak_bytes,
            ),
        )
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

    def _reasons(self, tuned: Tuned, batch_size: int, *, chunked_loss: bool) -> tuple[str, ...]:
        settings, found = self._settings, []
        if self._sharded:
            found.append("each rank holds a part of every frozen layer, and they travel in turn")
        if self._devices > 1 and self._ranks == 1:
            found.append(
                f"one device of {self._devices} is used, the one with the most free memory"
            )
        if batch_size < settings.batch_size:
            found.append(f"the data has {batch_size:,} sequences: as many make a step")
        if settings.optimizer == "auto" and tuned.optimizer != "adamw":
            found.append(f"{tuned.optimizer} is taken: 32-bit states leave too little room")
        if settings.checkpointing == "auto" and tuned.checkpointing == "layers":
            found.append("layers are computed again in the backward pass")
        if settings.checkpointing == "auto" and tuned.checkpointing == "offload":
            found.append("inputs of layers wait in host memory for the backward pass")
        if not chunked_loss:
            found.append("logits of a whole sequence exist at once: this model scales them")
        if not settings.packing:
            found.append("each sequence has one sample")
        return tuple(found)


def _even(share: int, most: int) -> int:
    """As many passes as needed, each about as large: the peak is no higher than it has to be."""
    return ceil(share / ceil(share / most))
