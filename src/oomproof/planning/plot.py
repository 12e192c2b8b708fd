"""A plan as a picture: for each device a stacked bar of its terms against its usable memory.

SVG as text, readable on a light and on a dark page; widths are proportional to bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log10
from xml.sax.saxutils import escape, quoteattr

from oomproof.memory.terms import DeviceTerms
from oomproof.planning.plan import Plan
from oomproof.units import GIB, MIB, format_bytes, format_parameters

_WIDTH = 960
_LEFT, _RIGHT = 190, 150
_TOP, _BOTTOM = 96, 86
_MOST_ROW, _LEAST_ROW = 40, 20
_FONT = "font-family='system-ui, -apple-system, Segoe UI, Roboto, sans-serif'"
_INK, _SOFT, _PAPER, _GRID = "#1b1f24", "#57606a", "#ffffff", "#d8dee4"
_OVER = "#b3261e"
_COLOURS = {
    # Okabe and Ito's palette, told apart by colour-blind readers.
    "cuda_context": ("#999999", "context"),
    "weights": ("#0072b2", "weights"),
    "kv_cache": ("#e69f00", "KV cache"),
    "workspace": ("#009e73", "workspace"),
    "staging": ("#cc79a7", "more while loading"),
    "graphs": ("#56b4e9", "graphs"),
    "comm": ("#d55e00", "between devices"),
    "offloaded": ("#f0e442", "layers in host RAM"),
    "runtime": ("#999999", "context"),
    "pinned": ("#56b4e9", "pinned buffers"),
    "margin": ("#c9d1d9", "margin"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bar:
    label: str
    parts: tuple[tuple[str, int], ...]
    """(term, bytes), in the order of the stack."""
    usable_bytes: int | None
    note: str

    @property
    def peak_bytes(self) -> int:
        return sum(size for _, size in self.parts)


def plot_svg(plan: Plan) -> str:
    """The plan as an SVG document."""
    bars = [*_device_bars(plan), _host_bar(plan)]
    row = max(_LEAST_ROW, min(_MOST_ROW, 640 // len(bars)))
    height = _TOP + row * len(bars) + _BOTTOM
    devices = bars[:-1]
    most = max(max(bar.peak_bytes, bar.usable_bytes or 0) for bar in devices) or 1
    host = bars[-1]
    most = max(most, host.peak_bytes)
    step = _tick(most)
    end = step * ceil(most / step)
    lines = [
        (
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' "
            f"viewBox='0 0 {_WIDTH} {height}' role='img' {_FONT} font-size='13'>"
        ),
        f"<title>{escape(_summary(plan))}</title>",
        (
            "<defs><pattern id='over' width='6' height='6' patternUnits='userSpaceOnUse' "
            "patternTransform='rotate(45)'>"
            f"<rect width='6' height='6' fill='{_PAPER}'/>"
            f"<rect width='3' height='6' fill='{_OVER}'/></pattern></defs>"
        ),
        f"<rect width='{_WIDTH}' height='{height}' rx='8' fill='{_PAPER}' stroke='{_GRID}'/>",
        *_heading(plan),
        *_axis(step, end, row * len(bars)),
    ]
    for position, bar in enumerate(bars):
        lines += _bar(bar, _TOP + position * row, row, end)
    lines += _legend(bars, height)
    return "\n".join([*lines, "</svg>", ""])


def _device_bars(plan: Plan) -> Iterator[_Bar]:
    for device in plan.devices:
        name = "cpu" if device.kind == "cpu" else f"GPU {device.index}"
        layers = "unused" if not device.in_use else _layers(device.layers)
        yield _Bar(
            label=f"{name} · {layers.removeprefix('layers ')}",
            parts=tuple(_stack(device.terms)),
            usable_bytes=device.usable_bytes,
            note=f"{device.name}: {layers}",
        )


def _stack(terms: DeviceTerms) -> Iterator[tuple[str, int]]:
    """Terms that add up to the peak: what loading needs beyond running is a part of its own."""
    running = terms.kv_cache + terms.workspace + terms.graphs + terms.comm
    for name in ("cuda_context", "weights", "kv_cache", "workspace", "graphs", "comm"):
        yield name, getattr(terms, name)
    yield "staging", max(0, terms.staging - running)
    yield "margin", terms.margin


def _host_bar(plan: Plan) -> _Bar:
    terms = plan.host.terms
    names = ("runtime", "staging", "pinned", "offloaded", "margin")
    return _Bar(
        label="host RAM",
        parts=tuple((name, getattr(terms, name)) for name in names),
        usable_bytes=plan.host.usable_bytes,
        note="host RAM of the process",
    )


def _layers(layers: tuple[int, int] | None) -> str:
    if layers is None:
        return "no layers"
    first, last = layers
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _summary(plan: Plan) -> str:
    verdict = "fits" if plan.fits else f"{format_bytes(plan.shortfall_bytes)} missing"
    return f"{plan.model}, {plan.format}, {plan.context:,} tokens: {verdict}"


def _heading(plan: Plan) -> Iterator[str]:
    counts: dict[str, int] = {}
    for device in plan.devices:
        counts[device.name] = counts.get(device.name, 0) + 1
    machine = ", ".join(f"{count} × {name}" for name, count in counts.items())
    requests = "" if plan.concurrency == 1 else f" × {plan.concurrency} requests"
    verdict = "fits" if plan.fits else f"{format_bytes(plan.shortfall_bytes)} missing"
    colour = "#116329" if plan.fits else _OVER
    size = format_parameters(plan.num_parameters)
    yield (
        f"<text x='24' y='34' font-size='18' font-weight='600' fill='{_INK}'>"
        f"{escape(_cut(plan.model, 60))} <tspan fill='{colour}'>{escape(verdict)}</tspan></text>"
    )
    facts = f"{size} parameters · {plan.format} · {plan.context:,} tokens{requests} · {machine}"
    yield f"<text x='24' y='56' fill='{_SOFT}'>{escape(_cut(facts, 130))}</text>"


def _axis(step: int, end: int, height: int) -> Iterator[str]:
    unit, name = (GIB, "GiB") if end >= GIB else (MIB, "MiB")
    for tick in range(0, end + 1, step):
        x = _x(tick, end)
        yield (
            f"<line x1='{x}' y1='{_TOP - 6}' x2='{x}' y2='{_TOP + height}' stroke='{_GRID}'/>"
            f"<text x='{x}' y='{_TOP - 12}' text-anchor='middle' font-size='11' fill='{_SOFT}'>"
            f"{tick / unit:g}</text>"
        )
    yield (
        f"<text x='{_LEFT - 16}' y='{_TOP - 12}' text-anchor='end' font-size='11' "
        f"fill='{_SOFT}'>{name}</text>"
    )


def _bar(bar: _Bar, top: int, row: int, end: int) -> Iterator[str]:
    thick = row - max(4, row // 4)
    y = top + (row - thick) // 2
    text_y = y + thick // 2 + 4
    yield (
        f"<text x='{_LEFT - 16}' y='{text_y}' text-anchor='end' font-size='12' fill='{_INK}'>"
        f"{escape(bar.label)}</text>"
    )
    yield f"<g><title>{escape(bar.note)}, peak {escape(format_bytes(bar.peak_bytes))}</title>"
    start = 0
    for name, size in bar.parts:
        if size <= 0:
            continue
        colour, label = _COLOURS[name]
        title = escape(f"{bar.label} {label}: {format_bytes(size)}")
        yield (
            f"<rect class={quoteattr(name)} x='{_x(start, end)}' y='{y}' "
            f"width='{_width(size, end)}' height='{thick}' fill='{colour}'>"
            f"<title>{title}</title></rect>"
        )
        start += size
    usable = bar.usable_bytes
    if usable is not None and usable < bar.peak_bytes:
        yield (
            f"<rect class='over' x='{_x(usable, end)}' y='{y}' "
            f"width='{_width(bar.peak_bytes - usable, end)}' height='{thick}' fill='url(#over)'/>"
        )
    if usable is not None and usable <= end:
        yield (
            f"<rect class='usable' x='{_LEFT}' y='{y}' width='{_width(usable, end)}' "
            f"height='{thick}' fill='none' stroke='{_INK}' stroke-width='1.5'/>"
        )
    of = "" if usable is None else f" of {format_bytes(usable)}"
    over = usable is not None and usable < bar.peak_bytes
    yield (
        f"<text x='{_WIDTH - _RIGHT + 14}' y='{text_y}' font-size='12' "
        f"fill='{_OVER if over else _SOFT}'>{format_bytes(bar.peak_bytes)}{of}</text></g>"
    )


def _legend(bars: Sequence[_Bar], height: int) -> Iterator[str]:
    used = {name for bar in bars for name, size in bar.parts if size > 0}
    entries = list(dict.fromkeys(_COLOURS[name] for name in _COLOURS if name in used))
    x, y = 24, height - 44
    for colour, label in entries:
        width = 26 + round(7.2 * len(label)) + 14
        if x + width > _WIDTH - 24:
            x, y = 24, y + 22
        yield f"<rect x='{x}' y='{y - 11}' width='14' height='14' fill='{colour}'/>"
        yield f"<text x='{x + 20}' y='{y}' font-size='12' fill='{_INK}'>{escape(label)}</text>"
        x += width
    label = "usable memory"
    if any(bar.usable_bytes is not None for bar in bars):
        if x + 140 > _WIDTH - 24:
            x, y = 24, y + 22
        yield (
            f"<rect x='{x}' y='{y - 11}' width='14' height='14' fill='none' stroke='{_INK}' "
            f"stroke-width='1.5'/><text x='{x + 20}' y='{y}' font-size='12' fill='{_INK}'>"
            f"{label}</text>"
        )


def _tick(most: int) -> int:
    """A round number of bytes that divides the axis into four to ten parts."""
    unit = GIB if most >= GIB else MIB
    raw = max(1.0, most / unit / 8)
    power = 10 ** int(log10(raw))
    factor = next(each for each in (1, 2, 5, 10) if each * power >= raw)
    return int(factor * power) * unit


def _x(size_bytes: int, end: int) -> float:
    return round(_LEFT + size_bytes / end * (_WIDTH - _LEFT - _RIGHT), 2)


def _width(size_bytes: int, end: int) -> float:
    return round(size_bytes / end * (_WIDTH - _LEFT - _RIGHT), 2)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
