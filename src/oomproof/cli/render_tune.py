"""Training plans, progress and results as people see them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oomproof.cli.render import say
from oomproof.units import format_bytes, format_parameters

if TYPE_CHECKING:
    from oomproof.tuning.plan import TrainingPlan
    from oomproof.tuning.progress import TuningEvent
    from oomproof.tuning.rehearsal import TuningRehearsal
    from oomproof.tuning.report import TuningReport

_TERMS = {
    "cuda_context": "CUDA context",
    "weights": "weights",
    "gathered": "layers that come together",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "logits": "logits, a chunk",
    "dequantization": "dequantization",
    "library": "libraries",
    "allocator": "allocator's cache",
    "comm": "NCCL",
    "margin": "margin",
}

_KEPT = {
    "attention": "attention",
    "mid": "inputs of MLPs",
    "qkv": "queries, keys, values",
    "gate_up": "gates",
}
"""What a layer of our own engine keeps; gates are the most of it."""


def training_plan_lines(plan: TrainingPlan) -> Iterator[str]:
    """What is done, and whether it fits, as lines of markup."""
    data = plan.data
    yield _base_line(plan)
    yield (
        f"{escape(data.name)}: {data.samples:,} samples, {data.tokens:,} tokens, the longest "
        f"{data.longest:,} (line {data.longest_line:,}); {data.validation_samples:,} held out"
        + (f"; {data.truncated:,} truncated" if data.truncated else "")
        + (f"; {data.dropped:,} dropped" if data.dropped else "")
    )
    yield (
        f"{data.rows:,} sequences of up to {plan.longest:,} tokens, {data.filled:.0%} filled; "
        f"{plan.steps:,} steps of {plan.batch_size:,}, {_at_once(plan)}, "
        f"{plan.epochs:.3g} epochs"
    )
    yield from _memory_lines(plan)


def _at_once(plan: TrainingPlan) -> str:
    if plan.ranks == 1:
        return f"{plan.micro_batch:,} at once"
    return f"{plan.micro_batch:,} at once on each of {plan.ranks} ranks"


def _base_line(plan: TrainingPlan) -> str:
    return (
        f"[bold]{escape(plan.base.model)}[/bold]  "
        f"{format_parameters(plan.base.num_parameters)} parameters · {plan.format} · LoRA rank "
        f"{plan.rank}, {format_parameters(plan.trainable_parameters)} trained · {plan.engine} "
        "engine"
    )


def _memory_lines(plan: TrainingPlan) -> Iterator[str]:
    verdict = "[bold green]fits[/bold green]"
    if not plan.fits:
        where = " in host memory" if plan.lacks_host_memory else ""
        missing = f"{format_bytes(plan.shortfall_bytes)} missing{where}"
        verdict = f"[bold red]does not fit[/bold red]: {missing}"
    yield (
        f"{verdict}: {format_bytes(plan.peak_bytes)} of {format_bytes(plan.usable_bytes)} on "
        f"{'each ' if plan.ranks > 1 else ''}{escape(plan.device)}, with {plan.optimizer}"
        + (", layers shared" if plan.sharded else "")
    )
    yield f"activations kept: {_kept(plan)}"


def _kept(plan: TrainingPlan) -> str:
    if plan.kept is None:
        return {"none": "all", "layers": "inputs of layers", "offload": "none here"}[
            plan.checkpointing
        ]
    layers = max(one.layers[1] for one in plan.base.devices if one.layers) + 1
    inputs = "inputs of layers" + (" on the host" if plan.checkpointing == "offload" else "")
    if all(count == layers for count in plan.kept.values()):
        return "all" if plan.checkpointing != "offload" else f"all, {inputs}"
    found = [
        f"{label} in {'all' if plan.kept[name] == layers else f'{plan.kept[name]} of'} {layers}"
        for name, label in _KEPT.items()
        if plan.kept.get(name)
    ]
    return ", ".join([inputs, *found])


def print_training_plan(plan: TrainingPlan) -> None:
    """The plan as tables, its verdict first."""
    console = Console(highlight=False, soft_wrap=False)
    for line in training_plan_lines(plan):
        console.print(line)
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("memory")
    table.add_column("", justify="right")
    for name, label in _TERMS.items():
        size = getattr(plan.terms, name)
        if size:
            table.add_row(label, format_bytes(size))
    table.add_row("peak", format_bytes(plan.peak_bytes), style="bold")
    if plan.host_bytes:
        table.add_row("host memory", format_bytes(plan.host_bytes))
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for label in ("tokens up to", "samples", "most at once", "then"):
        table.add_column(label, justify="right")
    for bucket in plan.buckets:
        table.add_row(
            f"{bucket.longest:,}",
            f"{bucket.samples:,}",
            f"{bucket.micro_batch:,}" if bucket.micro_batch else "does not fit",
            format_bytes(bucket.peak_bytes),
        )
    console.print(table)
    if plan.train_s is not None:
        console.print(f"about {_duration(plan.train_s)} by {plan.flops / 1e15:,.3g} PFLOP")
    for reason in plan.reasons:
        console.print(f"· {escape(reason)}")
    for remedy in plan.remedies:
        console.print(f"· it would fit with {escape(remedy)}")


def say_training_plan(plan: TrainingPlan) -> None:
    """The plan as lines of talk."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for line in training_plan_lines(plan):
        console.print(line)
    for reason in plan.reasons:
        console.print(f"· {escape(reason)}")


def say_rehearsed_plan(plan: TrainingPlan) -> None:
    """The plan of a rehearsal, which has no data, as lines of talk."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(_base_line(plan))
    console.print(
        f"steps of {plan.batch_size:,} sequences of {plan.longest:,} random tokens, "
        f"{plan.micro_batch:,} at once"
    )
    for line in _memory_lines(plan):
        console.print(line)


def print_rehearsal(rehearsal: TuningRehearsal) -> None:
    """Predicted beside measured."""
    console = Console(highlight=False, soft_wrap=True)
    plan, on_gpu = rehearsal.plan, rehearsal.plan.base.devices[0].kind != "cpu"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for label in ("", "predicted", "measured", "measured / predicted"):
        table.add_column(label, justify="right" if label else "left")
    rows = [("peak without margin", rehearsal.predicted_bytes, rehearsal.measured_bytes)]
    if on_gpu:
        held = rehearsal.context_bytes + rehearsal.reserved_bytes
        rows.insert(0, ("CUDA context", plan.terms.cuda_context, rehearsal.context_bytes))
        rows.append(("with what the allocator caches", plan.peak_bytes, held))
    else:
        grown = "growth of the resident set"
        terms = plan.terms
        rows = [(grown, terms.peak_bytes, rehearsal.measured_bytes)]
    for label, predicted, found in rows:
        ratio = f"{found / predicted:.1%}" if predicted else "–"
        table.add_row(label, format_bytes(predicted), format_bytes(found), ratio)
    console.print(table)
    if not on_gpu:
        console.print("on a processor the libraries are in it: it is not held against the plan")
    speed, predicted_speed = rehearsal.tokens_per_second, rehearsal.predicted_tokens_per_second
    if speed is not None:
        told = "" if predicted_speed is None else f", {predicted_speed:,.0f} predicted"
        console.print(f"{speed:,.0f} tokens/s{told}")
    if rehearsal.losses:
        console.print("loss " + ", ".join(f"{one:.4f}" for one in rehearsal.losses))


def print_tuning(report: TuningReport, out: str) -> None:
    """What came of it, in the folder as the user named it."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{escape(out)}[/bold]: the adapter of step {report.adapter_step:,} of "
        f"{report.planned_steps:,}, {format_parameters(report.trainable_parameters)} parameters"
    )
    if report.perplexity_before is not None and report.perplexity_after is not None:
        change = report.perplexity_after / report.perplexity_before - 1
        console.print(
            f"perplexity of held-out samples {report.perplexity_before:.2f} → "
            f"{report.perplexity_after:.2f} ({change:+.1%})"
        )
    speed = (
        "" if report.tokens_per_second is None else f", {report.tokens_per_second:,.0f} a second"
    )
    console.print(f"{report.tokens:,} tokens in {_duration(report.seconds)}{speed}")
    console.print(
        f"memory {format_bytes(report.measured_bytes)}, {format_bytes(report.planned_bytes)} "
        "planned"
    )
    if report.exceeded_bytes:
        console.print(
            f"[bold red]{format_bytes(report.exceeded_bytes)} more than planned[/bold red]: "
            "please report it"
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class Live:
    """A bar for each stage and one for the steps.

    Args:
        bars: rich's progress.
        shown: Whether somebody watches; else steps are told as lines, a few of them.
    """

    def __init__(self, bars: Any, *, shown: bool) -> None:
        self._bars, self._shown = bars, shown
        self._stages: dict[str, Any] = {}
        self._steps: Any = None
        self._told = -1

    def stage(self, stage: str, done: int, total: int) -> None:
        """Bytes read, tokenised, downloaded or loaded."""
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(stage, total=total, text="")
        text = f"{format_bytes(done)} of {format_bytes(total)}"
        self._bars.update(self._stages[stage], completed=done, total=total, text=text)

    def event(self, event: TuningEvent) -> None:
        """A step, an evaluation, or something to say."""
        from oomproof.tuning.progress import Evaluated, Said, StepDone

        if isinstance(event, Said):
            self._say(event.text)
        elif isinstance(event, Evaluated):
            best = ", the best so far" if event.is_best else ""
            self._say(
                f"step {event.step:,}: held-out loss {event.loss:.4f}, perplexity "
                f"{event.perplexity:.2f}{best}"
            )
        elif isinstance(event, StepDone):
            self._step(event)

    def _step(self, event: Any) -> None:
        text = (
            f"loss {event.loss:.4f}  {event.tokens_per_second:,.0f} tokens/s  "
            f"{format_bytes(event.memory_bytes)}"
        )
        if self._shown:
            if self._steps is None:
                self._steps = self._bars.add_task("train", total=event.steps, text="")
            self._bars.update(self._steps, completed=event.step, text=text)
            return
        # Nobody watches a log grow: twenty lines tell as much as thousands.
        part = event.step * 20 // event.steps
        if part != self._told:
            self._told = part
            say(f"step {event.step:,} of {event.steps:,}: {text}")

    def _say(self, text: str) -> None:
        if self._shown:
            self._bars.console.print(text, highlight=False)
        else:
            say(text)


@contextmanager
def training_progress(*, quiet: bool = False) -> Iterator[Live]:
    """Bars on stderr where somebody watches, lines elsewhere; nothing at all where it is quiet."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        yield Live(bars, shown=console.is_terminal)
