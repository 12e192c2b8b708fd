"""What `eval` measured, as people see it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from oomproof.evaluation.html import alike, describe, describe_mixtures
from oomproof.units import format_bytes

if TYPE_CHECKING:
    from oomproof.evaluation.report import EvalReport
    from oomproof.evaluation.statistics import Estimate

_WIDE = 108
"""Columns of a terminal that has room for every interval."""
_SHORT = 8
"""Characters of a name beside which 80 columns have room for every figure."""


def print_eval(report: EvalReport) -> None:
    """A row a format, the reference first; then where they lose it, and why."""
    console = Console(highlight=False, soft_wrap=False)
    console.print(f"[bold]{escape(report.model)}[/bold] on {escape(report.device)}")
    console.print(f"[dim]{escape(describe(report))}[/dim]")
    console.print(_quality(report, wide=console.width >= _WIDE))
    for line in describe_mixtures(report):
        console.print(f"[dim]{escape(line)}[/dim]")
    console.print(_layers(report))
    if report.histogram.formats:
        console.print(_levels(report))


def _quality(report: EvalReport, *, wide: bool) -> Table:
    shown = (report.reference, *report.formats)
    # Names of mixtures and folders take the place of what `added` tells too.
    roomy = wide or max(len(one.format) for one in shown) <= _SHORT
    per_byte = ("bits/byte",) if roomy else ()
    table = _table("", "bits", "weights", "perplexity", *per_byte, "added", "KL, nats", "same top")
    for one in shown:
        row = [
            escape(one.format),
            f"{one.bits_per_weight:.2f}",
            format_bytes(one.weight_bytes),
            _figure(one.perplexity, 2, with_interval=wide),
        ]
        if roomy:
            row.append(_figure(one.bits_per_byte, 4, with_interval=wide))
        if one is not report.reference:
            row += [
                _figure(one.added_bits_per_byte, 4, with_interval=wide),
                _figure(one.kl, 5),
                _figure(one.agreement.scaled(100), 1, with_interval=wide) + " %",
            ]
        table.add_row(*row)
    return table


def _layers(report: EvalReport) -> Table:
    table = _table("error of", "weights, least", "most", "in layer", "hidden states at the end")
    for one in report.formats:
        worst = max(one.layers, key=lambda layer: layer.weight_error)
        table.add_row(
            escape(one.format),
            f"{min(layer.weight_error for layer in one.layers):.2%}",
            f"{worst.weight_error:.2%}",
            str(worst.layer),
            f"{one.layers[-1].hidden_error:.1%}",
        )
    return table


def _levels(report: EvalReport) -> Table:
    table = _table("distance to the nearest level", "levels", "all", "inner half", "outer half")
    table.caption = (
        f"root mean square, over the largest weight of a block of 64; half of all weights lie "
        f"within ±{report.histogram.middle:.2f} of it"
    )
    table.caption_justify = "left"
    for one, names in alike(report.histogram.formats):
        table.add_row(
            ", ".join(names),
            str(len(one.levels)),
            f"{one.error:.4f}",
            f"{one.inner_error:.4f}",
            f"{one.outer_error:.4f}",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for number, column in enumerate(columns):
        if number:
            table.add_column(column, justify="right", no_wrap=True)
        else:
            # What is longer than there is room for is broken, and no figure is.
            table.add_column(column, overflow="fold")
    return table


def _figure(value: Estimate, digits: int, *, with_interval: bool = True) -> str:
    shown = f"{value.value:.{digits}f}"
    if not with_interval:
        return shown
    return f"{shown} [dim]±{(value.high - value.low) / 2:.{digits}f}[/dim]"
