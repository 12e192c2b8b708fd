"""The plan as a contract: its keys, its JSON, and what is refused as no plan."""

from __future__ import annotations

import contextlib
import json
import re
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.errors import InputError
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import HostSpec
from oomproof.models.resolve import resolve
from oomproof.planning.plan import SCHEMA, Plan
from oomproof.planning.request import PlanRequest
from oomproof.planning.search import make_plan
from oomproof.units import GIB

law = settings(derandomize=True, deadline=None, max_examples=150)
HOST = HostSpec(
    total_ram_bytes=64 * GIB, available_ram_bytes=60 * GIB, free_disk_bytes=None, cpu_count=8
)


@cache
def planned(name: str, gpus: str, **options: Any) -> Plan:
    return make_plan(resolve(name), describe(gpus, host=HOST), PlanRequest(**options))


PLANS = [
    ("llama-3.1-8b", "24GiB", {"format": "nf4-dq"}),
    ("llama-3.1-70b", "2x24GiB,1x12GiB", {"cap_bytes": 20 * GIB}),
    ("llama-3.1-405b", "8xA100-80GB", {"format": "bf16", "concurrency": 3}),
    ("gemma-3-27b", "2x RTX 4090", {"context": "auto"}),
    ("llama-3.2-1b", "T4", {}),
    ("llama-3.2-1b", "cpu", {"format": "nf4-dq"}),
    ("mixtral-8x7b", "3xA100-80GB", {"format": "nf4", "context": 100}),
    ("llama-3.1-8b", "H100", {"format": "fp8", "kv_format": "fp8"}),
    ("llama-3.1-8b", "H100", {"format": "nf4", "engine": "transformers"}),
    ("llama-3.1-70b", "RTX 4090", {"format": "nf4-dq", "offload": "cpu"}),
    ("gemma-2-9b", "24GiB", {"format": "int8", "engine": "native"}),
]
plans = pytest.mark.parametrize(("name", "gpus", "options"), PLANS)


def as_plain(plan: Plan) -> dict[str, Any]:
    return dict(json.loads(plan.to_json()))


def changed(path: str, value: object) -> str:
    """A valid plan's JSON with one value replaced; a path is keys with dots between."""
    plain = as_plain(planned("llama-3.1-70b", "2x24GiB,1x12GiB"))
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    inner: Any = plain
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return json.dumps(plain)


@plans
def test_a_plan_comes_back_equal_from_its_json(
    name: str, gpus: str, options: dict[str, Any]
) -> None:
    plan = planned(name, gpus, **options)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json(indent=None).encode()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


@plans
def test_the_json_is_strict_and_has_every_promised_key(
    name: str, gpus: str, options: dict[str, Any]
) -> None:
    text = planned(name, gpus, **options).to_json()
    plain = json.loads(text, parse_constant=pytest.fail)
    assert plain["schema"] == SCHEMA == 1
    assert plain.keys() >= {
        "model",
        "format",
        "fits",
        "runnable",
        "engine",
        "compute_dtype",
        "attention",
        "kv_format",
        "context",
        "concurrency",
        "max_context",
        "max_concurrency",
        "offload",
        "refused",
        "disk",
        "load_s",
        "pipeline",
        "tensor_parallel",
        "devices",
        "host",
        "shortfall_bytes",
        "alternatives",
        "download_bytes",
        "tokens_per_second",
        "reasons",
        "cap_bytes",
    }
    for device in plain["devices"]:
        assert device.keys() >= {"index", "name", "usable_bytes", "peak_bytes", "layers", "terms"}
        assert list(device["terms"]) == (
            [
                "cuda_context",
                "weights",
                "kv_cache",
                "workspace",
                "staging",
                "graphs",
                "comm",
                "margin",
            ]
        )
    assert plain["tokens_per_second"].keys() == {"decode", "decode_total", "prefill"}
    assert plain["host"].keys() >= {"usable_bytes", "terms", "peak_bytes"}
    assert plain["tensor_parallel"] == 1


@plans
def test_the_numbers_of_a_plan_agree_with_each_other(
    name: str, gpus: str, options: dict[str, Any]
) -> None:
    plan = planned(name, gpus, **options)
    plain = as_plain(plan)
    missing = 0
    for device in plain["devices"]:
        terms = device["terms"]
        running = terms["kv_cache"] + terms["workspace"] + terms["graphs"] + terms["comm"]
        assert device["peak_bytes"] == (
            terms["cuda_context"]
            + terms["weights"]
            + max(terms["staging"], running)
            + terms["margin"]
        )
        missing += max(0, device["peak_bytes"] - device["usable_bytes"])
    assert plan.shortfall_bytes == missing
    assert plan.fits == (missing == 0)
    assert plan.pipeline == len(plan.devices_in_use)
    layers = [
        layer
        for device in plan.devices_in_use
        if device.layers
        for layer in range(device.layers[0], device.layers[1] + 1)
    ]
    assert layers == list(range(resolve(name).num_hidden_layers))
    assert sum(device.holds_embedding for device in plan.devices) == 1
    assert sum(device.holds_head for device in plan.devices) == 1
    assert plan.fingerprint == resolve(name).fingerprint


def test_devices_in_use_are_in_order_along_the_model() -> None:
    plan = planned("llama-3.1-70b", "2x24GiB,1x12GiB", format="nf4-dq", context=16_384)
    used = plan.devices_in_use
    assert used[0].holds_embedding
    assert used[-1].holds_head
    ends = [device.layers for device in used if device.layers]
    assert [first for first, _ in ends] == [0, *(last + 1 for _, last in ends[:-1])]


def test_a_cap_is_recorded() -> None:
    assert planned("llama-3.2-1b", "24GiB", cap_bytes=8 * GIB).cap_bytes == 8 * GIB
    assert planned("llama-3.2-1b", "24GiB").cap_bytes is None


def test_to_transformers_of_a_plan_is_the_hand_off() -> None:
    plan = planned("llama-3.1-8b", "24GiB", format="nf4-dq", engine="transformers")
    assert plan.to_transformers()["device_map"] == {"": 0}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", b"\xff\xfe", "[" * 100_000, "{}"])
def test_what_is_no_plan_is_refused_with_the_files_name(text: str | bytes) -> None:
    with pytest.raises(InputError, match=r"my\.json: not a plan of schema 1"):
        Plan.from_json(text, file="my.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("context", "many"),
        ("context", None),
        ("context", 8192.5),
        ("format", 4),
        ("fits", "perhaps"),
        ("devices", {}),
        ("devices.1.index", "first"),
        ("devices.1.kind", "tpu"),
        ("devices.0.layers", [1]),
        ("devices.0.layers", [0, 1, 2]),
        ("devices.0.terms", None),
        ("devices.0.terms.weights", "a lot"),
        ("host.terms.pinned", []),
        ("source.kind", "floppy"),
        ("tokens_per_second", 7),
        ("alternatives", "none"),
        ("reasons", [1]),
        ("decoder_prefix", None),
    ],
)
def test_a_malformed_plan_is_refused_with_the_fields_name(path: str, value: object) -> None:
    with pytest.raises(InputError, match=re.escape(path)):
        Plan.from_json(changed(path, value))


@pytest.mark.parametrize(
    "key", ["model", "format", "devices", "host", "source", "context", "prefill_chunk_tokens"]
)
def test_a_plan_without_a_field_is_refused_with_its_name(key: str) -> None:
    plain = as_plain(planned("llama-3.1-8b", "24GiB", format="nf4-dq"))
    del plain[key]
    with pytest.raises(InputError, match=rf"{key}: Field required"):
        Plan.from_json(json.dumps(plain))


def test_a_plan_of_another_schema_is_refused() -> None:
    with pytest.raises(InputError, match="plan schema 2 is not 1"):
        Plan.from_json(changed("schema", 2))


@pytest.mark.parametrize(
    ("path", "value"),
    [("context", "8192"), ("context", True), ("fits", "yes"), ("devices.0.usable_bytes", "1")],
)
def test_a_value_of_another_json_type_is_refused(path: str, value: object) -> None:
    with pytest.raises(InputError, match=re.escape(path)):
        Plan.from_json(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("context", -5),
        ("context", 0),
        ("concurrency", 0),
        ("format", "nf5"),
        ("kv_format", "int3"),
        ("compute_dtype", "float7"),
        ("engine", "steam"),
        ("devices", []),
        ("devices.0.layers", [9, 2]),
        ("devices.0.layers", [-4, 2]),
        ("devices.0.terms.weights", -1),
        ("devices.0.usable_bytes", -1),
    ],
)
def test_a_value_that_no_plan_can_have_is_refused(path: str, value: object) -> None:
    with pytest.raises(InputError, match=path.rsplit(".", maxsplit=1)[-1]):
        Plan.from_json(changed(path, value))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
_PATHS = [
    *as_plain(planned("llama-3.1-8b", "24GiB", format="nf4-dq")),
    *(f"devices.0.{key}" for key in ("index", "name", "kind", "uuid", "layers", "terms")),
    "devices.0",
    "host.terms",
    "source.path",
    "tokens_per_second.decode",
]


@law
@given(st.sampled_from(_PATHS), _JSON)
def test_any_json_is_read_as_a_plan_or_refused_as_input(path: str, value: object) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(Plan.from_json(changed(path, value)), Plan)
