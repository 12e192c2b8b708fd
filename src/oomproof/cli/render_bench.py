"""What `bench` measured, as people see it: figures on the way to stderr, the table to stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oomproof.cli.render import say

if TYPE_CHECKING:
    from oomproof.engine.bench import BenchReport, Timing


def print_timing(engine: str, timing: Timing) -> None:
    """A figure of `bench`, as soon as it is there."""
    point = timing.point
    what = (
        f"{point.requests} × {point.context:,} tokens"
        if point.requests > 1
        else (f"{point.context:,} tokens")
    )
    say(f"{engine}: {point.kind} at {what}: {timing.tokens_per_second:,.0f} tokens/s")


def print_bench(report: BenchReport) -> None:
    """Every figure beside its limit, and beside the peer's."""
    console = Console(highlight=False, soft_wrap=False)
    ours, *peers = report.engines
    limits = report.limits
    console.print(f"[bold]{escape(report.model)}[/bold] on {escape(', '.join(report.devices))}")
    console.print(
        f"measured here: memory {limits.read_bytes_per_s / 1e9:,.0f} GB/s, "
        f"products {limits.matmul_flops_per_s / 1e12:,.1f} TFLOP/s"
        + (
            ""
            if limits.host_link_bytes_per_s is None
            else f", host link {limits.host_link_bytes_per_s / 1e9:,.0f} GB/s"
        )
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "requests", "context", f"{ours.engine} {ours.format}", "limit", "share"):
        table.add_column(column, justify="left" if not column else "right")
    for peer in peers:
        table.add_column(f"{peer.engine} {peer.format}", justify="right")
        table.add_column("ratio", justify="right")
    for number, timing in enumerate(ours.timings):
        share = "–" if timing.share is None else f"{timing.share:.0%}"
        row = [
            timing.point.kind,
            str(timing.point.requests),
            f"{timing.point.context:,}",
            f"{timing.tokens_per_second:,.0f}",
            "–" if timing.limit is None else f"{timing.limit:,.0f}",
            share,
        ]
        for peer in peers:
            theirs = peer.timings[number].tokens_per_second
            row += [f"{theirs:,.0f}", f"{timing.tokens_per_second / theirs:.2f}"]
        table.add_row(*row)
    row = ["load", "", "", f"{ours.load_s:.2f} s", "", ""]
    for peer in peers:
        row += [f"{peer.load_s:.2f} s", f"{peer.load_s / ours.load_s:.2f}"]
    table.add_row(*row)
    console.print(table)
    console.print("decode and prefill in tokens/s; the limit is what must be read or computed")
