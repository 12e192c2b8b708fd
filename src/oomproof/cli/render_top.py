"""What `oomproof top` prints: tables that are drawn anew in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from oomproof.memory.terms import DeviceTerms
from oomproof.monitoring.events import MonitorEvent
from oomproof.monitoring.spikes import terms_over
from oomproof.monitoring.status import DeviceStatus
from oomproof.monitoring.view import EngineView, View
from oomproof.units import format_bytes

NOTHING_RUNS = "no model is running through oomproof here"
_TERMS = tuple(field.name for field in fields(DeviceTerms))
_NARROW = 60
"""Columns below which tables would cut their numbers."""
_OVER = "  over"
_SHOWN_PROCESSES = 8
"""Of each device; all of them are in --json."""


def lines(view: View) -> Iterator[str]:
    """One look as plain lines."""
    yield f"{_time(view.at)}  host RAM: {_host(view)}"
    for kind, name, total, used, free in _devices(view):
        yield f"{kind} {name}: {used} of {total} used, {free} free"
        if kind.startswith("GPU"):
            yield from (f"  {line}" for line in _process_lines(view, int(kind[4:])))
    if not view.engines:
        yield NOTHING_RUNS
    for engine in view.engines:
        yield _headline(engine)
        for device in engine.status.devices:
            yield f"  {_device_headline(engine, device)}"
            for name, planned, measured, share, mark in _rows(device):
                yield f"    {name:<12} {measured:>10} of {planned:>10} planned {share:>7}{mark}"
            if (line := _allocator_line(device)) is not None:
                yield f"    {line}"
        yield from (f"  {_event_line(event)}" for event in engine.status.events)
    yield from (f"not readable: {problem}" for problem in view.unreadable)


def show_live(views: Iterator[View]) -> None:
    """Draws each look over the one before, to the terminal's size; the last one stays."""
    console = Console(highlight=False)
    last: View | None = None
    try:
        with Live(console=console, screen=True, auto_refresh=False, transient=True) as screen:
            for view in views:
                last = view
                screen.update(_drawn(view, console.width), refresh=True)
    finally:
        if last is not None:
            console.print(_drawn(last, console.width))


def _drawn(view: View, width: int) -> Group:
    if width < _NARROW:
        return Group(*map(Text, lines(view)))
    parts: list[RenderableType] = [
        Text(f"oomproof top  {_time(view.at)}  host RAM: {_host(view)}"),
        _devices_table(view),
    ]
    for gpu in view.gpus:
        processes = _process_lines(view, gpu.index)
        parts += [Text(f"GPU {gpu.index}: {line}", style="dim") for line in processes]
    if not view.engines:
        parts.append(Text(f"{NOTHING_RUNS}; `oomproof run`, `chat` and `load` are shown"))
    for engine in view.engines:
        parts.append(Text(_headline(engine), style="bold"))
        for device in engine.status.devices:
            parts += [Text(_device_headline(engine, device)), _terms_table(device)]
            if (line := _allocator_line(device)) is not None:
                parts.append(Text(line))
        parts += [Text(_event_line(event), style="red") for event in engine.status.events]
    parts += [Text(f"not readable: {problem}", style="yellow") for problem in view.unreadable]
    return Group(*parts)


def _devices_table(view: View) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("device", "name", "total", "used", "free"):
        table.add_column(column, justify="left" if column in {"device", "name"} else "right")
    for kind, name, total, used, free in _devices(view):
        table.add_row(Text(kind), Text(name), total, used, free)
    return table


def _terms_table(device: DeviceStatus) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("term", "planned", "high-water", "share"):
        table.add_column(column, justify="left" if column == "term" else "right", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, planned, measured, share, mark in _rows(device):
        style = "red" if mark == _OVER else ""
        table.add_row(name, planned, measured, share, mark.strip(), style=style)
    return table


def _devices(view: View) -> Iterator[tuple[str, str, str, str, str]]:
    """(Kind and number, name, total, used, free) of each."""
    for gpu in view.gpus:
        sizes = (gpu.total_bytes, gpu.used_bytes, gpu.free_bytes)
        total, used, free = map(format_bytes, sizes)
        yield f"GPU {gpu.index}", gpu.name, total, used, free
    if not view.gpus:
        host = view.host
        sizes = (host.total_bytes, host.used_bytes, host.available_bytes)
        total, used, free = map(format_bytes, sizes)
        yield "cpu", "(no GPU here)", total, used, free


def _process_lines(view: View, index: int) -> Iterator[str]:
    processes = view.gpus[index].processes
    for process in processes[:_SHOWN_PROCESSES]:
        size = "size unknown" if process.used_bytes is None else format_bytes(process.used_bytes)
        ours = " (oomproof)" if process.pid in view.pids else ""
        yield f"pid {process.pid} {process.name}: {size}{ours}"
    if len(processes) > _SHOWN_PROCESSES:
        yield f"and {len(processes) - _SHOWN_PROCESSES} more processes"


def _headline(engine: EngineView) -> str:
    status = engine.status
    on_gpu = any(device.kind != "cpu" for device in status.devices)
    planned = f" of {format_bytes(status.planned_host_bytes)} planned" if on_gpu else ""
    requests = "1 request" if status.requests == 1 else f"{status.requests:,} requests"
    taken = (f"{name} ×{count}" for name, count in status.rungs.items())
    rungs = f"; went on by {', '.join(taken)}" if status.rungs else ""
    return (
        f"pid {status.pid}: {status.model} {status.format}, {status.engine} engine, "
        f"{status.context:,} tokens × {status.concurrency}; {requests} done in {status.steps:,} "
        f"steps{rungs}; RSS {format_bytes(engine.rss_bytes)}{planned}; "
        f"told {engine.age_s:.0f} s ago"
    )


def _device_headline(engine: EngineView, device: DeviceStatus) -> str:
    kind = "device cpu" if device.kind == "cpu" else f"device {device.index} {device.name}"
    held = format_bytes(device.measured.peak_bytes)
    allowed = format_bytes(device.allowed_bytes)
    if device.kind == "cpu":
        return (
            f"{kind}: RSS {format_bytes(engine.rss_bytes)}, of model and process {allowed} planned"
        )
    return f"{kind}: high-water mark {held} of {allowed} planned"


def _rows(device: DeviceStatus) -> Iterator[tuple[str, str, str, str, str]]:
    """(Term, planned, measured, share, mark) of each term that is there, and of their sum."""
    over = terms_over(device.kind, device.planned, device.measured)
    for name in _TERMS:
        planned, found = getattr(device.planned, name), getattr(device.measured, name)
        if name == "margin":
            continue
        if planned or found:
            mark = _OVER if name in over else ""
            if name == "workspace" and device.kind == "cpu":
                mark = "  the process's own among it"
            yield name, format_bytes(planned), format_bytes(found), _share(found, planned), mark
    peak, allowed = device.measured.peak_bytes, device.allowed_bytes
    mark = "" if device.is_within_plan else _OVER
    yield "peak", format_bytes(allowed), format_bytes(peak), _share(peak, allowed), mark


def _share(found: int, planned: int) -> str:
    return f"{found / planned:.1%}" if planned else "–"


def _allocator_line(device: DeviceStatus) -> str | None:
    facts = device.allocator
    if facts is None:
        return None
    return (
        f"torch: {format_bytes(facts.allocated_bytes)} in tensors, "
        f"{format_bytes(facts.reserved_bytes)} reserved "
        f"(at most {format_bytes(facts.peak_reserved_bytes)}), fragmentation "
        f"{format_bytes(facts.fragmentation_bytes)}, split blocks "
        f"{format_bytes(facts.inactive_split_bytes)}, {facts.num_alloc_retries} retries, "
        f"{facts.num_ooms} failures"
    )


def _event_line(event: MonitorEvent) -> str:
    return f"{event.kind} at {_time(event.at)}: {event.message}"


def _host(view: View) -> str:
    host = view.host
    limit = "" if host.limit == "physical" else f" ({host.limit})"
    return f"{format_bytes(host.used_bytes)} of {format_bytes(host.total_bytes)} used{limit}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
