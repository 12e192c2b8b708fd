"""Charts: axes around their values, names that do not cover each other."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from oomproof.evaluation.charts import Chart, linear, logarithmic, pens, steps


@pytest.mark.parametrize("values", [[4.1, 8.2], [0.0, 0.0], [5.0], [-1.0, 1.0], [0.0, 3e-5]])
def test_a_linear_axis_holds_its_values_and_is_marked_at_both_ends(values: list[float]) -> None:
    axis = linear(values, "x")
    assert axis.low <= min(values)
    assert max(values) <= axis.high * (1 + 1e-9)
    assert (axis.ticks[0][0], axis.ticks[-1][0]) == pytest.approx((axis.low, axis.high))
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


@pytest.mark.parametrize("values", [[1e-5, 0.3], [0.1], [0.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
def test_a_logarithmic_axis_holds_its_positive_values(values: list[float]) -> None:
    axis = logarithmic(values, "y")
    positive = [value for value in values if value > 0]
    assert all(axis.low <= value <= axis.high for value in positive)
    assert 0 < axis.low < axis.high
    assert axis.ticks
    assert axis.place(0.0) == 0


def test_many_steps_are_not_all_named() -> None:
    assert len(steps([str(n) for n in range(126)], "layer").ticks) <= 16
    assert len(steps(["0"], "layer").ticks) == 1


def test_names_at_one_place_are_moved_apart_and_escaped() -> None:
    drawn = pens(["nf4", "nf4-dq", "<b>"])
    chart = Chart(linear([0.0, 1.0], "x"), linear([0.0, 1.0], "y"))
    for name, pen in drawn.items():
        chart.line([(0.0, 0.5), (1.0, 0.5)], pen)
        chart.label(1.0, 0.5, name, pen)
    svg = chart.svg("it's <a> chart")
    ElementTree.fromstring(svg)
    heights = [
        float(re.search(rf"y='([\d.]+)'[^>]*>{name}<", svg)[1])  # type: ignore[index]
        for name in ("nf4", "nf4-dq", "&lt;b&gt;")
    ]
    assert sorted(heights) == pytest.approx([heights[0], heights[0] + 15, heights[0] + 30])


def test_double_quantization_has_its_formats_colour_dashed() -> None:
    drawn = pens(["nf4", "nf4-dq", "int4", "new", "newer-dq"])
    assert drawn["nf4"].colour == drawn["nf4-dq"].colour
    assert [bool(pen.dash) for pen in drawn.values()] == [False, True, False, False, True]
    assert len({pen.colour for pen in drawn.values()}) == 4
