"""Plans in "fit": spare bytes spent on better formats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oomproof.errors import InputError
from oomproof.formats import FORMATS
from oomproof.hardware.describe import describe
from oomproof.memory.profiles import QUANTIZED_ROLES
from oomproof.models.resolve import resolve
from oomproof.planning.damage import WeightErrors, group_of, groups_of
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan


def fitted(
    gpus: str, model: str = "llama-3.1-8b", errors: WeightErrors | None = None, **options: object
) -> Plan:
    request = PlanRequest(**{"format": "fit", "context": 4096, **options})  # type: ignore[arg-type]
    return make_plan(resolve(model), describe(gpus), request, None, errors)


def in_format(name: str, gpus: str, model: str = "llama-3.1-8b") -> Plan:
    request = PlanRequest(format=name, context=4096, engine="native")
    return make_plan(resolve(model), describe(gpus), request)


@pytest.mark.parametrize(
    ("model", "gpus"),
    [
        ("llama-3.1-8b", "1x 8GiB"),
        ("llama-3.1-8b", "1x 10GiB"),
        ("llama-3.1-8b", "1x 12GiB"),
        ("llama-3.2-1b", "1x 3GiB"),
        ("llama-3.1-8b", "2x 6GiB"),
        ("llama-3.1-70b", "2x 24GiB"),
        ("llama-3.1-70b", "1x 24GiB,1x 32GiB,1x 16GiB"),
    ],
)
def test_nearly_all_of_the_spare_memory_is_used_and_no_byte_more(model: str, gpus: str) -> None:
    plan, least = fitted(gpus, model), in_format("nf4-dq", gpus, model)
    assert plan.fits
    assert plan.runnable
    assert all(device.peak_bytes <= device.usable_bytes for device in plan.devices)
    spare = sum(device.usable_bytes - device.peak_bytes for device in least.devices)
    if len(plan.devices) > 1:
        # Other devices in use have a context of their own, and what the split costs.
        spare = sum(
            d.usable_bytes - d.terms.cuda_context - d.terms.margin - d.terms.workspace
            for d in plan.devices
        ) - sum(d.terms.weights + d.terms.kv_cache for d in least.devices)
    left = sum(device.usable_bytes - device.peak_bytes for device in plan.devices)
    assert left <= 0.05 * spare


def test_the_weights_of_the_plan_are_the_sum_of_their_formats() -> None:
    plan, spec = fitted("1x 10GiB"), resolve("llama-3.1-8b")
    expected = 0
    for tensor in spec.tensors:
        name = plan.tensor_formats.get(tensor.name, "bf16")
        parts = FORMATS[name].components(
            *(tensor.shape if len(tensor.shape) == 2 else (1, tensor.numel))
        )
        expected += sum(-(-part.size_bytes // 256) * 256 for part in parts)
    assert sum(device.terms.weights for device in plan.devices) == expected


def test_products_with_one_input_have_one_format() -> None:
    plan = fitted("1x 8GiB")
    for group in groups_of(resolve("llama-3.1-8b"), QUANTIZED_ROLES["native"]).values():
        assert len({plan.tensor_formats[tensor.name] for tensor in group}) == 1
    assert len(set(plan.tensor_formats.values())) > 1


def test_all_weights_stay_in_16_bits_where_they_fit() -> None:
    assert set(fitted("1x 24GiB").tensor_formats.values()) == {"bf16"}


def test_what_does_not_fit_in_the_smallest_format_does_not_fit() -> None:
    plan = fitted("1x 5GiB")
    assert not plan.fits
    assert plan.shortfall_bytes == in_format("nf4-dq", "1x 5GiB").shortfall_bytes
    assert set(plan.tensor_formats.values()) == {"nf4-dq"}


def test_the_predicted_damage_is_less_than_that_of_the_uniform_format_below() -> None:
    gpus = "1x 8GiB"
    plan, uniform = fitted(gpus), in_format("nf4", gpus)
    assert uniform.fits
    assert not in_format("int8", gpus).fits
    raised = [name for name in plan.tensor_formats.values() if name != "nf4-dq"]
    assert len(raised) > 40


def test_a_measured_error_decides_what_is_raised() -> None:
    spec = resolve("llama-3.1-8b")
    bad = {f"{layer}.down_proj" for layer in (3, 17)}
    errors = WeightErrors(
        of_tensors={
            tensor.name: {"nf4-dq": 0.5, "int8": 1e-4}
            for tensor in spec.tensors
            if tensor.layer is not None and group_of(tensor) in bad
        }
    )
    plan = fitted("1x 7GiB", errors=errors)
    for group, tensors in groups_of(spec, QUANTIZED_ROLES["native"]).items():
        if group in bad:
            assert plan.tensor_formats[tensors[0].name] != "nf4-dq"


def test_a_given_sensitivity_decides_what_is_raised() -> None:
    errors = WeightErrors(sensitivities={"9.gate_up": 100.0})
    plan = fitted("1x 7GiB", errors=errors)
    assert plan.tensor_formats["model.layers.9.mlp.up_proj.weight"] != "nf4-dq"


def test_the_plan_keeps_its_formats_as_json() -> None:
    plan = fitted("1x 8GiB")
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.search


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"format": "fit"', '"format": "nf4"', "tensor_formats"),
        (': "int8"', ': "int9"', "int9"),
    ],
)
def test_a_plan_with_other_formats_than_it_can_have_is_refused(
    old: str, new: str, named: str
) -> None:
    text = fitted("1x 8GiB").to_json()
    assert old in text
    with pytest.raises(InputError, match=named):
        Plan.from_json(text.replace(old, new, 1))


def test_only_the_native_engine_holds_a_mixture() -> None:
    plan = fitted("1x 10GiB", engine="transformers")
    assert not plan.runnable
    assert "not run by the transformers engine" in (plan.not_runnable or "")


def test_longest_context_and_most_requests_are_those_of_the_chosen_formats() -> None:
    plan = fitted("1x 8GiB")
    assert 4096 <= plan.max_context < in_format("nf4-dq", "1x 8GiB").max_context
    assert plan.max_concurrency >= 1
    assert replace(plan, reasons=()).fits
