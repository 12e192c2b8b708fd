"""GPUs and drivers: too old, too new, lost, taken, not started."""

from __future__ import annotations

from dataclasses import replace

from oomproof.doctor.facts import (
    GpuFacts,
    NvrtcFacts,
    ProcessFacts,
    XidFacts,
)
from oomproof.units import MIB
from tests.doctor.broken.machine import INDEX, TORCH, Broken
from tests.doctor.machines import (
    H200,
    RTX_4090,
    X86_126,
    blind,
    gpu,
    gpus,
    in_system,
    links,
    with_driver,
    with_gpus,
    with_torch,
)

_H100 = with_gpus(*gpus("NVIDIA H100 80GB HBM3", 8, fabric="completed"))
_LOST = GpuFacts(index=1, name="", error="NVML_ERROR_GPU_IS_LOST")

DRIVERS = (
    Broken(
        name="a driver of CUDA 12 under a torch of CUDA 13",
        thread="pytorch/pytorch#162531",
        facts=blind(
            with_driver(version="570.124.06", cuda_version="12.8"),
            "CUDA initialization: The NVIDIA driver on your system is too old",
        ),
        capability="GPU",
        check="driver-age",
        says="torch is built for CUDA 13.0, the driver supports up to 12.8",
        remedy=f"{TORCH} {INDEX}/cu128",
    ),
    Broken(
        name="a driver for which no torch is built any more",
        thread="lllyasviel/Fooocus#1313",
        facts=blind(with_driver(RTX_4090, version="470.86", cuda_version="11.4")),
        capability="GPU",
        check="driver-age",
        says="up to 11.4",
        remedy="install NVIDIA driver 580 or newer (https://www.nvidia.com/drivers), then reboot",
    ),
    Broken(
        name="an RTX 5090 under a torch of CUDA 12.4",
        thread="pytorch/pytorch#167244",
        facts=with_torch(
            with_driver(
                with_gpus(*gpus("NVIDIA GeForce RTX 5090", 2)),
                version="570.124.06",
                cuda_version="12.8",
            ),
            version="2.10.0+cu126",
            cuda_build="12.6",
            architectures=X86_126,
        ),
        capability="GPU",
        check="kernels",
        says="no kernels for NVIDIA GeForce RTX 5090 (compute capability 12.0)",
        remedy=f"{TORCH} {INDEX}/cu128",
    ),
    Broken(
        name="a Pascal card under a torch of CUDA 13",
        thread="Comfy-Org/ComfyUI#16438",
        facts=with_gpus(gpu("NVIDIA GeForce GTX 1080 Ti")),
        capability="GPU",
        check="kernels",
        says="compute capability 6.1",
        remedy=f"{TORCH} {INDEX}/cu126",
    ),
    Broken(
        name="a driver that was updated while it was running",
        thread="NVIDIA/ubuntu-packaging-nvidia-driver#3",
        facts=blind(
            with_driver(
                replace(H200, gpus=(), links=()),
                nvml_error="NVML_ERROR_LIB_RM_VERSION_MISMATCH",
                version=None,
                cuda_version=None,
                cuda_init=803,
            )
        ),
        capability="GPU",
        check="nvml",
        says="not of the version that is running",
        remedy="sudo reboot",
    ),
    Broken(
        name="a container that has lost its GPUs",
        thread="NVIDIA/nvidia-container-toolkit#48",
        facts=in_system(
            with_driver(blind(replace(H200, gpus=(), links=())), nvml_error="NVML_ERROR_UNKNOWN"),
            container=True,
        ),
        capability="GPU",
        check="nvml",
        says="the container has lost its GPUs",
        remedy="start the container again with its GPUs: docker run --gpus all …",
    ),
    Broken(
        name="WSL where the library that Windows lends is not found",
        thread="microsoft/WSL#7056",
        facts=in_system(
            with_driver(
                blind(replace(RTX_4090, gpus=())), nvml_error="NVML_ERROR_LIBRARY_NOT_FOUND"
            ),
            wsl=True,
        ),
        capability="GPU",
        check="nvml",
        says="Windows has an NVIDIA driver",
        remedy='export LD_LIBRARY_PATH="/usr/lib/wsl/lib:$LD_LIBRARY_PATH"',
    ),
    Broken(
        name="an HGX board whose fabric manager does not run",
        thread="pytorch/pytorch#35710",
        facts=blind(
            with_driver(_H100, cuda_init=802),
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
        ),
        capability="GPU",
        check="cuda-init",
        says="error 802, the NVSwitch fabric is not ready",
        remedy="sudo systemctl restart nvidia-fabricmanager (of the driver's own version)",
    ),
    Broken(
        name="a cluster's card in exclusive mode that another job has",
        thread="NVIDIA/DIGITS#2005",
        facts=with_gpus(
            gpu(
                "NVIDIA A100-SXM4-80GB",
                compute_mode="exclusive",
                processes=(ProcessFacts(pid=4242, name="python3", used_bytes=300 * MIB),),
            )
        ),
        capability="GPU",
        check="compute-mode",
        says="exclusive mode, and python3 (pid 4242) has it",
        remedy="sudo nvidia-smi -i 0 -c DEFAULT",
    ),
    Broken(
        name="an A100 cut into MIG slices",
        thread="pytorch/pytorch#130181",
        facts=with_gpus(gpu("NVIDIA A100-SXM4-80GB", mig=True)),
        capability="GPU",
        check="mig",
        says="cut into MIG slices",
        remedy="sudo nvidia-smi -i 0 -mig 0",
    ),
    Broken(
        name="a GPU that fell off the bus",
        thread="leptonai/gpud#604",
        facts=with_gpus(gpu("NVIDIA H200"), _LOST, xids=(XidFacts(bus_id="0000:ae:00", code=79),)),
        capability="GPU health",
        check="gpu-lost",
        says="does not answer: NVML_ERROR_GPU_IS_LOST",
        remedy="sudo reboot (if it comes back: check its power and its seat)",
    ),
    Broken(
        name="RTX 4090s that claim to reach each other",
        thread="NVIDIA/nccl-tests#117",
        facts=with_gpus(
            *gpus("NVIDIA GeForce RTX 4090", 2),
            facts=with_driver(
                with_torch(version="2.10.0+cu126", cuda_build="12.6", architectures=X86_126),
                version="525.85.12",
                cuda_version="12.0",
            ),
            links=links(2, "pcie", "ok"),
            nvrtc=NvrtcFacts(version="12.6", architectures=(80, 86, 89, 90)),
        ),
        capability="several GPUs",
        check="wrong-copies",
        says="arrive as zeros",
        remedy="export NCCL_P2P_DISABLE=1",
        status="limited",
        fails=False,
    ),
)
