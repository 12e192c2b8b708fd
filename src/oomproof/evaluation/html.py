"""The report as one HTML file: a table and charts, nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from xml.sax.saxutils import escape

from oomproof.evaluation.charts import (
    FONT,
    Chart,
    Pen,
    linear,
    logarithmic,
    pens,
    steps,
)
from oomproof.evaluation.report import EvalReport, LayerResult, LevelsResult
from oomproof.evaluation.statistics import METHOD, Estimate
from oomproof.units import format_bytes

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 {FONT}; color: #1b1f24; background: #fff; max-width: 940px;
  margin: 2rem auto 4rem; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .2rem; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .2rem; }}
p {{ margin: .3rem 0 .8rem; }} .soft {{ color: #57606a; }} svg {{ width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: right; padding: .32rem .6rem; border-bottom: 1px solid #d8dee4;
  white-space: nowrap; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 600; }} th:first-child, td:first-child {{ text-align: left; }}
td small {{ color: #57606a; }} .swatch {{ display: inline-block; width: .8em; height: .8em;
  margin-right: .5em; border-radius: 50%; border: 2px solid; vertical-align: -.08em; }}
"""


def report_html(report: EvalReport) -> str:
    """The report as an HTML document."""
    drawn = pens([one.format for one in report.formats])
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.model)}: what formats cost</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(report.model)}: what formats cost</h1>",
        f"<p class='soft'>{escape(describe(report))}</p>",
        *_table(report, drawn),
        *(f"<p class='soft'>{escape(line)}</p>" for line in describe_mixtures(report)),
        *(part for section in _sections(report, drawn) for part in section),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def describe(report: EvalReport) -> str:
    """What was measured, in a line."""
    windows = "1 window" if report.windows == 1 else f"{report.windows:,} windows"
    return (
        f"{report.tokens:,} tokens of {report.text} ({report.text_bytes:,} bytes) in {windows} of "
        f"{report.context:,}, computed in {report.compute_dtype} on {report.device}; intervals are "
        f"{METHOD}"
    )


def describe_mixtures(report: EvalReport) -> list[str]:
    """What each mixture holds, a line each."""
    return [
        f"{one.format}: {sum(one.tensors.values())} linears, "
        + ", ".join(f"{count} in {name}" for name, count in one.tensors.items())
        for one in report.formats
        if one.tensors
    ]


def describe_levels(report: EvalReport) -> list[str]:
    """Why formats of 4 bits differ on these weights, in sentences."""
    histogram = report.histogram
    if not histogram.formats:
        return []
    told = [
        f"{', '.join(names)} {one.error:.4f} ({one.inner_error:.4f} in the inner half, "
        f"{one.outer_error:.4f} in the outer)"
        for one, names in alike(histogram.formats)
    ]
    half = (
        f"Half of all weights lie within ±{histogram.middle:.2f} of the largest of their block of "
        "64: levels that lie closer together there, and wider apart outside, lose less."
    )
    return [half, f"Root mean square distance to the nearest level: {'; '.join(told)}."]


def alike(formats: tuple[LevelsResult, ...]) -> Iterator[tuple[LevelsResult, list[str]]]:
    """Formats with the same levels together, as double quantization leaves them."""
    found: dict[tuple[float, ...], tuple[LevelsResult, list[str]]] = {}
    for one in formats:
        found.setdefault(one.levels, (one, []))[1].append(one.format)
    yield from found.values()


def _table(report: EvalReport, drawn: dict[str, Pen]) -> Iterator[str]:
    yield "<div class='wide'><table><thead><tr>"
    for title in (
        "format",
        "bits / weight",
        "weights",
        "perplexity",
        "bits / byte",
        "KL, nats",
        "same top token",
    ):
        yield f"<th>{title}</th>"
    yield "</tr></thead><tbody>"
    for one in (report.reference, *report.formats):
        pen = drawn.get(one.format)
        swatch = ""
        if pen is not None:
            fill = "#fff" if pen.dash else pen.colour
            swatch = (
                f"<span class='swatch' style='border-color:{pen.colour};background:{fill}'></span>"
            )
        cells = [
            f"{swatch}{escape(one.format)}",
            f"{one.bits_per_weight:.3f}",
            escape(format_bytes(one.weight_bytes)),
            _cell(one.perplexity, "{:.3f}"),
            _cell(one.bits_per_byte, "{:.4f}"),
            _cell(one.kl, "{:.5f}") if pen else "",
            _cell(one.agreement.scaled(100), "{:.2f}", " %") if pen else "",
        ]
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</tbody></table></div>"


def _cell(value: Estimate, shape: str, unit: str = "") -> str:
    half = (value.high - value.low) / 2
    return f"{shape.format(value.value)}{unit} <small>± {shape.format(half)}</small>"


def _sections(report: EvalReport, drawn: dict[str, Pen]) -> Iterator[list[str]]:
    yield _section(
        "Quality against bytes",
        "KL divergence to the 16-bit model over the stored bits of a quantized weight, scales "
        "included. Lower and further left is better.",
        _quality(report, drawn),
    )
    yield _section(
        "Error by layer",
        "Weights: ‖W − Ŵ‖ / ‖W‖ over a layer’s linears.",
        _by_layer(report, drawn, "weight error", lambda layer: layer.weight_error),
    )
    yield _section(
        "",
        "Hidden states: ‖h − ĥ‖ / ‖h‖ as they leave a layer, errors of earlier layers included.",
        _by_layer(report, drawn, "error of hidden states", lambda layer: layer.hidden_error),
    )
    yield _section(
        "KL divergence over the window",
        "Mean of the tokens at these positions of their windows, with intervals.",
        _by_position(report, drawn),
    )
    if report.histogram.formats:
        yield _section(
            "Weights against levels",
            " ".join(describe_levels(report)),
            _levels(report, drawn),
        )
        yield _section(
            "",
            "Where the squared distance from the nearest level comes from: what weights up to a "
            "magnitude add to its mean.",
            _squared(report, drawn),
        )


def _section(title: str, text: str, chart: str) -> list[str]:
    heading = [f"<h2>{escape(title)}</h2>"] if title else []
    return [*heading, f"<p class='soft'>{escape(text)}</p>", chart]


def _quality(report: EvalReport, drawn: dict[str, Pen]) -> str:
    formats = report.formats
    edges = [bound for one in formats for bound in (one.kl.low, one.kl.high, one.kl.value)]
    chart = Chart(
        linear([3.5, *(one.bits_per_weight for one in formats)], "stored bits a weight"),
        logarithmic(edges, "KL divergence, nats a token"),
    )
    for one in formats:
        pen, bits = drawn[one.format], one.bits_per_weight
        chart.interval(bits, one.kl.low, one.kl.high, pen)
        title = f"{one.format}: {one.kl.value:.5f} nats at {bits:.3f} bits"
        chart.point(bits, one.kl.value, pen, title)
        chart.label(bits, one.kl.value, one.format, pen)
    return chart.svg("KL divergence over stored bits a weight")


def _by_layer(
    report: EvalReport, drawn: dict[str, Pen], title: str, value: Callable[[LayerResult], float]
) -> str:
    lines = {one.format: [value(layer) for layer in one.layers] for one in report.formats}
    count = len(report.formats[0].layers)
    every = [found for line in lines.values() for found in line]
    chart = Chart(steps([str(n) for n in range(count)], "layer"), logarithmic(every, title))
    for name, line in lines.items():
        chart.line(list(enumerate(line)), drawn[name])
        chart.label(count - 1, line[-1], name, drawn[name])
    return chart.svg(f"{title} by layer")


def _by_position(report: EvalReport, drawn: dict[str, Pen]) -> str:
    first = report.formats[0]
    labels = [
        f"{part.first}–{part.end - 1}" if part.end - part.first > 1 else str(part.first)
        for part in first.positions
    ]
    edges = [
        bound
        for one in report.formats
        for part in one.positions
        for bound in (part.kl.value, part.kl.low, part.kl.high)
    ]
    chart = Chart(
        steps(labels, "position in the window"), logarithmic(edges, "KL divergence, nats a token")
    )
    for one in report.formats:
        pen = drawn[one.format]
        for number, part in enumerate(one.positions):
            chart.interval(number, part.kl.low, part.kl.high, pen)
        chart.line([(n, part.kl.value) for n, part in enumerate(one.positions)], pen)
        last = one.positions[-1]
        chart.label(len(labels) - 1, last.kl.value, one.format, pen)
    return chart.svg("KL divergence by position in the window")


def _levels(report: EvalReport, drawn: dict[str, Pen]) -> str:
    counts = report.histogram.counts
    whole, width = sum(counts) or 1, 2 / len(counts)
    density = [count / whole / width for count in counts]
    # The largest of each block is always ±1; it would flatten all others.
    most = max(density[1:-1])
    rows = list(alike(report.histogram.formats))
    below = 0.17 * most
    axis = linear([0.0, most], "density of weights", low=0.0)
    axis = replace(axis, low=-below * len(rows))
    chart = Chart(
        linear([-1.0, 1.0], "weight over the largest magnitude of its block"),
        axis,
        height=330 + 34 * len(rows),
    )
    for number, value in enumerate(density):
        first = -1 + number * width
        inner = abs(first + width / 2) <= report.histogram.middle
        chart.span(
            first, first + width, 0.0, min(value, axis.high), "#9fb3c8" if inner else "#cfd8e3"
        )
    for row, (one, names) in enumerate(rows):
        y = -below * (row + 0.5)
        chart.ticks(one.levels, y, drawn[one.format])
        chart.label(1.0, y, ", ".join(names), drawn[one.format])
    return chart.svg("Histogram of block-normalised weights, and the levels of formats")


def _squared(report: EvalReport, drawn: dict[str, Pen]) -> str:
    rows = list(alike(report.histogram.formats))
    lines = [_from_zero(one.squared_errors) for one, _ in rows]
    chart = Chart(
        linear([0.0, 1.0], "magnitude of a weight over the largest of its block"),
        linear([0.0, *(line[-1][1] for line in lines)], "mean squared distance", low=0.0),
    )
    for (one, names), line in zip(rows, lines, strict=True):
        chart.line(line, drawn[one.format])
        chart.label(*line[-1], ", ".join(names), drawn[one.format])
    return chart.svg("Mean squared distance from the nearest level, of weights up to a magnitude")


def _from_zero(squared_errors: Sequence[float]) -> list[tuple[float, float]]:
    """(Magnitude, what all weights up to it add to the mean)."""
    half = len(squared_errors) // 2
    found, total = [(0.0, 0.0)], 0.0
    for number in range(half):
        total += squared_errors[half - 1 - number] + squared_errors[half + number]
        found.append(((number + 1) / half, total))
    return found
