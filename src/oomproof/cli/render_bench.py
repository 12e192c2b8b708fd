"""What `bench` measured, as people see it: figures on the way to stderr, the table to stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oomproof.cli.render import fitted, say

if TYPE_CHECKING:
    from oomproof.engine.bench import BenchReport, Timing
    from oomproof.engine.tune import TuningReport
    from oomproof.quantization.tune_products import ProductTiming, TimedLaunch


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
    console.print(fitted(table, console))
    console.print("decode and prefill in tokens/s; the limit is what must be read or computed")


def print_tuned(device: str, timing: ProductTiming) -> None:
    """What `bench --tune` found for a product, as soon as it is there."""
    default, best = timing.default, timing.best
    found = f"{default.us:,.2f} µs by rule, the fastest of {timing.candidates}"
    if timing.tuned is not None:
        found = (
            f"{best.us:,.2f} µs with {best.warps} warps and {_counted(best.splits, 'split')}, "
            f"{default.us:,.2f} by rule"
        )
    say(f"{device}: {timing.name} of {_counted(timing.tokens, 'request')}: {found}")


def print_tuning(report: TuningReport) -> None:
    """Every product with its launches before and after, and where they are kept."""
    console = Console(highlight=False, soft_wrap=False)
    for device in report.devices:
        console.print(
            f"[bold]{escape(report.model)}[/bold] {report.format} on {escape(device.device)}"
        )
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("product", "requests", "tried", "by rule", "µs", "kept", "µs", "less"):
            table.add_column(column, justify="left" if column == "product" else "right")
        for timing in device.timings:
            default, best = timing.default, timing.best
            row = [
                timing.name,
                str(timing.tokens),
                str(timing.candidates),
                _launch(default),
                f"{default.us:,.2f}",
            ]
            if timing.tuned is not None:
                row += [_launch(best), f"{best.us:,.2f}", f"{timing.gain:.1%}"]
            table.add_row(*row)
        console.print(table)
        console.print(f"launches are warps × splits; kept in {escape(device.file)}", soft_wrap=True)


def _launch(launch: TimedLaunch) -> str:
    return f"{launch.warps} × {launch.splits}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
