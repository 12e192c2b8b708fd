"""Charts as SVG text: lines, points with intervals, and bars, on linear or logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 900, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 110, 20, 52
INK, SOFT, GRID = "#1b1f24", "#57606a", "#d8dee4"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
# Okabe and Ito's palette, told apart by colour-blind readers.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_DASHES = {(False, False): "", (True, False): "6 4", (False, True): "2 3", (True, True): "6 3 2 3"}
"""By whether scales are quantized once more, and whether they are searched."""
_FAMILIES = {"nf4": 0, "int4": 1, "fp4": 2, "int8": 3, "fp8": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pen:
    """How a format is drawn in every chart."""

    colour: str
    dash: str
    """Of lines: "" for a whole one."""


def pens(formats: Sequence[str]) -> dict[str, Pen]:
    """One for each; double quantization is the same colour, dashed, searched scales are dotted."""
    found: dict[str, Pen] = {}
    families = dict(_FAMILIES)
    for name in formats:
        base, _, search = name.partition("+")
        family = base.removesuffix("-dq").partition(":")[0]
        number = families.setdefault(family, len(families))
        dash = _DASHES[family != base and ":" not in base, bool(search)]
        found[name] = Pen(colour=_COLOURS[number % len(_COLOURS)], dash=dash)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A range of values, and where it is marked."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    title: str
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """From 0 at the low end to 1 at the high one."""
        if self.logarithmic:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(max(value, self.low)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


def linear(values: Sequence[float], title: str, *, low: float | None = None) -> Axis:
    """An axis around values, marked at round numbers."""
    least = min(values) if low is None else low
    most = max(values)
    if math.isclose(least, most, rel_tol=1e-6):
        most = least + (abs(least) or 1.0)
    step = _round_step((most - least) / 5)
    begin = math.floor(least / step + 1e-9) * step
    end = math.ceil(most / step - 1e-9) * step
    count = max(1, round((end - begin) / step))
    digits = next((n for n in range(9) if math.isclose(round(step, n), step)), 9)
    ticks = tuple((begin + n * step, f"{begin + n * step:.{digits}f}") for n in range(count + 1))
    return Axis(low=begin, high=begin + count * step, ticks=ticks, title=title)


def logarithmic(values: Sequence[float], title: str) -> Axis:
    """An axis around positive values, marked at 1, 2 and 5 of each power of ten."""
    positive = [value for value in values if value > 0] or [1.0]
    marks = [
        factor * 10.0**power
        for power in range(
            math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1
        )
        for factor in (1, 2, 5)
    ]
    low = max((mark for mark in marks if mark <= min(positive)), default=marks[0])
    high = min((mark for mark in marks if mark >= max(positive)), default=marks[-1])
    if low == high:
        low, high = low / 2, high * 2
    shown = [mark for mark in marks if low <= mark <= high]
    if len(shown) > 8:
        shown = [mark for mark in shown if f"{mark:e}".startswith("1")]
    ticks = tuple((mark, f"{mark:.6g}") for mark in shown)
    return Axis(low=low, high=high, ticks=ticks, title=title, logarithmic=True)


def steps(labels: Sequence[str], title: str) -> Axis:
    """An axis of places with names, 0, 1, …; some are left out where there are many."""
    count = len(labels)
    every = max(1, math.ceil(count / 16))
    ticks = tuple((n, label) for n, label in enumerate(labels) if n % every == 0)
    return Axis(low=-0.5, high=max(0.5, count - 0.5), ticks=ticks, title=title)


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)


class Chart:
    """One chart, drawn call by call.

    Args:
        x: The horizontal axis.
        y: The vertical one.
        height: Pixels in all.
    """

    def __init__(self, x: Axis, y: Axis, height: int = HEIGHT) -> None:
        self._x, self._y, self._height = x, y, height
        self._marks: list[str] = []
        self._labels: list[tuple[float, float, str, Pen]] = []

    def across(self, value: float) -> float:
        """Pixels from the left."""
        return _LEFT + self._x.place(value) * (WIDTH - _LEFT - _RIGHT)

    def down(self, value: float) -> float:
        """Pixels from the top."""
        return _TOP + (1 - self._y.place(value)) * (self._height - _TOP - _BOTTOM)

    def line(self, points: Sequence[tuple[float, float]], pen: Pen) -> None:
        """Straight from point to point, a dot on each where there are few."""
        path = " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in points)
        dash = f" stroke-dasharray='{pen.dash}'" if pen.dash else ""
        self._marks.append(
            f"<polyline points='{path}' fill='none' stroke='{pen.colour}' stroke-width='2'{dash}/>"
        )
        for x, y in points if len(points) <= 40 else ():
            self._marks.append(
                f"<circle cx='{self.across(x):.1f}' cy='{self.down(y):.1f}' r='2.5' "
                f"fill='{pen.colour}'/>"
            )

    def interval(self, x: float, low: float, high: float, pen: Pen) -> None:
        """A vertical bar with feet."""
        place = self.across(x)
        top, bottom = self.down(high), self.down(low)
        self._marks.append(
            f"<path d='M{place - 4:.1f} {top:.1f}h8M{place - 4:.1f} {bottom:.1f}h8"
            f"M{place:.1f} {top:.1f}V{bottom:.1f}' stroke='{pen.colour}' fill='none'/>"
        )

    def point(self, x: float, y: float, pen: Pen, title: str) -> None:
        """A dot; hollow where the pen is dashed."""
        fill = "#fff" if pen.dash else pen.colour
        self._marks.append(
            f"<circle cx='{self.across(x):.1f}' cy='{self.down(y):.1f}' r='5.5' fill='{fill}' "
            f"stroke='{pen.colour}' stroke-width='2'><title>{escape(title)}</title></circle>"
        )

    def span(self, first: float, end: float, low: float, high: float, colour: str) -> None:
        """A rectangle."""
        left, right, top = self.across(first), self.across(end), self.down(high)
        self._marks.append(
            f"<rect x='{left:.2f}' y='{top:.2f}' width='{max(0.5, right - left):.2f}' "
            f"height='{self.down(low) - top:.2f}' fill='{colour}'/>"
        )

    def ticks(self, values: Sequence[float], y: float, pen: Pen) -> None:
        """Upright marks in a row."""
        row = self.down(y)
        path = "".join(f"M{self.across(value):.1f} {row - 8:.1f}v16" for value in values)
        self._marks.append(f"<path d='{path}' stroke='{pen.colour}' stroke-width='2'/>")

    def label(self, x: float, y: float, text: str, pen: Pen) -> None:
        """A name beside a place, right of it where there is room.

        Names that would overlap are moved apart.
        """
        self._labels.append((self.across(x), self.down(y) + 4, text, pen))

    def svg(self, title: str) -> str:
        """The whole chart."""
        lines = [
            (
                f"<svg viewBox='0 0 {WIDTH} {self._height}' role='img' "
                f"aria-label='{escape(title, {chr(39): '&#39;'})}' "
                'xmlns="http://www.w3.org/2000/svg" '
                f'font-family="{FONT}" font-size="13">'
            ),
            *self._axes(),
            *self._marks,
            *_apart(self._labels),
            "</svg>",
        ]
        return "\n".join(lines)

    def _axes(self) -> Iterator[str]:
        right, bottom = WIDTH - _RIGHT, self._height - _BOTTOM
        for value, text in self._y.ticks:
            y = self.down(value)
            yield f"<path d='M{_LEFT} {y:.1f}H{right}' stroke='{GRID}'/>"
            yield (
                f"<text x='{_LEFT - 9}' y='{y + 4:.1f}' text-anchor='end' "
                f"fill='{SOFT}'>{escape(text)}</text>"
            )
        for value, text in self._x.ticks:
            x = self.across(value)
            yield f"<path d='M{x:.1f} {bottom}v5' stroke='{SOFT}'/>"
            yield (
                f"<text x='{x:.1f}' y='{bottom + 20}' text-anchor='middle' "
                f"fill='{SOFT}'>{escape(text)}</text>"
            )
        yield f"<path d='M{_LEFT} {bottom}H{right}' stroke='{SOFT}'/>"
        yield (
            f"<text x='{(_LEFT + right) / 2:.0f}' y='{self._height - 10}' text-anchor='middle' "
            f"fill='{INK}'>{escape(self._x.title)}</text>"
        )
        middle = (_TOP + bottom) / 2
        yield (
            f"<text x='18' y='{middle:.0f}' text-anchor='middle' fill='{INK}' "
            f"transform='rotate(-90 18 {middle:.0f})'>{escape(self._y.title)}</text>"
        )


def _apart(labels: Sequence[tuple[float, float, str, Pen]]) -> Iterator[str]:
    placed: list[tuple[float, float, bool]] = []
    for x, y, text, pen in sorted(labels, key=lambda label: label[1]):
        left = any(
            8 < other_x - x < 70 and abs(other_y - y) < 60 for other_x, other_y, *_ in labels
        )
        place = y
        for other_x, other_y, other_left in placed:
            if other_left == left and abs(other_x - x) < 60 and place - other_y < 15:
                place = other_y + 15
        placed.append((x, place, left))
        at, anchor = (x - 11, "end") if left else (x + 11, "start")
        yield (
            f"<text x='{at:.1f}' y='{place:.1f}' text-anchor='{anchor}' fill='{pen.colour}'>"
            f"{escape(text)}</text>"
        )
