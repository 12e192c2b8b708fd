"""Plans, progress and memory as people see them. Results go to stdout, talk to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import DevicePlan, Plan
from oomproof.units import GIB, MIB, format_bytes, format_parameters

if TYPE_CHECKING:
    from oomproof.doctor.findings import Verdict
    from oomproof.engine.model import Model, Stream
    from oomproof.engine.rehearsal import Rung
    from oomproof.guarding.ladder import LadderEvent
    from oomproof.monitoring.events import MonitorEvent

_TERMS = tuple(field.name for field in fields(DeviceTerms))
_WIDEST = 1000
"""Characters that a table is measured in, wider than any."""


def say(text: str) -> None:
    """Talk: a line on stderr."""
    sys.stderr.write(text + "\n")


def print_event(event: LadderEvent | MonitorEvent) -> None:
    """A rung that is taken; what the monitor finds is told by the logger."""
    from oomproof.guarding.ladder import LadderEvent

    if isinstance(event, LadderEvent):
        say(event.message)
        if event.kept is not None:
            say(f"  what is known of it: {event.kept}")


def _stdout() -> Console:
    return Console(highlight=False, soft_wrap=False)


def fitted(table: Table, console: Console) -> Table:
    """No figure is cut: rather one space between columns than two."""
    wide = console.options.update(width=_WIDEST)
    if console.measure(table, options=wide).maximum > console.width:
        table.padding = 0
    return table


def print_plan(plan: Plan) -> None:
    """The plan as a table, its verdict first."""
    console = _stdout()
    console.print(f"[bold]{escape(plan.model)}[/bold]  {escape(describe_choice(plan))}")
    console.print(f"on {escape(_device_names(plan))}")
    console.print(_verdict(plan))
    console.print()
    console.print(fitted(_device_table(plan), console))
    _print_facts(console, plan)
    if plan.alternatives:
        console.print(_alternatives_table(plan))
    if plan.what_it_would_take:
        console.print(_requirements_table(plan))


def describe_choice(plan: Plan) -> str:
    """Parameters, format, context, engine, in a line."""
    requests = "" if plan.concurrency == 1 else f" × {plan.concurrency} requests"
    weights = f"{plan.format}, searched scales" if plan.search else plan.format
    adapter = "" if plan.adapter is None else f"adapter {Path(plan.adapter.path).name} · "
    return (
        f"{format_parameters(plan.num_parameters)} parameters · {weights} · {adapter}"
        f"{plan.context:,} tokens{requests} · {plan.engine} engine"
    )


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return f"[bold red]does not fit[/bold red]: {format_bytes(plan.shortfall_bytes)} missing"
    if plan.refused is not None:
        return f"[bold yellow]fits, but is refused without --force[/bold yellow]: {plan.refused}"
    if not plan.runnable:
        return "[bold yellow]fits, but no engine here runs it[/bold yellow]"
    requests = "1 request" if plan.max_concurrency == 1 else f"{plan.max_concurrency:,} requests"
    return (
        f"[bold green]fits[/bold green], up to {plan.max_context:,} tokens of context, "
        f"or {requests} of {plan.context:,}"
    )


_COLUMNS = {
    "cuda_context": "ctx",
    "weights": "weights",
    "kv_cache": "KV",
    "workspace": "work",
    "staging": "stage",
    "graphs": "graphs",
    "comm": "comm",
    "margin": "margin",
}


def _device_table(plan: Plan) -> Table:
    """A row a device and a column a term, narrow enough for 80 columns."""
    names = [n for n in _TERMS if any(getattr(d.terms, n) for d in plan.devices)]
    small = all(device.peak_bytes < GIB for device in plan.devices)
    unit, scale = ("MiB", MIB) if small else ("GiB", GIB)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{unit} of each device (stage is over before KV and work begin)",
        title_justify="left",
    )
    table.add_column("device", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    for name in names:
        table.add_column(_COLUMNS[name], justify="right", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("free", justify="right", no_wrap=True)
    for device in plan.devices:
        peak = _figure(device.peak_bytes, scale)
        over = device.peak_bytes > device.usable_bytes
        table.add_row(
            "cpu" if device.kind == "cpu" else f"GPU {device.index}",
            _layers(device),
            *(_figure(getattr(device.terms, name), scale) for name in names),
            f"[red]{peak}[/red]" if over else peak,
            _figure(device.usable_bytes, scale),
        )
    return table


def _figure(size_bytes: int, scale: int) -> str:
    if size_bytes == 0:
        return "–"
    value = size_bytes / scale
    if value < 0.005:
        return "<0.01"
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _layers(device: DevicePlan) -> str:
    """Such as "E 0–31 H": the embedding, decoder layers 0 to 31, the head."""
    parts = []
    if device.holds_embedding:
        parts.append("E")
    if device.layers is not None:
        first, last = device.layers
        parts.append(f"{first}–{last}")
    if device.holds_head:
        parts.append("H")
    return " ".join(parts) or "–"


def _device_names(plan: Plan) -> str:
    """Such as "2 × NVIDIA A100-SXM4-80GB, 1 × 12.0 GiB GPU"."""
    counts: dict[str, int] = {}
    for device in plan.devices:
        counts[device.name] = counts.get(device.name, 0) + 1
    return ", ".join(f"{count} × {name}" for name, count in counts.items())


def _print_facts(console: Console, plan: Plan) -> None:
    speed = plan.tokens_per_second
    host = format_bytes(plan.host.peak_bytes)
    if plan.host.usable_bytes is not None:
        host += f" of {format_bytes(plan.host.usable_bytes)}"
        if plan.host.limit != "physical":
            host += f" that {plan.host.limit} allows"
    terms = plan.host.terms.as_dict().items()
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in terms if size)
    console.print(f"host RAM   {host}: {parts}")
    if plan.download_bytes:
        cached = plan.download_bytes - plan.disk.needed_bytes
        here = f", {format_bytes(cached)} of it in the cache" if cached else ""
        if plan.disk.free_bytes is not None:
            here += f"; the disk has {format_bytes(plan.disk.free_bytes)} free"
        console.print(f"download   {format_bytes(plan.download_bytes)}{here}")
    if speed.decode is not None:
        prefill = "" if speed.prefill is None else f", prompts at {speed.prefill:,.0f}"
        console.print(
            f"speed      about {speed.decode:,.3g} tokens/s{prefill}, "
            f"loaded in {_loading_time(plan)} (predicted)"
        )
    for reason in plan.reasons:
        console.print(f"· {escape(reason)}")


def _loading_time(plan: Plan) -> str:
    """Such as "5 s", "4 min"."""
    return f"{plan.load_s:.0f} s" if plan.load_s < 120 else f"{plan.load_s / 60:.0f} min"


def _alternatives_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="other formats", title_justify="left")
    table.add_column("format")
    table.add_column(f"at {plan.context:,} tokens")
    table.add_column("largest context", justify="right")
    for other in plan.alternatives:
        if not other.fits:
            verdict = f"{format_bytes(other.shortfall_bytes)} missing"
        else:
            verdict = "fits" if other.runnable else "fits, no engine here runs it"
        largest = f"{other.max_context:,}" if other.max_context else "–"
        table.add_row(other.format, verdict, largest)
    return table


def _requirements_table(plan: Plan) -> Table:
    """A row a format, a column a number of devices."""
    counts = sorted({requirement.count for requirement in plan.what_it_would_take})
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"the smallest listed hardware, at {plan.context:,} tokens",
        title_justify="left",
    )
    table.add_column("format")
    for count in counts:
        table.add_column(f"{count} ×")
    names = {(r.format, r.count): r.accelerator for r in plan.what_it_would_take}
    for name in dict.fromkeys(requirement.format for requirement in plan.what_it_would_take):
        table.add_row(name, *(names.get((name, count), "–") for count in counts))
    return table


def print_plan_line(plan: Plan) -> None:
    """The plan in one line of talk, before loading."""
    peaks = ", ".join(
        f"{format_bytes(device.peak_bytes)} of {format_bytes(device.usable_bytes)} "
        f"on {device.index} {device.name}"
        for device in plan.devices_in_use
    )
    say(f"{plan.model}: {describe_choice(plan)}\nplanned {peaks}")
    if plan.adapter is not None and plan.adapter.warning is not None:
        say(f"warning: {plan.adapter.warning}")


@contextmanager
def loading_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for each stage: download, load. Quiet where nobody watches."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def print_speed(stream: Stream) -> None:
    """Tokens and their pace, as a line of talk."""
    line = f"{stream.prompt_tokens:,} prompt tokens, {len(stream.tokens):,} new"
    if stream.first_token_s is not None:
        line += f", first after {stream.first_token_s:.2f} s"
    if stream.tokens_per_second is not None:
        line += f", then {stream.tokens_per_second:.1f} tokens/s"
    say(f"[{line}; ended by {stream.finish_reason}]")


def print_rung(rung: Rung) -> None:
    """A rung of a rehearsal, as a line of talk."""
    requests = "" if rung.requests == 1 else f"{rung.requests} requests of "
    line = f"{requests}{rung.prompt_tokens:,} prompt tokens: first after {rung.first_token_s:.2f} s"
    if rung.tokens_per_second is not None:
        line += f", then {rung.tokens_per_second:.1f} tokens/s"
    say(line)


def print_memory(
    plan: Plan, measured: Mapping[int, DeviceTerms], *, to_stdout: bool = False
) -> None:
    """Predicted against measured bytes of each term: a table, on stderr where it is talk."""
    console = _stdout() if to_stdout else Console(stderr=True, highlight=False)
    for device in plan.devices_in_use:
        terms = measured[device.index]
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title=f"memory of {device.index} {device.name}",
            title_justify="left",
        )
        for column in ("term", "predicted", "measured", "measured / predicted"):
            table.add_column(column, justify="left" if column == "term" else "right")
        for name in _TERMS:
            predicted, found = getattr(device.terms, name), getattr(terms, name)
            if predicted or found:
                table.add_row(name, *_compared(predicted, found, is_margin=name == "margin"))
        promised = device.peak_bytes - device.terms.margin
        table.add_section()
        table.add_row("peak without margin", *_compared(promised, terms.peak_bytes))
        console.print(table)


def _compared(predicted: int, found: int, *, is_margin: bool = False) -> tuple[str, str, str]:
    if is_margin:
        return format_bytes(predicted), "–", "–"
    ratio = f"{found / predicted:.1%}" if predicted else "–"
    if found > predicted:
        ratio = f"[red]{ratio}[/red]"
    return format_bytes(predicted), format_bytes(found), ratio


def answer_as_json(model: Model, stream: Stream) -> str:
    """An answer with its figures, as `run --json` prints it."""
    measured = model.measured_terms()
    return json.dumps(
        {
            "model": model.plan.model,
            "format": model.plan.format,
            "text": stream.text,
            "finish_reason": stream.finish_reason,
            "prompt_tokens": stream.prompt_tokens,
            "new_tokens": len(stream.tokens),
            "first_token_s": stream.first_token_s,
            "tokens_per_second": stream.tokens_per_second,
            "memory": [
                {
                    "index": device.index,
                    "name": device.name,
                    "predicted": device.terms.as_dict(),
                    "predicted_peak_bytes": device.peak_bytes - device.terms.margin,
                    "measured": measured[device.index].as_dict(),
                    "measured_peak_bytes": measured[device.index].peak_bytes,
                }
                for device in model.plan.devices_in_use
            ],
        },
        indent=2,
    )


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """The doctor's findings as a table, remedies below their findings."""
    marks = {"ok": "[green]ok[/green]", "limited": "[yellow]limited[/yellow]"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("capability", "", "finding"):
        table.add_column(column)
    for verdict in verdicts:
        missing = "[red]missing[/red]" if verdict.required else "[yellow]no[/yellow]"
        finding = "\n".join((verdict.detail, *(f"also: {other}" for other in verdict.also)))
        if verdict.remedy is not None:
            finding += f"\n→ {verdict.remedy}"
        mark = marks.get(verdict.status, missing)
        table.add_row(verdict.capability, mark, escape(finding))
    _stdout().print(table)
