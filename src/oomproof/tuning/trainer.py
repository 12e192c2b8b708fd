"""transformers' Trainer over our model, data, checkpoints and evaluation.

The run's micro-batches are one list that is known before it begins (tuning/packing.py), so "epoch"
is one walk through that list, and resuming is to skip what was done. Trainer keeps optimizer,
schedule, random numbers and gradient accumulation; what is overridden is where our words differ.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from oomproof.errors import RankError
from oomproof.tuning.batches import IGNORED, Batch, BatchMaker, TrainingSet, unwrapped
from oomproof.tuning.distributed import ALONE, Ranks
from oomproof.tuning.history import perplexity, read_history
from oomproof.tuning.meter import MemoryMeter
from oomproof.tuning.options import OPTIMIZERS, TuningSettings
from oomproof.tuning.packing import batches
from oomproof.tuning.plan import TrainingPlan
from oomproof.tuning.progress import Evaluated, OnTuning, Said, StepDone
from oomproof.tuning.saved import BEST_FOLDER, SAVING_FOLDER, prune, publish


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Steps at which something is done, and what is told of them.

    Args:
        settings: What is asked.
        evaluations: Steps after which held-out samples are evaluated.
        saves: Steps after which a checkpoint is written.
        tokens_of: The tokens of a step, from 1, without padding.
        meter: Of memory.
        on_event: Told of everything.
        ranks: The processes that train: what one is asked to do, all do.
    """

    def __init__(
        self,
        settings: TuningSettings,
        *,
        evaluations: Sequence[int],
        saves: Sequence[int],
        tokens_of: Callable[[int], int],
        meter: MemoryMeter,
        on_event: OnTuning,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._settings, self._meter, self._on_event = settings, meter, on_event
        self._tokens_of = tokens_of
        self._evaluations, self._saves = frozenset(evaluations), frozenset(saves)
        self.stop_asked = False
        """By a signal, to this process."""
        self.tokens = 0
        self.seconds = 0.0
        self.batch = (0, 0)
        """Sequences and tokens of the micro-batch under way."""
        self._begin_s = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock runs while a step does, not while samples are evaluated or saved."""
        self._begin_s = time.perf_counter()

    def on_step_end(self, _args: Any, state: Any, control: Any, **__: Any) -> Any:
        """What is due after a step."""
        self.seconds += time.perf_counter() - self._begin_s
        step, last = state.global_step, state.global_step >= state.max_steps
        self.tokens += self._tokens_of(step)
        stops = last or self._ranks.any_of(self.stop_asked)
        control.should_log = True
        control.should_evaluate = step in self._evaluations
        control.should_save = step in self._saves or stops
        control.should_training_stop = stops
        return control

    def on_log(
        self, _args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> Any:
        """Tells of a step, and ends a run whose loss is no number: nothing of it is kept."""
        if logs is not None and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                control.should_training_stop = True
                control.should_evaluate = control.should_save = False
            self._on_event(
                StepDone(
                    step=state.global_step,
                    steps=state.max_steps,
                    loss=float(logs["loss"]),
                    learning_rate=float(logs["learning_rate"]),
                    tokens_per_second=self.tokens / max(self.seconds, 1e-9),
                    memory_bytes=self._meter.read(),
                )
            )
        return control

    def on_evaluate(self, _args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ends a run that no longer gets better, with a checkpoint of where it ended."""
        if read_history(state.log_history).is_over(self._settings.patience):
            self._on_event(
                Said(
                    text=f"stopped after step {state.global_step}: no new best for "
                    f"{self._settings.patience} evaluations"
                )
            )
            control.should_training_stop = True
            control.should_save = True
        return control


class TuningTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """transformers' loop, as this project's words have it.

    Args:
        model: See tuning.protocol.TrainingModel.
        folder: Where checkpoints go.
        plan: What is executed.
        settings: What is asked.
        training: The run's micro-batches.
        validation: Held-out sequences; None for none.
        device: Where the model is.
        watch: What is due when.
        ranks: The processes that train: all run everything, the first one writes.
    """

    def __init__(  # noqa: PLR0913 - everything that a loop is made of
        self,
        model: Any,
        folder: Path,
        *,
        plan: TrainingPlan,
        settings: TuningSettings,
        training: TrainingSet,
        validation: BatchMaker | None,
        device: torch.device,
        watch: Watch,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._folder, self._plan, self._settings = folder, plan, settings
        self._validation, self._watch = validation, watch
        self.control: Any
        self._saving = False
        super().__init__(
            model=model,
            args=_arguments(folder, plan, settings, device),
            data_collator=unwrapped,
            train_dataset=training,
            callbacks=[watch],
        )
        self.model_accepts_loss_kwargs = True
        from transformers import PrinterCallback, ProgressCallback

        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def _get_train_sampler(self, *_: Any) -> Any:
        """The list as it is: its order is the seed's already."""
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """It was built where it belongs."""

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The micro-batch's part of the step's mean."""
        rows, tokens = inputs["input_ids"].shape
        self._watch.batch = (int(rows), int(tokens))
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        # The divisor is of all ranks, and both gradients and what is logged are means over them.
        loss = outputs.loss * self._ranks.size if self._ranks.size > 1 else outputs.loss
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of every held-out learned token, each counted once."""
        assert self._validation is not None
        loss = mean_loss(
            self.model,
            self._validation,
            self._plan.micro_batch,
            self.args.device,
            ranks=self._ranks,
        )
        metrics = {"eval_loss": loss}
        self.log(metrics)
        best = read_history(self.state.log_history).best
        is_best = best is not None and best[0] == self.state.global_step
        if is_best:
            self._save_best()
        self._watch._on_event(  # noqa: SLF001 - one of two halves
            Evaluated(
                step=self.state.global_step,
                loss=loss,
                perplexity=perplexity(loss),
                is_best=is_best,
            )
        )
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save_best(self) -> None:
        if not self._ranks.is_first:
            return
        part = self._folder / f"{BEST_FOLDER}.part"
        shutil.rmtree(part, ignore_errors=True)
        self.model.save_adapter(part)
        publish(part, self._folder / BEST_FOLDER)

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ARG002 - as transformers has it
        return str(self._folder / SAVING_FOLDER if self._saving else self._folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        if self._ranks.is_first:
            shutil.rmtree(self._folder / SAVING_FOLDER, ignore_errors=True)
        # All write into it: random numbers are those of each rank.
        self._ranks.meet()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self._ranks.meet()
        if self._ranks.is_first:
            self._publish_checkpoint(name)

    def _publish_checkpoint(self, name: str) -> None:
        publish(self._folder / SAVING_FOLDER / name, self._folder / name)
        shutil.rmtree(self._folder / SAVING_FOLDER, ignore_errors=True)
        prune(self._folder, self._settings.keep_checkpoints)

    def _save(self, output_dir: str | None = None, *_: Any, **__: Any) -> None:
        """The adapter alone."""
        assert output_dir is not None
        self.model.save_adapter(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: Any) -> None:
        self.model.load_adapter(Path(resume_from_checkpoint))


@torch.no_grad()
def mean_loss(
    model: Any,
    maker: BatchMaker,
    micro_batch: int,
    device: torch.device,
    *,
    ranks: Ranks = ALONE,
) -> float:
    """Mean loss of the learned tokens of all sequences, in nats.

    Several ranks share the sequences and get the same number, the one that one process gets. Each
    runs as many passes as the others, which may wait for it in every layer.
    """
    was = model.training
    model.eval()
    every = list(batches(len(maker.rows), micro_batch))
    own: list[tuple[float, int]] = []
    for first in range(0, len(every), ranks.size):
        # Where there is none left for a rank, it computes one again that nobody counts.
        numbers = every[min(first + ranks.rank, len(every) - 1)]
        batch = {name: one.to(device) for name, one in maker.make(list(numbers)).items()}
        loss = float(model(**batch, num_items_in_batch=1).loss)
        own.append((loss, int((batch["labels"] != IGNORED).sum())))
    model.train(was)
    found = [one for turn in zip(*ranks.collect(own), strict=True) for one in turn]
    total, count = 0.0, 0
    for loss, counted in found[: len(every)]:
        total += loss
        count += counted
    return total / count if count else math.nan


def run_widest_first(
    model: Any, maker: BatchMaker, plan: TrainingPlan, device: torch.device
) -> None:
    """One pass over the sequences that need the most memory, with room taken for the optimizer.

    What would run out of memory in the middle of a run does so here. Weights, gradients and random
    numbers are left as they were.
    """
    numbers = maker.widest(plan.micro_batch)
    batch = {name: one.to(device) for name, one in maker.make(numbers).items()}
    states = torch.get_rng_state()
    on_gpu = device.type == "cuda"
    device_states = torch.cuda.get_rng_state(device) if on_gpu else None
    held = torch.empty(plan.terms.optimizer if on_gpu else 0, dtype=torch.uint8, device=device)
    model.train()
    model(**batch).loss.backward()
    model.zero_grad()
    del held
    torch.set_rng_state(states)
    if device_states is not None:
        torch.cuda.set_rng_state(device_states, device)


@contextmanager
def stopping_gently(watch: Watch) -> Iterator[None]:
    """The first interrupt ends the run after its step, with a checkpoint; the second at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if watch.stop_asked:
            raise KeyboardInterrupt
        watch.stop_asked = True
        del number, frame

    names = [signal.SIGINT, signal.SIGTERM]
    try:
        before = {name: signal.signal(name, stop) for name in names}
    except ValueError:  # only the main thread is told of signals
        yield
        return
    try:
        yield
    except RankError:
        if watch.stop_asked:  # by a launcher, which ends all when the first one ends
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _arguments(
    folder: Path, plan: TrainingPlan, settings: TuningSettings, place: torch.device
) -> Any:
    """transformers' words for what is asked, on the one device that the plan names."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.micro_batches_per_step,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        # A step of it at least is taken at the full rate: one alone would learn nothing.
        warmup_steps=min(math.ceil(settings.warmup * plan.steps), plan.steps - 1),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=OPTIMIZERS[plan.optimizer],
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=False,
        use_cpu=plan.base.devices[0].kind == "cpu",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=plan.base.devices[0].kind != "cpu",
        disable_tqdm=True,
        report_to=[],
        log_level="error",
        label_names=["labels"],
    )
    # Left alone it takes the first GPU, or spreads the batch over all of them.
    arguments._setup_devices  # noqa: B018, SLF001 - a property that sets devices up once
    arguments.__dict__["_setup_devices"] = place
    arguments._n_gpu = 0 if place.type == "cpu" else 1  # noqa: SLF001
    arguments.distributed_state.device = place
    if place.type == "cuda":
        torch.cuda.set_device(place)
    return arguments
