"""The picture of a plan: well-formed, to scale, complete, and safe."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomproof.planning.plan import Plan
from oomproof.planning.plot import plot_svg
from oomproof.session import plan
from tests.cli.invoke import invoke

SVG = "{http://www.w3.org/2000/svg}"
MACHINES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama-3.1-405b", "4xA100-80GB", {"format": "nf4-dq"}),
    ("llama-3.1-70b", "2x24GiB,1x12GiB", {}),
    ("llama-3.1-8b", "8GiB", {"format": "bf16"}),
    ("tiny", "cpu", {}),
    ("llama-3.1-405b", "64x8GiB", {}),
    ("llama-3.1-405b", "8x24GiB", {"format": "nf4-dq", "offload": "cpu"}),
]


def drawn(made: Plan) -> ET.Element:
    return ET.fromstring(plot_svg(made))


def rects(picture: ET.Element, kind: str) -> list[ET.Element]:
    return [each for each in picture.iter(f"{SVG}rect") if each.get("class") == kind]


def words(picture: ET.Element) -> str:
    return " ".join("".join(each.itertext()) for each in picture.iter(f"{SVG}text"))


@pytest.mark.parametrize(("name", "gpus", "options"), MACHINES)
def test_every_device_and_every_term_is_drawn(
    name: str, gpus: str, options: dict[str, Any]
) -> None:
    made = plan(name, gpus=gpus, **options)
    picture = drawn(made)
    text = words(picture)
    for device in made.devices:
        assert ("cpu" if device.kind == "cpu" else f"GPU {device.index}") in text
    assert "host RAM" in text
    assert len(rects(picture, "weights")) == len(made.devices_in_use)
    assert made.format in text
    assert made.model in text
    over = [d for d in made.devices if d.peak_bytes > d.usable_bytes]
    assert len(rects(picture, "over")) == len(over)
    assert ("missing" in text) == (not made.fits)


@pytest.mark.parametrize(("name", "gpus", "options"), MACHINES)
def test_widths_are_to_scale_and_nothing_leaves_the_page(
    name: str, gpus: str, options: dict[str, Any]
) -> None:
    made = plan(name, gpus=gpus, **options)
    picture = drawn(made)
    page = float(picture.get("width", "0"))
    scales = {
        round(float(rect.get("width", "0")) / device.terms.weights * 2**30, 2)
        for rect, device in zip(
            rects(picture, "weights"),
            [device for device in made.devices if device.in_use],
            strict=True,
        )
        if device.terms.weights > 2**30
    }
    assert not scales or max(scales) - min(scales) <= 0.02
    for rect in picture.iter(f"{SVG}rect"):
        end = float(rect.get("x", "0")) + float(rect.get("width", "0"))
        assert end <= page + 0.01


def test_a_bar_adds_up_to_the_peak_also_where_loading_needs_more() -> None:
    made = plan("llama-3.1-8b", gpus="24GiB", format="nf4-dq")
    [device] = made.devices
    terms = replace(device.terms, staging=2**33)
    picture = drawn(replace(made, devices=(replace(device, terms=terms),)))
    assert rects(picture, "staging")
    scale = float(rects(picture, "weights")[0].get("width", "0")) / terms.weights
    bar = rects(picture, "weights")[0].get("y")
    drawn_bytes = sum(
        float(rect.get("width", "0")) / scale
        for rect in picture.iter(f"{SVG}rect")
        if rect.get("y") == bar and rect.get("class") not in (None, "usable", "over")
    )
    assert drawn_bytes == pytest.approx(terms.peak_bytes, rel=0.001)


def test_hostile_names_are_text_and_no_markup() -> None:
    made = plan("llama-3.1-8b", gpus="24GiB")
    hostile = "<script>alert('x')</script>&\"'" * 9
    [device] = made.devices
    devices = (replace(device, name=hostile),)
    picture = drawn(replace(made, model=hostile, devices=devices))
    assert not list(picture.iter(f"{SVG}script"))
    assert "alert" in words(picture)


def test_the_same_plan_is_the_same_picture() -> None:
    made = plan("llama-3.1-8b", gpus="24GiB")
    assert plot_svg(made) == plot_svg(made)


def test_the_command_draws_into_a_file_and_prints_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    options = ("plan", "llama-3.1-8b", "--gpus", "24GiB")
    done = invoke(*options, "--plot", str(path))
    assert done.code == 0
    assert done.out == invoke(*options).out
    assert path.read_text().startswith("<svg ")


@pytest.mark.parametrize(
    ("path", "named"),
    [("plan.png", "is no .svg"), ("nowhere/plan.svg", "no folder"), ("a.svg", "is a folder")],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, path: str, named: str) -> None:
    (tmp_path / "a.svg").mkdir()
    done = invoke("plan", "tiny", "--plot", str(tmp_path / path))
    assert named in done.error
