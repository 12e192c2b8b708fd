"""Which CUDA runs where, how settings are read, and what CUDA_VISIBLE_DEVICES leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oomproof.doctor.allocator_settings import read_settings
from oomproof.doctor.cuda_support import best_wheels, has_kernels, numbers
from oomproof.doctor.remedies import install_torch
from oomproof.doctor.view import visible
from tests.doctor.machines import (
    CPU_ONLY,
    H200,
    JETSON_ORIN,
    gpu,
    in_system,
    with_driver,
    with_environment,
    with_gpus,
    with_packages,
)


@pytest.mark.parametrize(
    ("architectures", "capability", "how"),
    [
        (("sm_80", "sm_86"), (8, 9), "binary"),
        (("sm_80",), (8, 7), "binary"),
        (("sm_89",), (8, 6), None),
        (("sm_90",), (10, 0), None),
        (("sm_90", "compute_90"), (12, 0), "ptx"),
        (("sm_90a",), (9, 0), "binary"),
        (("sm_90a",), (9, 1), None),
        (("sm_100f", "sm_120"), (12, 1), "binary"),
        (("sm_70",), (7, 2), None),
        ((), (9, 0), "binary"),
        (("sm_90",), None, "binary"),
        (("gfx942",), (9, 0), None),
    ],
)
def test_kernels_run_as_the_programming_guide_says(
    architectures: tuple[str, ...], capability: tuple[int, int] | None, how: str | None
) -> None:
    assert has_kernels(architectures, capability) == how


@pytest.mark.parametrize(
    ("driver", "capability", "machine", "tag"),
    [
        ("13.0", (9, 0), "x86_64", "cu130"),
        ("13.1", (9, 0), "x86_64", "cu130"),
        ("13.2", (9, 0), "x86_64", "cu132"),
        ("14.0", (9, 0), "x86_64", "cu132"),
        ("12.8", (8, 9), "x86_64", "cu128"),
        ("12.2", (8, 9), "x86_64", "cu126"),
        ("12.2", (12, 0), "x86_64", "cu128"),
        ("13.0", (7, 0), "x86_64", "cu126"),
        ("13.0", (12, 1), "aarch64", "cu130"),
        ("12.8", (11, 0), "aarch64", None),
        ("11.8", (8, 0), "x86_64", None),
        ("13.0", (3, 7), "x86_64", None),
        (None, (8, 0), "x86_64", "cu132"),
    ],
)
def test_the_build_of_torch_follows_from_driver_gpu_and_processor(
    driver: str | None, capability: tuple[int, int], machine: str, tag: str | None
) -> None:
    wheels = best_wheels(driver, [capability], machine=machine)
    assert (wheels.tag if wheels else None) == tag


def test_torch_comes_with_what_is_built_against_it_from_where_the_machine_needs_it() -> None:
    assert install_torch(with_packages(torchvision="0.25")).endswith(
        "'torch>=2.10' torchvision --index-url https://download.pytorch.org/whl/cu130"
    )
    assert install_torch(CPU_ONLY).endswith("/whl/cpu")
    assert install_torch(JETSON_ORIN).endswith("https://pypi.jetson-ai-lab.io/jp6/cu126")
    assert install_torch(in_system(name="Darwin")) == (
        "pip install --force-reinstall 'torch>=2.10'"
    )
    old = with_driver(with_gpus(gpu("Tesla K80")), version="470.1", cuda_version="11.4")
    assert install_torch(old).startswith("use the CPU")
    in_container = in_system(with_driver(cuda_version="11.4"), container=True)
    assert install_torch(in_container).endswith("on the host of this container")


def test_versions_are_read_by_their_numbers() -> None:
    assert numbers("2.10.0+cu128") == (2, 10, 0)
    assert numbers("0.50.0.dev0") == (0, 50, 0)
    assert numbers("x") == numbers(None) == ()


def test_allocator_settings_are_read_as_torch_reads_them() -> None:
    settings = read_settings("X", "max_split_size_mb:64, roundup_power2_divisions:[256:1,>:2]")
    assert settings.pairs == (
        ("max_split_size_mb", "64"),
        ("roundup_power2_divisions", "[256:1,>:2]"),
    )
    assert settings.number("max_split_size_mb") == 64
    assert settings.malformed is None
    assert read_settings("X", "max_split_size_mb").malformed is not None
    assert read_settings("X", "").pairs == ()


@pytest.mark.parametrize(
    ("setting", "shown", "unknown", "twice"),
    [
        ("0,1", (0, 1), None, None),
        ("1", (1,), None, None),
        ("GPU-1a3b1c5d,0", (1, 0), None, None),
        ("GPU-0", (0,), None, None),
        ("0,2,1", (0,), "2", None),
        ("two", (), "two", None),
        ("0,GPU-0", (), None, "GPU-0"),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(
    setting: str, shown: tuple[int, ...], unknown: str | None, twice: str | None
) -> None:
    found = visible(with_environment(CUDA_VISIBLE_DEVICES=setting))
    assert tuple(card.index for card in found.gpus) == shown
    assert (found.unknown, found.twice) == (unknown, twice)


def test_gpus_may_be_hidden_on_purpose_or_behind_a_slice() -> None:
    assert visible(with_environment(CUDA_VISIBLE_DEVICES="")).on_purpose
    assert visible(with_environment(CUDA_VISIBLE_DEVICES="MIG-1/2/3")).names_mig
    assert visible(replace(H200, environment={})).gpus == H200.gpus
