"""Hand-offs as people see them: the commands on stdout, everything else on stderr."""

from __future__ import annotations

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oomproof.planning.handoffs.handoff import HandOff
from oomproof.units import GIB, format_bytes


def print_hand_off(found: HandOff) -> None:
    """The verdict, each device's share and the reasons on stderr; the commands on stdout."""
    console = Console(stderr=True, highlight=False)
    verdict = (
        f"[bold green]fits[/bold green] in {escape(found.format or '')}"
        if found.fits
        else f"[bold red]does not fit[/bold red]: {format_bytes(found.shortfall_bytes)} missing"
    )
    console.print(f"[bold]{escape(found.model)}[/bold] for {found.engine}: {verdict}")
    requests = "" if found.concurrency == 1 else f" × {found.concurrency} requests"
    console.print(f"{found.context:,} tokens{requests}")
    if found.devices:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("GiB")
        for column in ("weights", "KV", "overhead", "peak", "usable"):
            table.add_column(column, justify="right")
        for device in found.devices:
            sizes = (
                device.weights_bytes,
                device.kv_cache_bytes,
                device.overhead_bytes,
                device.peak_bytes,
                device.usable_bytes,
            )
            name = f"{device.index} {escape(device.name)}"
            table.add_row(name, *(f"{size / GIB:,.2f}" for size in sizes))
        console.print(table)
    if found.host_bytes:
        console.print(f"host RAM   {format_bytes(found.host_bytes)}")
    console.print(f"download   {format_bytes(found.download_bytes)}")
    for reason in found.reasons:
        console.print(f"· {escape(reason)}")
    for line in found.commands:
        typer.echo(line)
