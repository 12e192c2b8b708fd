"""No facts, however odd, make a check fail; and facts survive JSON."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oomproof.doctor import facts as facts_module
from oomproof.doctor.checks import check_all
from oomproof.doctor.facts import Facts, from_plain, to_plain
from oomproof.doctor.probes.local import PACKAGES
from oomproof.errors import InputError
from oomproof.hardware import spec
from tests.doctor.broken import BROKEN
from tests.doctor.machines import H200, HEALTHY

WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        (
            "13.0", "12.8", "11.4", "2.11.0+cu130", "2.10", "0.49.2", "0", "cuda131", "cudaxx",
            "sm_90", "sm_90a", "compute_120", "sm_", ">=2.10", "==3.6.0", "~~", "Linux", "Darwin",
            "Windows", "aarch64", "x86_64", "5.15-tegra", "NVML_ERROR_UNKNOWN", "torch[run]",
            "NVML_ERROR_DRIVER_NOT_LOADED", "NVIDIA GeForce RTX 4090", "GPU-0", "MIG-1", "0,1",
            "0,0", "-1", "", "expandable_segments:True", "max_split_size_mb:1", "a:[1:2,3:4]",
            "flash_attn-2.8.3+cu12torch2.8cxx11abiTRUE-cp312-cp312-linux_x86_64.whl", "cgroup v2",
            "undefined symbol: x", "no answer within 3 s", "GLIBCXX_3.4.32", "not started",
        )
    ),
)  # fmt: skip
NUMBERS = st.one_of(st.integers(-2, 13), st.integers(0, 2**63), st.sampled_from((802, 803, 999)))
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "BNB_CUDA_VERSION",
    "HF_HUB_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER", "CUDA_LAUNCH_BLOCKING", "LD_LIBRARY_PATH",
)  # fmt: skip


def any_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type as the fields of Facts have them."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind, vars(facts_module) | vars(spec))
        named = {entry.name: any_of(hints[entry.name]) for entry in fields(kind)}
        if kind is Facts:
            named["packages"] = st.dictionaries(st.sampled_from(PACKAGES), WORDS, max_size=16)
            named["environment"] = st.dictionaries(st.sampled_from(VARIABLES), WORDS, max_size=4)
        return st.builds(kind, **named)
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(any_of(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*(any_of(argument) for argument in arguments))
    if get_origin(kind) is frozenset:
        return st.frozensets(WORDS, max_size=2)
    if str(get_origin(kind)) == "typing.Literal":
        return st.sampled_from(arguments)
    if get_origin(kind) is dict:
        return st.dictionaries(WORDS, WORDS, max_size=3)
    if arguments:
        return st.one_of(*(any_of(argument) for argument in arguments))
    simple = {str: WORDS, int: NUMBERS, bool: st.booleans(), float: st.floats(0, 100)}
    return st.none() if kind is type(None) else simple[kind]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(any_of(Facts))
def test_no_facts_make_a_check_fail(facts: Facts) -> None:
    for verdict in check_all(facts):
        assert verdict.detail
        assert verdict.check is None or verdict.remedy
        assert "\n" not in (verdict.remedy or "")
    assert check_all(facts) == check_all(facts)


@st.composite
def spoiled(draw: st.DrawFn) -> Facts:
    """A machine that is known, a few of whose facts are odd: deeper in than pure chance goes."""
    facts = draw(st.sampled_from((*HEALTHY.values(), *(broken.facts for broken in BROKEN))))
    hints = get_type_hints(Facts, vars(facts_module) | vars(spec))
    for name in draw(st.lists(st.sampled_from(sorted(hints)), max_size=2, unique=True)):
        facts = replace(facts, **{name: draw(any_of(hints[name]))})
    for part in draw(st.lists(st.sampled_from(("system", "driver", "torch", "gpus")), max_size=3)):
        value = getattr(facts, part)
        inner = value[0] if part == "gpus" and value else value
        if not is_dataclass(inner) or isinstance(inner, type):
            continue
        inside = get_type_hints(type(inner), vars(facts_module))
        name = draw(st.sampled_from(sorted(inside)))
        changed: Any = replace(inner, **{name: draw(any_of(inside[name]))})
        spoilt: dict[str, Any] = {part: (changed, *value[1:]) if part == "gpus" else changed}
        facts = replace(facts, **spoilt)
    return facts


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(spoiled())
def test_no_odd_fact_about_a_known_machine_makes_a_check_fail(facts: Facts) -> None:
    for verdict in check_all(facts):
        assert verdict.detail
        assert verdict.check is None or verdict.remedy
        assert "\n" not in (verdict.remedy or "")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(any_of(Facts))
def test_any_facts_come_back_from_json_as_they_were(facts: Facts) -> None:
    assert from_plain(json.loads(json.dumps(to_plain(facts)))) == facts


@pytest.mark.parametrize("plain", [None, [], 3, {}, {"facts": 1}, {"system": {"python": []}}])
def test_what_is_no_facts_is_refused_with_the_field(plain: object) -> None:
    with pytest.raises(InputError, match="these are no facts of a machine"):
        from_plain(plain)


def test_a_field_that_is_wrong_is_named() -> None:
    plain = to_plain(H200)
    plain["gpus"][1]["index"] = "second"
    with pytest.raises(InputError, match=r"gpus\.1\.index"):
        from_plain(plain)


def test_the_names_that_json_has_are_those_that_scripts_know() -> None:
    plain = to_plain(H200)
    assert set(plain) == {
        "system", "host", "packages", "requirements", "environment", "driver", "gpus", "links",
        "torch", "torch_error", "triton", "bitsandbytes_binaries", "four_bit", "eight_bit",
        "flash_attention", "flash_attention_wheel", "nvrtc", "nvrtc_error", "cache", "xids",
        "probes",
    }  # fmt: skip
    assert set(plain["gpus"][0]) >= {"index", "name", "uuid", "compute_capability", "processes"}
    assert set(check_all(H200)[0].as_dict()) == {
        "capability", "status", "detail", "remedy", "required", "check", "also",
    }  # fmt: skip
