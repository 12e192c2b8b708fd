"""Settings, limits and neighbours."""

from __future__ import annotations

from dataclasses import replace

from oomproof.doctor.facts import (
    CacheFacts,
    GpuFacts,
    ProcessFacts,
    TrialFacts,
)
from oomproof.units import GIB
from tests.doctor.broken.machine import Broken
from tests.doctor.machines import (
    CPU_ONLY,
    H200,
    HOST,
    RTX_4090,
    blind,
    gpu,
    in_system,
    with_environment,
    with_gpus,
)

_MISSING_LIBRARY = TrialFacts(
    works=False, error="Attempted to use bitsandbytes native library functionality but it's not"
)
_LOST = GpuFacts(index=1, name="", error="NVML_ERROR_GPU_IS_LOST")

SETTINGS = (
    Broken(
        name="BNB_CUDA_VERSION left over from another machine",
        thread="bitsandbytes-foundation/bitsandbytes#1180",
        facts=with_environment(replace(H200, four_bit=_MISSING_LIBRARY), BNB_CUDA_VERSION="123"),
        capability="4-bit",
        check="bitsandbytes-override",
        says="BNB_CUDA_VERSION=123",
        remedy="unset BNB_CUDA_VERSION",
    ),
    Broken(
        name="CUDA_VISIBLE_DEVICES with a number that no GPU has",
        thread="pytorch/pytorch#1040",
        facts=with_environment(blind(RTX_4090), CUDA_VISIBLE_DEVICES="2"),
        capability="GPU",
        check="visible-devices",
        says="'2' names no GPU here",
        remedy="export CUDA_VISIBLE_DEVICES=0",
    ),
    Broken(
        name="the allocator's old variable",
        thread="p-e-w/heretic#32",
        facts=with_environment(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"),
        capability="allocator",
        check="allocator-names",
        says="the old name",
        remedy='export PYTORCH_ALLOC_CONF="$PYTORCH_CUDA_ALLOC_CONF"; '
        "unset PYTORCH_CUDA_ALLOC_CONF",
        status="limited",
        fails=False,
    ),
    Broken(
        name="expandable segments under WSL",
        thread="pytorch/pytorch#192330",
        facts=with_environment(
            in_system(RTX_4090, wsl=True), PYTORCH_ALLOC_CONF="expandable_segments:True"
        ),
        capability="allocator",
        check="allocator-harmful",
        says="fails under WSL",
        remedy="unset PYTORCH_ALLOC_CONF",
        status="limited",
        fails=False,
    ),
    Broken(
        name="a key that the allocator does not know",
        thread="ROCm/pytorch#1304",
        facts=with_environment(PYTORCH_ALLOC_CONF="release_lock_on_malloc:True"),
        capability="allocator",
        check="allocator-unknown",
        says="release_lock_on_malloc",
        remedy="unset PYTORCH_ALLOC_CONF",
        status="limited",
        fails=False,
    ),
    Broken(
        name="a download folder of another user",
        thread="av/harbor#262",
        facts=in_system(
            replace(
                CPU_ONLY, cache=CacheFacts(path="/root/.cache/huggingface/hub", writable=False)
            ),
            container=True,
        ),
        capability="downloads",
        check="cache-writable",
        says="may not write /root/.cache/huggingface/hub",
        remedy='export HF_HOME="$HOME/huggingface"',
        fails=False,
    ),
    Broken(
        name="a container that is killed while it loads",
        thread="huggingface/transformers#48290",
        facts=in_system(
            replace(
                H200,
                host=replace(
                    HOST,
                    total_ram_bytes=4 * GIB,
                    available_ram_bytes=2 * GIB,
                    ram_limit_source="cgroup v2",
                ),
            ),
            container=True,
        ),
        capability="memory",
        check="ram-limit",
        says="cgroup v2 leaves 2.00 GiB of the machine's 256.0 GiB",
        remedy="start the container with more: docker run --memory 16g …",
        status="limited",
        fails=False,
    ),
    Broken(
        name="a model that somebody left on the card",
        thread="vllm-project/vllm#15785",
        facts=with_gpus(
            gpu(
                "NVIDIA GeForce RTX 4090",
                free_bytes=3 * GIB,
                processes=(ProcessFacts(pid=771, name="python3.12", used_bytes=20 * GIB),),
            )
        ),
        capability="memory",
        check="other-processes",
        says="python3.12 (pid 771) holds 21.0 GiB of 24.0 GiB",
        remedy="kill 771",
        status="limited",
        fails=False,
    ),
)
