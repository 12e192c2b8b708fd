"""Verdicts over written-down machines."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from oomproof.doctor.checks import CHECKS, INSTALL_RUN, Verdict, check_all
from oomproof.doctor.facts import Facts, TorchFacts, gather
from oomproof.errors import HardwareError
from oomproof.hardware.describe import describe
from oomproof.hardware.spec import Hardware

GOOD = Facts(
    python="3.12.3",
    system="Linux x86_64",
    packages={
        "torch": "2.11.0",
        "transformers": "5.17.0",
        "accelerate": "1.15.0",
        "bitsandbytes": "0.50.2",
        "triton": "3.6.0",
        "cuda-bindings": "13.0.3",
    },
    hardware=describe("2x H200"),
    hardware_error=None,
    torch=TorchFacts(cuda_build="13.0", sees_cuda=True, architectures=("sm_90",)),
    torch_error=None,
    bitsandbytes_error=None,
    bitsandbytes_works=True,
    c_compiler="/usr/bin/gcc",
    nvrtc="13.0",
)


def verdicts(facts: Facts) -> dict[str, Verdict]:
    return {verdict.capability: verdict for verdict in check_all(facts)}


def test_a_good_machine_is_ok_throughout() -> None:
    assert {verdict.status for verdict in check_all(GOOD)} == {"ok"}


def test_a_missing_package_is_named_with_the_line_that_installs_it() -> None:
    packages = {name: v for name, v in GOOD.packages.items() if name != "bitsandbytes"}
    found = verdicts(replace(GOOD, packages=packages))["run models"]
    assert found.status == "missing"
    assert "bitsandbytes" in found.detail
    assert found.remedy == "pip install 'oomproof[run]'"


def test_a_cpu_build_of_torch_beside_a_gpu_is_found() -> None:
    cpu_build = TorchFacts(cuda_build=None, sees_cuda=False, architectures=())
    found = verdicts(replace(GOOD, torch=cpu_build))["GPU"]
    assert found.status == "missing"
    assert "CPU build" in found.detail


def test_a_driver_too_old_for_torch_is_found() -> None:
    blind = TorchFacts(cuda_build="13.0", sees_cuda=False, architectures=())
    found = verdicts(replace(GOOD, torch=blind))["GPU"]
    assert found.status == "missing"
    assert "CUDA 13.0" in found.detail


def test_an_old_gpu_lacks_bf16_fp8_and_flash_attention() -> None:
    found = verdicts(replace(GOOD, hardware=describe("T4")))
    assert found["bf16"].status == "missing"
    assert "7.5" in found["FP8"].detail
    assert found["FlashAttention"].status == "limited"


def test_a_broken_4_bit_product_says_what_failed() -> None:
    found = verdicts(replace(GOOD, bitsandbytes_works=False, bitsandbytes_error="no kernel image"))[
        "4-bit"
    ]
    assert found.status == "missing"
    assert "no kernel image" in found.detail


def test_a_machine_that_cannot_be_probed_says_why() -> None:
    found = verdicts(replace(GOOD, hardware=None, hardware_error="NVML said: unknown error"))
    assert found["memory"].detail == "NVML said: unknown error"


def test_no_gpu_is_no_failure() -> None:
    found = verdicts(replace(GOOD, hardware=describe("cpu")))
    assert not found["GPU"].required
    assert found["run models"].status == "ok"


def test_every_verdict_is_plain_values_and_no_two_have_a_name_in_common() -> None:
    found = check_all(GOOD)
    assert len({verdict.capability for verdict in found}) == len(found) == len(CHECKS)
    assert json.loads(json.dumps([v.as_dict() for v in found])) == [v.as_dict() for v in found]


def test_a_machine_without_torch_gets_the_install_line_and_no_more_than_that() -> None:
    bare = replace(
        GOOD,
        packages={},
        torch=None,
        bitsandbytes_works=False,
    )
    found = verdicts(bare)
    for capability in ("run models", "GPU", "4-bit"):
        assert found[capability].status == "missing"
        assert found[capability].remedy == INSTALL_RUN
    assert "torch, transformers, accelerate, bitsandbytes" in found["run models"].detail
    assert found["memory"].status == "ok"


def test_a_torch_that_cannot_be_imported_is_told_from_one_that_is_absent() -> None:
    broken = replace(GOOD, torch=None, torch_error="libcudart.so.13: cannot open")
    found = verdicts(broken)["run models"]
    assert found.status == "missing"
    assert "libcudart.so.13" in found.detail
    assert found.remedy != INSTALL_RUN


def test_a_torch_that_cannot_be_imported_is_nowhere_called_absent() -> None:
    broken = replace(GOOD, torch=None, torch_error="libcudart.so.13: cannot open")
    found = verdicts(broken)
    assert "no torch" not in found["GPU"].detail
    assert found["4-bit"].remedy != INSTALL_RUN


def test_a_cpu_build_of_torch_is_mended_by_installing_another() -> None:
    cpu_build = TorchFacts(cuda_build=None, sees_cuda=False, architectures=())
    found = verdicts(replace(GOOD, torch=cpu_build))["GPU"]
    assert found.required
    assert found.remedy is not None
    assert found.remedy.startswith("pip install")


def test_an_old_driver_is_named_beside_what_torch_was_built_for() -> None:
    hardware = replace(describe("H200"), driver_version="470.57", cuda_driver_version="11.4")
    blind = TorchFacts(cuda_build="13.0", sees_cuda=False, architectures=())
    found = verdicts(replace(GOOD, hardware=hardware, torch=blind))["GPU"]
    assert all(word in found.detail for word in ("470.57", "CUDA 13.0", "11.4"))
    assert found.remedy is not None
    assert "driver" in found.remedy


@pytest.mark.parametrize(
    ("gpus", "lacking"),
    [
        ("T4", {"bf16", "FP8", "FlashAttention"}),
        ("A100-80GB", {"FP8"}),
        ("RTX 4090", set()),
        ("1x H200, 1x T4", {"bf16", "FP8", "FlashAttention"}),
    ],
)
def test_what_a_gpu_lacks_follows_its_compute_capability(gpus: str, lacking: set[str]) -> None:
    found = verdicts(replace(GOOD, hardware=describe(gpus)))
    asked = ("bf16", "FP8", "FlashAttention")
    assert {name for name in asked if found[name].status != "ok"} == lacking
    assert not any(found[name].required for name in asked)


def test_the_weakest_of_several_gpus_is_the_one_that_is_named() -> None:
    found = verdicts(replace(GOOD, hardware=describe("1x H200, 1x T4")))
    for name in ("bf16", "FP8"):
        assert "T4" in found[name].detail
        assert "7.5" in found[name].detail
        assert "H200" not in found[name].detail


def test_a_4_bit_product_that_was_not_finite_says_so() -> None:
    wrong = replace(GOOD, bitsandbytes_works=False, bitsandbytes_error=None)
    found = verdicts(wrong)["4-bit"]
    assert found.status == "missing"
    assert "None" not in found.detail


def test_little_memory_is_limited_and_its_limit_is_named() -> None:
    machine = describe("cpu")
    [cpu] = machine.devices
    small = replace(
        machine,
        devices=(replace(cpu, free_bytes=2**29),),
        host=replace(machine.host, ram_limit_source="cgroup v2"),
    )
    found = verdicts(replace(GOOD, hardware=small))["memory"]
    assert found.status == "limited"
    assert "cgroup v2" in found.detail


@pytest.mark.parametrize(
    ("features", "status"), [({"avx512_bf16"}, "ok"), ({"amx_bf16"}, "ok"), (set(), "limited")]
)
def test_a_cpu_computes_in_bf16_or_emulates_it(features: set[str], status: str) -> None:
    machine = describe("cpu")
    machine = replace(machine, host=replace(machine.host, cpu_features=frozenset(features)))
    assert verdicts(replace(GOOD, hardware=machine))["bf16"].status == status


def test_an_installed_flash_attn_is_mentioned() -> None:
    packages = {**GOOD.packages, "flash-attn": "2.8.3"}
    assert "flash-attn 2.8.3" in verdicts(replace(GOOD, packages=packages))["FlashAttention"].detail


def test_a_torch_that_has_no_kernels_for_the_gpu_is_found() -> None:
    old = TorchFacts(cuda_build="11.8", sees_cuda=True, architectures=("sm_80", "sm_86"))
    found = verdicts(replace(GOOD, hardware=describe("RTX 5090"), torch=old))["GPU"]
    assert found.status == "missing"


def test_the_facts_of_this_machine_are_gathered_without_an_exception() -> None:
    facts = gather()
    assert facts.hardware is not None
    assert facts.torch is not None
    assert facts.bitsandbytes_works
    assert facts.packages["torch"]
    assert {verdict.capability for verdict in check_all(facts) if verdict.status == "ok"} >= {
        "run models",
        "memory",
        "4-bit",
    }


def test_a_probe_that_fails_becomes_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Hardware:
        raise HardwareError("NVML said: driver not loaded")

    monkeypatch.setattr("oomproof.doctor.facts.probe", fail)
    facts = gather()
    assert facts.hardware is None
    assert facts.hardware_error == "NVML said: driver not loaded"


def test_our_kernels_need_triton_and_a_c_compiler_and_say_what_brings_them() -> None:
    without = {name: v for name, v in GOOD.packages.items() if name != "triton"}
    found = verdicts(replace(GOOD, packages=without))["native engine"]
    assert (found.status, found.remedy) == ("missing", INSTALL_RUN)
    found = verdicts(replace(GOOD, c_compiler=None))["native engine"]
    assert found.status == "missing"
    assert "apt-get install gcc" in (found.remedy or "")
    assert found.required


def test_our_cuda_sources_need_nvrtc_and_the_way_to_it() -> None:
    without = {name: v for name, v in GOOD.packages.items() if name != "cuda-bindings"}
    found = verdicts(replace(GOOD, packages=without))["native engine"]
    assert (found.status, found.remedy) == ("missing", INSTALL_RUN)
    assert found.detail == "not installed: cuda-bindings"
    found = verdicts(replace(GOOD, nvrtc=None))["native engine"]
    assert (found.status, found.remedy) == ("missing", "pip install nvidia-cuda-nvrtc")
    cuda_12 = GOOD.packages | {"cuda-bindings": "12.9.4"}
    found = verdicts(replace(GOOD, packages=cuda_12, nvrtc=None))["native engine"]
    assert found.remedy == "pip install nvidia-cuda-nvrtc-cu12"
    assert "NVRTC 13.0" in verdicts(GOOD)["native engine"].detail


def test_where_our_engine_is_not_made_for_the_system_nothing_is_required_of_it() -> None:
    found = verdicts(replace(GOOD, system="Windows AMD64"))["native engine"]
    assert (found.status, found.required) == ("missing", False)
    on_cpu = verdicts(replace(GOOD, hardware=describe("cpu"), c_compiler=None))["native engine"]
    assert on_cpu.status == "ok"
