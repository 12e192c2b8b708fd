"""Verdicts over written-down machines."""

from __future__ import annotations

from dataclasses import replace

from oomproof.doctor.checks import Verdict, check_all
from oomproof.doctor.facts import Facts, TorchFacts
from oomproof.hardware.describe import describe

GOOD = Facts(
    python="3.12.3",
    system="Linux x86_64",
    packages={
        "torch": "2.11.0",
        "transformers": "5.17.0",
        "accelerate": "1.15.0",
        "bitsandbytes": "0.50.2",
    },
    hardware=describe("2x H200"),
    hardware_error=None,
    torch=TorchFacts(cuda_build="13.0", sees_cuda=True, architectures=("sm_90",)),
    torch_error=None,
    bitsandbytes_error=None,
    bitsandbytes_works=True,
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
