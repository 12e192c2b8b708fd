"""A fine-tuning, from data that is tokenised and a plan that fits to a folder with its adapter."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from oomproof.conversion.files import explained, sync_folder, write_whole
from oomproof.errors import CheckpointError, LoadError, TrainingMemoryError
from oomproof.faults.classify import classify
from oomproof.faults.fault import FaultClass
from oomproof.tuning.batches import BatchMaker, TrainingSet
from oomproof.tuning.cache import DataFacts
from oomproof.tuning.card import card
from oomproof.tuning.distributed import ALONE, Ranks
from oomproof.tuning.history import History, perplexity, read_history
from oomproof.tuning.job import ADAPTER_FILE, REPORT_FILE, TuneFolder
from oomproof.tuning.meter import MemoryMeter
from oomproof.tuning.options import TuningSettings
from oomproof.tuning.packing import Schedule, evaluation_steps
from oomproof.tuning.plan import TrainingPlan
from oomproof.tuning.progress import Evaluated, OnTuning, Said
from oomproof.tuning.report import TuningReport, loss_svg
from oomproof.tuning.saved import BEST_FOLDER, is_whole, last_whole
from oomproof.tuning.trainer import (
    TuningTrainer,
    Watch,
    mean_loss,
    run_widest_first,
    stopping_gently,
)
from oomproof.units import format_bytes

_CONFIG_FILE = "adapter_config.json"
_BASELINE_FILE = "training/baseline.json"
_STATE_FILE = "trainer_state.json"
_VERSIONS = ("oomproof", "torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Everything that a fine-tuning is made of."""

    folder: TuneFolder
    plan: TrainingPlan
    settings: TuningSettings
    facts: DataFacts
    training: BatchMaker
    validation: BatchMaker | None
    """None where nothing is held out."""
    schedule: Schedule
    build: Callable[[], Any]
    """Loads the base as planned, with a new adapter: a tuning.protocol.TrainingModel."""
    model_name: str
    """What people call the base."""
    device: torch.device
    on_event: OnTuning
    ranks: Ranks = ALONE
    """The processes that train it, each with a Tuning; the first one writes."""


class TuningRun:
    """Executes a Tuning.

    Args:
        tuning: What is to be done.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._begin_s = time.perf_counter()
        self._meter = MemoryMeter(tuning.device)
        schedule, settings = tuning.schedule, tuning.settings
        due = evaluation_steps(schedule.steps, settings.evaluations)
        every = settings.save_every
        saves = due if every is None else range(every, schedule.steps + 1, every)
        self._watch = Watch(
            settings,
            evaluations=due if tuning.validation is not None else (),
            saves=saves,
            tokens_of=self._tokens_of,
            meter=self._meter,
            on_event=tuning.on_event,
            ranks=tuning.ranks,
        )

    def run(self) -> TuningReport:
        """Trains, or goes on with it, and writes the adapter.

        Raises:
            TrainingMemoryError: Memory ran out; the last checkpoint is whole.
            LoadError: The loss is no number any more.
            CheckpointError: The disk is full; what is finished is kept.
        """
        tuning, ranks = self._tuning, self._tuning.ranks
        model = self._guarded(tuning.build, is_loading=True)
        self._guarded(lambda: run_widest_first(model, tuning.training, tuning.plan, tuning.device))
        before = self._guarded(lambda: self._baseline(model))
        last = None
        if ranks.is_first:
            last = last_whole(tuning.folder.work, lambda text: tuning.on_event(Said(text=text)))
        last = ranks.share(last)
        trainer = TuningTrainer(
            model,
            tuning.folder.work,
            plan=tuning.plan,
            settings=tuning.settings,
            training=TrainingSet(tuning.training, tuning.schedule),
            validation=tuning.validation,
            device=tuning.device,
            watch=self._watch,
            ranks=ranks,
        )
        state = self._train(trainer, last)
        history = read_history(state.log_history)
        if history.training and not math.isfinite(history.training[-1][1]):
            raise LoadError(
                f"the loss of step {history.training[-1][0]:,} is no number",
                remedy="use a lower --learning-rate",
            )
        over = history.is_over(tuning.settings.patience)
        finished = over or state.global_step >= tuning.schedule.steps
        resumed = 0 if last is None else int(last.name.partition("-")[2])
        report = self._report(model, history, before, resumed=resumed, finished=finished)
        if finished and ranks.is_first:
            self._publish(model, history, report, before)
        # What is written is whole when any of them returns.
        ranks.meet()
        return report

    def _train(self, trainer: TuningTrainer, last: Path | None) -> Any:
        """Trainer's state when it ends."""
        if last is not None:
            state = TrainerState.load_from_json(str(last / _STATE_FILE))
            history = read_history(state.log_history)
            if history.is_over(self._tuning.settings.patience):
                trainer.model.load_adapter(last)
                return state
            self._tuning.on_event(Said(text=f"going on after step {state.global_step:,}"))
        with stopping_gently(self._watch):
            self._guarded(
                lambda: trainer.train(resume_from_checkpoint=None if last is None else str(last))
            )
        return trainer.state

    def _guarded(self, act: Callable[[], Any], *, is_loading: bool = False) -> Any:
        """Raises a failure of memory as one error that says what was computed."""
        try:
            return act()
        except Exception as error:
            fault = classify(error)
            if fault is None or fault.fault_class is not FaultClass.SHRINK:
                raise
        # Out of the handler: the traceback would keep every tensor of the step.
        plan, (rows, tokens) = self._tuning.plan, self._watch.batch
        rows, tokens = rows or plan.micro_batch, tokens or plan.longest
        what = f"with {rows:,} sequences of {tokens:,} tokens"
        smaller = "go on with --resume and a smaller --micro-batch"
        if rows == 1:
            what = f"with one sequence of {tokens:,} tokens"
            smaller = f"use --context {max(8, tokens // 2)} and another --out"
        remedy = f"{smaller}; checkpoints so far are whole"
        if is_loading:
            what, remedy = "while the model was loaded", "free the device, and go on with --resume"
        raise TrainingMemoryError(
            f"memory ran out on {plan.device} {what}; {format_bytes(plan.peak_bytes)} were planned",
            fault=fault,
            micro_batch=rows,
            length=tokens,
            remedy=remedy,
        )

    def _baseline(self, model: Any) -> float | None:
        """Loss of held-out samples before anything is learned; kept, a resumed run reads it."""
        tuning = self._tuning
        if tuning.validation is None:
            return None
        ranks = tuning.ranks
        found = ranks.share(tuning.folder.read(_BASELINE_FILE) if ranks.is_first else None)
        if found is None or not isinstance(found.get("loss"), float):
            plan = tuning.plan
            loss = mean_loss(model, tuning.validation, plan.micro_batch, tuning.device, ranks=ranks)
            found = {"loss": loss}
            if ranks.is_first:
                tuning.folder.write(_BASELINE_FILE, found)
        loss = float(found["loss"])
        tuning.on_event(Evaluated(step=0, loss=loss, perplexity=perplexity(loss), is_best=False))
        return loss

    def _tokens_of(self, step: int) -> int:
        schedule, lengths = self._tuning.schedule, self._tuning.training.rows.lengths
        first = (step - 1) * schedule.micro_batches_per_step
        return sum(
            int(lengths[row])
            for number in range(first, first + schedule.micro_batches_per_step)
            for row in schedule.micro_batch_at(number)
        )

    def _report(
        self,
        model: Any,
        history: History,
        before: float | None,
        *,
        resumed: int,
        finished: bool,
    ) -> TuningReport:
        tuning, watch = self._tuning, self._watch
        best = history.best
        done = history.training[-1] if history.training else (0, None)
        after = None if best is None else best[1]
        # The fullest device is what the plan has to hold for.
        terms, measured = tuning.plan.terms, max(tuning.ranks.collect(self._meter.read()))
        on_gpu = tuning.device.type == "cuda"
        planned = terms.peak_bytes - terms.cuda_context - terms.comm
        planned -= terms.margin if on_gpu else 0
        above = measured - planned if on_gpu else 0
        return TuningReport(
            model=tuning.model_name,
            folder=str(tuning.folder.path),
            engine=tuning.plan.engine,
            finished=finished,
            steps=done[0],
            planned_steps=tuning.schedule.steps,
            resumed_from=resumed,
            adapter_step=done[0] if best is None else best[0],
            loss=done[1],
            validation_before=before,
            validation_after=after,
            perplexity_before=None if before is None else perplexity(before),
            perplexity_after=None if after is None else perplexity(after),
            tokens=watch.tokens,
            tokens_per_second=watch.tokens / watch.seconds if watch.seconds else None,
            seconds=time.perf_counter() - self._begin_s,
            planned_bytes=planned,
            measured_bytes=measured,
            exceeded_bytes=max(0, above),
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        )

    def _publish(
        self, model: Any, history: History, report: TuningReport, before: float | None
    ) -> None:
        """The adapter, its card and its plot; the report, which says that it is finished, last."""
        tuning = self._tuning
        out, work = tuning.folder.path, tuning.folder.work
        source = work / BEST_FOLDER
        if history.best is not None and not is_whole(source):
            raise CheckpointError(
                str(source),
                f"is damaged: it held the adapter of step {history.best[0]:,}",
                remedy="tune again into another --out",
            )
        if history.best is None:
            source = work / "last"
            shutil.rmtree(source, ignore_errors=True)
            model.save_adapter(source)
        with explained(out):
            for name in (_CONFIG_FILE, ADAPTER_FILE):
                write_whole(out / name, (source / name).read_bytes())
            write_whole(out / "loss.svg", loss_svg(history, before=before).encode())
            text = card(
                report,
                tuning.plan,
                tuning.settings,
                tuning.facts,
                base=tuning.model_name,
                versions=_versions(),
            )
            write_whole(out / "README.md", text.encode())
            sync_folder(out)
        content = {"schema": 1, **report.as_dict(), "history": _plain(history)}
        tuning.folder.write(REPORT_FILE, content)
        shutil.rmtree(tuning.folder.cache, ignore_errors=True)
        shutil.rmtree(work / "last", ignore_errors=True)


def _plain(history: History) -> dict[str, Any]:
    return {
        "training": [list(one) for one in history.training],
        "validation": [list(one) for one in history.validation],
    }


def _versions() -> str:
    found = []
    for name in _VERSIONS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
