"""A plan with an adapter: its bytes in the terms, in the JSON, and on the device of its layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oomproof.errors import InputError
from oomproof.hardware.describe import describe
from oomproof.memory.adapter import RANK_MULTIPLE, lay_out_adapter, not_adapted
from oomproof.models.adapter import AdaptedWeight, AdapterSpec
from oomproof.models.resolve import resolve
from oomproof.models.spec import CheckpointSpec, CheckpointTensor, ModelSpec, Role
from oomproof.planning.plan import Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.units import round_up

LLAMA = resolve("llama-3.1-8b")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_made_up(spec: ModelSpec, rank: int = 16, modules: tuple[str, ...] = ALL) -> ModelSpec:
    """An adapter without files."""

    def half(name: str, shape: tuple[int, int]) -> CheckpointTensor:
        return CheckpointTensor(
            name=name, dtype=spec.dtype, shape=shape, file="x", offset_bytes=0, size_bytes=0
        )

    weights = [
        AdaptedWeight(
            weight=tensor.name,
            layer=tensor.layer,
            shape=(tensor.shape[0], tensor.shape[1]),
            rank=rank,
            scale=2.0,
            a=half(f"{tensor.name}.a", (rank, tensor.shape[1])),
            b=half(f"{tensor.name}.b", (tensor.shape[0], rank)),
        )
        for tensor in spec.tensors
        if tensor.role is Role.LINEAR
        and tensor.layer is not None
        and tensor.name.removesuffix(".weight").endswith(modules)
    ]
    adapter = AdapterSpec(
        path="/adapters/one",
        weights=tuple(weights),
        checkpoint=CheckpointSpec(tensors=(), files=()),
    )
    return replace(spec, adapter=adapter)


def planned(spec: ModelSpec, gpus: str = "1x24GiB", **options: Any) -> Plan:
    request = PlanRequest(**{"format": "nf4-dq", "context": 4096, **options})
    return make_plan(spec, describe(gpus), request)


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("gpus", ["1x24GiB", "4x4GiB"])
def test_the_weights_term_grows_by_exactly_the_factors_bytes(engine: str, gpus: str) -> None:
    bare, adapted = (
        planned(spec, gpus, engine=engine, context=1024) for spec in (LLAMA, with_made_up(LLAMA))
    )
    assert adapted.fits
    assert adapted.adapter is not None
    # Every factor of Llama's shapes and rank 16 is whole multiples of both allocators' units.
    exact = 2 * adapted.adapter.num_parameters
    assert adapted.adapter.weights_bytes == exact == 83_886_080
    weights = [sum(d.terms.weights for d in plan.devices) for plan in (bare, adapted)]
    assert weights[1] - weights[0] == exact
    assert any("the adapter one (rank 16, 224 linear layers)" in r for r in adapted.reasons)


def test_the_workspace_grows_by_the_low_rank_states() -> None:
    for modules, rank in ((ALL, 48), (("o_proj",), 16)):
        bare, adapted = planned(LLAMA), planned(with_made_up(LLAMA, modules=modules))
        more = adapted.devices[0].terms.workspace - bare.devices[0].terms.workspace
        assert more == rank * max(2048 * 2, 16 * 64 * 4)


def test_ranks_are_rounded_up_to_whole_vectors() -> None:
    layout = lay_out_adapter(with_made_up(LLAMA, rank=3), LLAMA.dtype)
    assert set(layout) == set(range(32))
    qkv, o, gate_up, down = layout[5].groups
    assert [group.name for group in layout[5].groups] == ["qkv", "o", "gate_up", "down"]
    assert (qkv.rank, o.rank, gate_up.rank, down.rank) == (24, 8, 16, 8)
    assert [part.first_column for part in qkv.parts] == [0, 4096, 5120]
    assert [part.first_rank for part in qkv.parts] == [0, 8, 16]
    assert {part.padded_rank for part in qkv.parts} == {round_up(3, RANK_MULTIPLE)}
    only_v = lay_out_adapter(with_made_up(LLAMA, modules=("v_proj",)), LLAMA.dtype)
    assert [part.first_column for part in only_v[0].groups[0].parts] == [5120]


def test_factors_lie_behind_each_other_and_are_aligned() -> None:
    layer = lay_out_adapter(with_made_up(LLAMA, rank=5), LLAMA.dtype)[0]
    spans = []
    for group in layer.groups:
        spans.append((group.offset_bytes, 2 * group.rank * group.columns))
        spans += [
            (part.offset_bytes, 2 * part.adapted.shape[0] * part.padded_rank)
            for part in group.parts
        ]
    end = 0
    for offset, size in spans:
        assert offset == end
        assert offset % 256 == 0
        end = round_up(offset + size, 256)
    assert end == layer.size_bytes


def test_what_just_fits_does_not_with_an_adapter() -> None:
    peak = planned(LLAMA).devices[0].peak_bytes
    for spec, fits in ((LLAMA, True), (with_made_up(LLAMA), False)):
        plan = planned(spec, f"1x{peak / 2**30 + 0.01:.3f}GiB")
        assert plan.fits is fits
    assert plan.shortfall_bytes > 0


def test_streamed_layers_leave_their_adapters_on_the_device() -> None:
    bare, adapted = (
        planned(spec, "1x8GiB", format="bf16", offload="cpu", context=1024)
        for spec in (LLAMA, with_made_up(LLAMA, rank=64))
    )
    assert adapted.fits
    assert adapted.adapter is not None
    streamed = [plan.devices[0].streamed_layers for plan in (bare, adapted)]
    assert streamed[0] is not None
    assert streamed[1] is not None
    layer = bare.host.terms.offloaded // (streamed[0][1] - streamed[0][0] + 1)
    count = streamed[1][1] - streamed[1][0] + 1
    assert adapted.host.terms.offloaded == count * layer
    # Whole layers are resident or away; what is left of the term is the adapter, all of it.
    away = count - (streamed[0][1] - streamed[0][0] + 1)
    weights = [plan.devices[0].terms.weights for plan in (bare, adapted)]
    assert weights[1] - weights[0] == adapted.adapter.weights_bytes - away * layer


def test_more_bytes_and_launches_are_slower() -> None:
    speeds = [
        planned(spec, "1x RTX 4090").tokens_per_second
        for spec in (LLAMA, with_made_up(LLAMA), with_made_up(LLAMA, rank=256))
    ]
    decodes = [speed.decode or 0 for speed in speeds]
    assert decodes[0] > decodes[1] > decodes[2] > 0
    assert (speeds[0].prefill or 0) > (speeds[2].prefill or 0)


def test_the_json_reads_back_with_and_without_it() -> None:
    for spec in (LLAMA, with_made_up(LLAMA)):
        plan = planned(spec)
        assert Plan.from_json(plan.to_json()) == plan
    assert plan.as_dict()["adapter"]["path"] == "/adapters/one"
    # Plans from before there were adapters have none.
    text = planned(LLAMA).to_json().replace('"adapter": null,', "")
    assert Plan.from_json(text).adapter is None


def test_what_the_native_engine_has_no_place_for_is_transformers() -> None:
    spec = with_made_up(LLAMA)
    assert spec.adapter is not None
    odd = replace(spec.adapter.weights[0], weight="model.layers.0.mixer.in_proj.weight")
    strange = replace(spec, adapter=replace(spec.adapter, weights=(odd,)))
    assert not_adapted(spec) is None
    assert not_adapted(strange) == "model.layers.0.mixer.in_proj"
    assert planned(strange, engine="auto").engine == "transformers"
    assert "no place for an adapter" in (planned(strange, engine="native").not_runnable or "")


def test_arguments_of_transformers_have_no_place_for_it() -> None:
    with pytest.raises(InputError, match="no place for the adapter"):
        planned(with_made_up(LLAMA), engine="transformers").to_transformers()


def test_a_warning_of_its_folder_is_among_the_reasons() -> None:
    spec = with_made_up(LLAMA)
    assert spec.adapter is not None
    warned = replace(spec, adapter=replace(spec.adapter, warning="it is another model's"))
    assert "it is another model's" in planned(warned).reasons
    assert Path(spec.adapter.path).name == spec.adapter.name
