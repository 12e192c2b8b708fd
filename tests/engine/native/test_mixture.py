"""Models whose projections have formats of their own, loaded and run."""

from __future__ import annotations

from dataclasses import replace

import pytest

import oomproof
from oomproof.errors import OomproofError
from oomproof.formats import FIT
from oomproof.hardware.probe import probe
from oomproof.models.resolve import resolve
from oomproof.models.spec import Role
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan

FORMATS = ("nf4-dq", "int8", "bf16", "int4")


def mixed_plan(formats: tuple[str, ...] = FORMATS) -> Plan:
    """The bundled model, each linear in the next of these formats, q, k and v in different ones."""
    spec = resolve("tiny")
    linears = [tensor.name for tensor in spec.tensors if tensor.role is Role.LINEAR]
    by_tensor = {name: formats[i % len(formats)] for i, name in enumerate(linears)}
    # More weights than in any of these formats alone but 16 bits.
    plan = make_plan(spec, probe(), PlanRequest(format="nf4-dq", engine="native", context=256))
    whole = make_plan(spec, probe(), PlanRequest(format="bf16", engine="native", context=256))
    (device,), (larger,) = plan.devices, whole.devices
    terms = replace(device.terms, weights=larger.terms.weights)
    return replace(
        plan,
        format=FIT,
        tensor_formats=by_tensor,
        search=True,
        devices=(replace(device, terms=terms),),
    )


def test_a_mixture_of_formats_answers() -> None:
    with oomproof.load(mixed_plan()) as model:
        answer = model.generate("It was a dark night", max_new_tokens=8, temperature=0)
    with oomproof.load("tiny", format="bf16", engine="native", context=256) as model:
        exact = model.generate("It was a dark night", max_new_tokens=8, temperature=0)
    assert answer.split()[:1] == exact.split()[:1]


def test_layers_of_other_formats_follow_each_other() -> None:
    # Where decode steps are chained, a layer leaves more to one of its kind than to another's.
    plan = mixed_plan(("nf4-dq",))
    other = {1: "int8", 3: "nf4-g16"}
    by_tensor = {name: other.get(int(name.split(".")[2]), "nf4-dq") for name in plan.tensor_formats}
    with oomproof.load(replace(plan, tensor_formats=by_tensor)) as model:
        together = model.generate("It was a dark night", max_new_tokens=8, temperature=0)
    with oomproof.load("tiny", format="bf16", engine="native", context=256) as model:
        exact = model.generate("It was a dark night", max_new_tokens=8, temperature=0)
    assert together.split()[:1] == exact.split()[:1]


def test_a_mixture_of_one_format_answers_as_that_format() -> None:
    with oomproof.load(mixed_plan(("nf4-dq",))) as model:
        mixed = model.generate("It was a dark night", max_new_tokens=16, temperature=0)
    with oomproof.load("tiny", format="nf4-dq", engine="native", context=256, search=True) as model:
        assert mixed == model.generate("It was a dark night", max_new_tokens=16, temperature=0)


def test_a_plan_in_fit_is_loaded_as_planned() -> None:
    with oomproof.load("tiny", format="fit", context=256) as model:
        assert model.plan.format == FIT
        assert model.generate("It was", max_new_tokens=2, temperature=0)


def test_formats_of_tensors_that_are_not_there_are_more_than_was_planned() -> None:
    plan = mixed_plan(("nf4-dq",))
    (device,) = plan.devices
    small = make_plan(
        resolve("tiny"), probe(), PlanRequest(format="nf4-dq", engine="native", context=256)
    )
    tight = replace(device, terms=small.devices[0].terms)
    named = {"model.layers.0.nothing.weight": "nf4-dq"}
    with pytest.raises(OomproofError, match="planned"):
        oomproof.load(replace(plan, tensor_formats=named, devices=(tight,)))
