"""Machines that are well, written down: what broken ones are made from."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any, Literal

from oomproof.doctor.facts import (
    CacheFacts,
    DriverFacts,
    Facts,
    GpuFacts,
    LinkFacts,
    NvrtcFacts,
    RequirementFacts,
    SystemFacts,
    TorchFacts,
    TrialFacts,
)
from oomproof.hardware.spec import HostSpec
from oomproof.units import GIB

WORKS = TrialFacts(works=True)
CARDS = {
    "NVIDIA H200": ((9, 0), 140),
    "NVIDIA H100 80GB HBM3": ((9, 0), 80),
    "NVIDIA A100-SXM4-80GB": ((8, 0), 80),
    "NVIDIA GeForce RTX 5090": ((12, 0), 32),
    "NVIDIA GeForce RTX 4090": ((8, 9), 24),
    "NVIDIA GeForce RTX 3090": ((8, 6), 24),
    "Tesla T4": ((7, 5), 15),
    "Tesla V100-SXM2-32GB": ((7, 0), 32),
    "NVIDIA GeForce GTX 1080 Ti": ((6, 1), 11),
    "Tesla K80": ((3, 7), 11),
}
REQUIREMENTS = (
    RequirementFacts(package="oomproof[run]", needs="torch", specifier=">=2.10"),
    RequirementFacts(package="oomproof[run]", needs="bitsandbytes", specifier="<1,>=0.49"),
    RequirementFacts(package="oomproof[run]", needs="triton", specifier=">=3.5"),
    RequirementFacts(package="torch", needs="triton", specifier="==3.6.0"),
    RequirementFacts(package="bitsandbytes", needs="torch", specifier="<3,>=2.4"),
    RequirementFacts(package="transformers", needs="huggingface_hub", specifier="<3.0,>=1.31.0"),
)
X86_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
X86_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
X86_128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


def gpu(name: str, index: int = 0, **changes: Any) -> GpuFacts:
    """An idle card."""
    capability, gib = CARDS[name]
    card = GpuFacts(
        index=index,
        name=name,
        uuid=f"GPU-{index}a3b{index}c5d",
        bus_id=f"00000000:{index + 1:02X}:00.0",
        compute_capability=capability,
        total_bytes=gib * GIB,
        free_bytes=gib * GIB - GIB // 2,
        mig=False if name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB") else None,
        compute_mode="default",
        persistence=True,
        temperature_c=40,
    )
    return replace(card, **changes)


def gpus(name: str, count: int, **changes: Any) -> tuple[GpuFacts, ...]:
    """Several of a kind."""
    return tuple(gpu(name, index, **changes) for index in range(count))


def links(
    count: int, kind: Literal["nvlink", "pcie"], peer_access: str | None
) -> tuple[LinkFacts, ...]:
    """The same link between every two of several GPUs."""
    return tuple(
        LinkFacts(first=first, second=second, kind=kind, peer_access=peer_access)
        for first, second in combinations(range(count), 2)
    )


HOST = HostSpec(
    total_ram_bytes=256 * GIB,
    available_ram_bytes=200 * GIB,
    free_disk_bytes=900 * GIB,
    cpu_count=32,
    cpu_name="AMD EPYC",
    cpu_features=frozenset({"avx2", "avx512_bf16"}),
)
H200 = Facts(
    system=SystemFacts(
        python="3.12.3",
        name="Linux",
        machine="x86_64",
        release="6.8.0-64-generic",
        physical_ram_bytes=256 * GIB,
        shared_memory_bytes=128 * GIB,
        c_compiler="/usr/bin/gcc",
        python_headers=True,
    ),
    host=HOST,
    packages={
        "torch": "2.11.0",
        "transformers": "5.17.0",
        "accelerate": "1.15.0",
        "bitsandbytes": "0.50.2",
        "triton": "3.6.0",
        "cuda-bindings": "13.0.3",
        "huggingface_hub": "1.40.0",
        "peft": "0.20.0",
        "trl": "1.3.0",
    },
    requirements=REQUIREMENTS,
    driver=DriverFacts(
        version="580.95.05", cuda_version="13.0", cuda_init=0, gpus_on_bus=2, device_nodes=2
    ),
    gpus=gpus("NVIDIA H200", 2, fabric="completed", nvlinks=18, active_nvlinks=18, ecc=True),
    links=links(2, "nvlink", "ok"),
    torch=TorchFacts(
        version="2.11.0+cu130",
        cuda_build="13.0",
        sees_cuda=True,
        device_count=2,
        architectures=X86_13,
        cxx11_abi=True,
    ),
    triton=WORKS,
    bitsandbytes_binaries=("cuda118", "cuda121", "cuda124", "cuda126", "cuda128", "cuda130"),
    four_bit=WORKS,
    eight_bit=WORKS,
    nvrtc=NvrtcFacts(version="13.0", architectures=(75, 80, 86, 87, 89, 90, 100, 110, 120)),
    cache=CacheFacts(path="/home/me/.cache/huggingface/hub", writable=True, free_bytes=900 * GIB),
    xids=(),
)


def with_gpus(*cards: GpuFacts, facts: Facts = H200, **changes: Any) -> Facts:
    """The same software on other GPUs, which torch sees."""
    torch = replace(facts.torch, device_count=len(cards)) if facts.torch else None
    driver = replace(facts.driver, gpus_on_bus=len(cards), device_nodes=len(cards))
    kinds = links(len(cards), "pcie", "GPU not supported")
    made = replace(facts, gpus=cards, torch=torch, driver=driver, links=kinds)
    return replace(made, **changes)


def with_torch(facts: Facts = H200, **changes: Any) -> Facts:
    """Another build of torch; its version is the package's too."""
    torch = replace(facts.torch or TorchFacts(version="2.11.0"), **changes)
    packages = facts.packages | {"torch": torch.version}
    return replace(facts, torch=torch, packages=packages)


def blind(facts: Facts, cuda_error: str | None = None) -> Facts:
    """A torch that sees no GPU, and what was tried with it on the CPU."""
    return with_torch(facts, sees_cuda=False, device_count=0, cuda_error=cuda_error)


def with_driver(facts: Facts = H200, **changes: Any) -> Facts:
    """Another driver."""
    return replace(facts, driver=replace(facts.driver, **changes))


def with_packages(facts: Facts = H200, **versions: str | None) -> Facts:
    """Other versions (with _ for -), None for a package that is not there."""
    packages = dict(facts.packages)
    for key, version in versions.items():
        name = key if key == "huggingface_hub" else key.replace("_", "-")
        if version is None:
            packages.pop(name, None)
        else:
            packages[name] = version
    return replace(facts, packages=packages)


def with_environment(facts: Facts = H200, **environment: str) -> Facts:
    """Other environment variables."""
    return replace(facts, environment=environment)


def in_system(facts: Facts = H200, **changes: Any) -> Facts:
    """Another operating system."""
    return replace(facts, system=replace(facts.system, **changes))


def broken_torch(error: str, facts: Facts = H200) -> Facts:
    """A torch that cannot be imported, so that nothing built on it was tried."""
    return replace(facts, torch=None, torch_error=error, four_bit=None, eight_bit=None)


RTX_4090 = with_gpus(gpu("NVIDIA GeForce RTX 4090", persistence=False))
TWO_3090 = with_gpus(
    *gpus("NVIDIA GeForce RTX 3090", 2, persistence=False),
    facts=with_driver(
        with_torch(version="2.10.0+cu128", cuda_build="12.8", architectures=X86_128),
        version="570.124.06",
        cuda_version="12.8",
    ),
    nvrtc=NvrtcFacts(version="12.8", architectures=(50, 75, 80, 86, 89, 90, 100, 120)),
)
TWO_3090 = with_packages(TWO_3090, cuda_bindings="12.9.4")
CPU_ONLY = replace(
    with_torch(version="2.13.0+cpu", cuda_build=None, sees_cuda=False, architectures=()),
    driver=DriverFacts(
        nvml_error="NVML_ERROR_LIBRARY_NOT_FOUND",
        libcuda_error="libcuda.so.1: cannot open shared object file: No such file or directory",
        gpus_on_bus=0,
        device_nodes=0,
    ),
    gpus=(),
    links=(),
    nvrtc=None,
    nvrtc_error="NVRTC is not installed",
)
JETSON_ORIN = replace(
    in_system(machine="aarch64", release="5.15.148-tegra", python="3.10.12"),
    gpus=(GpuFacts(index=0, name="Orin (nvgpu)", uuid="GPU-0rin", compute_capability=(8, 7)),),
    links=(),
    driver=DriverFacts(
        version="540.4.0", cuda_version="12.6", cuda_init=0, gpus_on_bus=0, device_nodes=1
    ),
    torch=TorchFacts(
        version="2.10.0",
        cuda_build="12.6",
        sees_cuda=True,
        device_count=1,
        architectures=("sm_87",),
        cxx11_abi=True,
    ),
    packages=H200.packages | {"torch": "2.10.0", "cuda-bindings": "12.9.4"},
    nvrtc=NvrtcFacts(version="12.6", architectures=(75, 80, 86, 87, 89, 90)),
    host=replace(HOST, total_ram_bytes=64 * GIB, available_ram_bytes=50 * GIB),
)
HEALTHY = {
    "two H200": H200,
    "an RTX 4090": RTX_4090,
    "two RTX 3090 without a bridge": TWO_3090,
    "a machine without a GPU": CPU_ONLY,
    "a Jetson Orin": JETSON_ORIN,
}
