"""What single capabilities amount to, on machines that are well and on ones that lack something."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from oomproof.doctor.checks import check_all
from oomproof.doctor.facts import DriverFacts, Facts, GpuFacts, NvrtcFacts, TrialFacts
from oomproof.doctor.findings import Verdict, is_well
from oomproof.doctor.remedies import INSTALL_RUN
from oomproof.units import GIB, MIB
from tests.doctor.machines import (
    CPU_ONLY,
    H200,
    JETSON_ORIN,
    RTX_4090,
    broken_torch,
    gpu,
    gpus,
    in_system,
    with_driver,
    with_environment,
    with_gpus,
    with_packages,
    with_torch,
)


def verdict(facts: Facts, capability: str) -> Verdict:
    return next(found for found in check_all(facts) if found.capability == capability)


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("Tesla T4", {"bf16", "FP8", "FlashAttention", "native engine"}),
        ("NVIDIA A100-SXM4-80GB", {"FP8"}),
        ("NVIDIA GeForce RTX 4090", set()),
    ],
)
def test_what_a_gpu_lacks_follows_its_compute_capability(name: str, lacking: set[str]) -> None:
    facts = with_gpus(gpu(name))
    asked = ("bf16", "FP8", "FlashAttention", "native engine", "GPU", "4-bit", "8-bit")
    assert {found for found in asked if verdict(facts, found).status != "ok"} == lacking
    assert is_well(check_all(facts))


def test_the_weakest_of_several_gpus_is_the_one_that_is_named() -> None:
    facts = with_gpus(gpu("NVIDIA H200"), gpu("Tesla T4", 1))
    for name in ("bf16", "FP8"):
        assert "Tesla T4 has 7.5" in verdict(facts, name).detail
        assert verdict(facts, name).remedy


def test_a_machine_without_torch_gets_the_install_line_and_no_more_than_that() -> None:
    bare = replace(H200, packages={}, torch=None, four_bit=None, eight_bit=None)
    for capability in ("run models", "GPU", "4-bit"):
        found = verdict(bare, capability)
        assert (found.status, found.remedy) == ("missing", INSTALL_RUN)
    assert "torch, transformers, accelerate, bitsandbytes" in verdict(bare, "run models").detail
    assert verdict(bare, "memory").status == "ok"


def test_a_torch_that_cannot_be_imported_is_nowhere_called_absent() -> None:
    facts = broken_torch("libcudart.so.13: cannot open shared object file")
    for capability in ("run models", "GPU", "4-bit"):
        found = verdict(facts, capability)
        assert "libcudart.so.13" in found.detail
        assert found.remedy != INSTALL_RUN


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "conda install"),
        ("libc.so.6: version `GLIBC_2.28' not found", "newer Linux"),
        ("no answer within 45 s", "local disk"),
        ("libcuda.so.1: cannot open shared object file", "install the NVIDIA driver"),
        ("libcudnn.so.9: cannot open shared object file", "pip install --force-reinstall"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_mended_by_what_it_says(error: str, remedy: str) -> None:
    assert remedy in (verdict(broken_torch(error), "run models").remedy or "")


def test_no_gpu_is_no_failure() -> None:
    assert not verdict(CPU_ONLY, "GPU").required
    assert verdict(CPU_ONLY, "native engine").status == "ok"


def test_a_gpu_on_the_bus_without_a_driver_is_one() -> None:
    bare = replace(
        CPU_ONLY, driver=DriverFacts(nvml_error="NVML_ERROR_LIBRARY_NOT_FOUND", gpus_on_bus=1)
    )
    assert "install NVIDIA driver 580" in (verdict(bare, "GPU").remedy or "")
    assert not is_well(check_all(bare))
    unloaded = with_driver(bare, nvml_error="NVML_ERROR_DRIVER_NOT_LOADED")
    assert "sudo modprobe nvidia" in (verdict(unloaded, "GPU").remedy or "")
    inside = in_system(bare, container=True)
    assert "--gpus all" in (verdict(inside, "GPU").remedy or "")
    assert is_well(check_all(inside))  # perhaps none was meant to be there


def test_gpus_that_are_hidden_on_purpose_are_no_failure() -> None:
    hidden = with_environment(CUDA_VISIBLE_DEVICES="")
    found = verdict(hidden, "GPU")
    assert (found.check, found.remedy) == ("visible-devices", "unset CUDA_VISIBLE_DEVICES")
    assert is_well(check_all(hidden))


def test_a_driver_of_the_same_major_version_is_new_enough() -> None:
    facts = with_driver(
        with_torch(RTX_4090, cuda_build="12.8"), version="535.1", cuda_version="12.2"
    )
    facts = replace(facts, nvrtc=NvrtcFacts(version="12.8", architectures=(89,)))
    assert verdict(facts, "GPU").status == "ok"
    assert verdict(facts, "native engine").status == "ok"


def test_ptx_runs_only_where_the_driver_can_compile_it() -> None:
    newer = GpuFacts(index=0, name="NVIDIA X", compute_capability=(13, 0), total_bytes=24 * GIB)
    facts = with_torch(with_gpus(newer), architectures=("sm_120", "compute_120"))
    assert verdict(facts, "GPU").status == "ok"
    behind = with_driver(with_torch(facts, cuda_build="13.2"), cuda_version="13.0")
    found = verdict(behind, "GPU")
    assert (found.status, found.check) == ("missing", "kernels")
    assert "PTX" in found.detail


def test_our_kernels_need_packages_a_compiler_and_nvrtc() -> None:
    found = verdict(with_packages(triton=None), "native engine")
    assert (found.status, found.remedy) == ("missing", INSTALL_RUN)
    on_arm = in_system(with_packages(cuda_bindings=None), machine="aarch64")
    assert verdict(on_arm, "native engine").remedy == "pip install 'cuda-bindings>=12.9,<14'"
    found = verdict(replace(H200, nvrtc=None), "native engine")
    assert (found.status, found.remedy) == ("missing", "pip install nvidia-cuda-nvrtc")
    cuda_12 = with_packages(replace(H200, nvrtc=None), cuda_bindings="12.9.4")
    assert verdict(cuda_12, "native engine").remedy == "pip install nvidia-cuda-nvrtc-cu12"
    found = verdict(in_system(python_headers=False), "native engine")
    assert found.remedy == "apt-get install python3.12-dev"
    found = verdict(with_driver(cuda_version="12.8"), "native engine")
    assert "cuda-bindings>=12.9,<13" in (found.remedy or "")


def test_where_our_engine_is_not_made_for_the_system_nothing_is_required_of_it() -> None:
    found = verdict(in_system(name="Windows"), "native engine")
    assert (found.status, found.required) == ("missing", False)


def test_a_product_that_was_not_finite_says_so() -> None:
    found = verdict(replace(H200, four_bit=TrialFacts(works=False)), "4-bit")
    assert found.status == "missing"
    assert "not finite" in found.detail


def test_a_product_for_which_there_is_no_memory_is_not_laid_to_its_library() -> None:
    full = replace(H200, four_bit=TrialFacts(works=False, error="CUDA out of memory. Tried to"))
    assert "nvidia-smi" in (verdict(full, "4-bit").remedy or "")


def test_a_library_that_works_is_not_argued_with() -> None:
    facts = with_torch(with_packages(bitsandbytes="0.49.2"), cuda_build="13.1")
    assert verdict(facts, "4-bit").status == "ok"


def test_a_gpu_that_torch_alone_sees_is_told() -> None:
    found = verdict(replace(JETSON_ORIN, gpus=()), "GPU")
    assert (found.status, found.required) == ("limited", False)


def test_memory_that_others_hold_is_laid_to_them_where_they_can_be_seen() -> None:
    unseen = with_gpus(gpu("NVIDIA GeForce RTX 4090", free_bytes=4 * GIB))
    found = verdict(unseen, "memory")
    assert (found.check, found.status) == ("other-processes", "limited")
    assert "cannot be seen" in found.detail
    desktop = with_gpus(gpu("NVIDIA GeForce RTX 4090", free_bytes=24 * GIB - 900 * MIB))
    assert verdict(desktop, "memory").status == "ok"


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"remap_failed": True}, "memory-errors"),
        ({"uncorrected_errors": 3}, "memory-errors"),
        ({"throttling": ("power brake",)}, "throttling"),
        ({"temperature_c": 95}, "throttling"),
        ({"compute_mode": "exclusive"}, "exclusive-mode"),
    ],
)
def test_a_gpu_that_is_not_well_is_named(changes: dict[str, Any], check: str) -> None:
    found = verdict(with_gpus(gpu("NVIDIA H200", **changes)), "GPU health")
    assert found.check == check
    assert "NVIDIA H200" in found.detail


@pytest.mark.parametrize(
    ("facts", "check"),
    [
        (with_gpus(*gpus("NVIDIA H200", 2, fabric="in progress")), "fabric"),
        (with_gpus(*gpus("NVIDIA H200", 2, nvlinks=18, active_nvlinks=17)), "nvlink-down"),
        (in_system(shared_memory_bytes=64 * MIB, container=True), "shared-memory"),
    ],
)
def test_what_stands_between_gpus_is_named(facts: Facts, check: str) -> None:
    assert verdict(facts, "several GPUs").check == check


@pytest.mark.parametrize(
    ("environment", "check", "status"),
    [
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:10"}, "allocator-refused", "missing"),
        ({"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:2"}, "allocator-refused", "missing"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments=True"}, "allocator-refused", "missing"),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, "allocator-harmful", "limited"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:32"}, "allocator-harmful", "limited"),
        (
            {"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "b:1"},
            "allocator-names",
            "limited",
        ),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "debugging", "limited"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, None, "ok"),
    ],
)
def test_allocator_settings_are_judged(
    environment: dict[str, Any], check: str | None, status: str
) -> None:
    found = verdict(with_environment(**environment), "allocator")
    assert (found.check, found.status) == (check, status)


def test_the_old_name_of_the_allocators_setting_is_no_matter_where_torch_takes_it() -> None:
    facts = with_environment(
        with_packages(torch="2.13.0"), PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
    )
    assert verdict(facts, "allocator").check is None


def test_downloads_need_room_and_the_network() -> None:
    cache = H200.cache
    assert cache is not None
    full = replace(H200, cache=replace(cache, free_bytes=2 * GIB))
    assert verdict(full, "downloads").check == "disk"
    taken = replace(H200, cache=replace(cache, path="~/a b/hub", writable=False))
    assert verdict(taken, "downloads").remedy == 'sudo chown -R "$(id -u)" "$HOME"\'/a b/hub\''
    offline = verdict(with_environment(HF_HUB_OFFLINE="1"), "downloads")
    assert (offline.status, offline.remedy) == ("limited", "unset HF_HUB_OFFLINE")
    faster = with_environment(
        with_packages(huggingface_hub="0.36.0"), HF_HUB_ENABLE_HF_TRANSFER="1"
    )
    assert verdict(faster, "downloads").check == "hf-transfer"


def test_fine_tuning_needs_its_packages_and_four_bits() -> None:
    assert verdict(with_packages(peft=None), "fine-tuning").remedy == "pip install peft"
    without = replace(H200, four_bit=TrialFacts(works=False, error="x"))
    assert verdict(without, "fine-tuning").check == "tuning-4-bit"


def test_a_board_gets_its_own_torch() -> None:
    facts = with_torch(JETSON_ORIN, cuda_build=None, sees_cuda=False, architectures=())
    assert "jetson-ai-lab" in (verdict(facts, "GPU").remedy or "")
