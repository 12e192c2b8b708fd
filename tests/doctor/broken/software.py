"""Packages that are absent, broken or not made for each other."""

from __future__ import annotations

from dataclasses import replace

from oomproof.doctor.facts import (
    GpuFacts,
    NvrtcFacts,
    RequirementFacts,
    TrialFacts,
)
from tests.doctor.broken.machine import INDEX, TORCH, Broken
from tests.doctor.machines import (
    H200,
    JETSON_ORIN,
    RTX_4090,
    broken_torch,
    gpu,
    in_system,
    with_gpus,
    with_packages,
    with_torch,
)

_MISSING_LIBRARY = TrialFacts(
    works=False, error="Attempted to use bitsandbytes native library functionality but it's not"
)
_LOST = GpuFacts(index=1, name="", error="NVML_ERROR_GPU_IS_LOST")

SOFTWARE = (
    Broken(
        name="a CPU build of torch beside a GPU",
        thread="XPixelGroup/HAT#85",
        facts=with_torch(
            RTX_4090, version="2.11.0+cpu", cuda_build=None, sees_cuda=False, architectures=()
        ),
        capability="GPU",
        check="torch-build",
        says="torch 2.11.0+cpu is a CPU build",
        remedy=f"{TORCH} {INDEX}/cu130",
    ),
    Broken(
        name="another NCCL in torch's way",
        thread="pytorch/pytorch#119932",
        facts=replace(
            broken_torch("libtorch_cuda.so: undefined symbol: ncclCommRegister"),
            environment={"LD_LIBRARY_PATH": "/opt/nccl/lib"},
        ),
        capability="run models",
        check="torch-import",
        says="undefined symbol: ncclCommRegister",
        remedy="unset LD_LIBRARY_PATH",
    ),
    Broken(
        name="libraries of torch itself that do not match",
        thread="THU-MIG/yolov10#306",
        facts=broken_torch("libtorch_cuda.so: undefined symbol: ncclCommRegister"),
        capability="GPU",
        check="torch-build",
        says="cannot be imported",
        remedy=f"{TORCH} {INDEX}/cu130",
    ),
    Broken(
        name="an import of torch that ends in a segmentation fault",
        thread="pytorch/pytorch#96797",
        facts=replace(
            broken_torch("the process died of SIGSEGV"),
            environment={"LD_LIBRARY_PATH": "/home/me/libtorch/lib"},
        ),
        capability="run models",
        check="torch-import",
        says="SIGSEGV",
        remedy="unset LD_LIBRARY_PATH",
    ),
    Broken(
        name="a bitsandbytes without a library for CUDA 13.1",
        thread="bitsandbytes-foundation/bitsandbytes#1848",
        facts=with_torch(
            with_packages(
                replace(H200, four_bit=_MISSING_LIBRARY, eight_bit=_MISSING_LIBRARY),
                bitsandbytes="0.49.1",
            ),
            cuda_build="13.1",
        ),
        capability="4-bit",
        check="bitsandbytes-library",
        says="torch is built for 13.1",
        remedy="pip install --upgrade 'bitsandbytes>=0.50,<1'",
    ),
    Broken(
        name="a bitsandbytes that is too old for transformers",
        thread="huggingface/transformers#41283",
        facts=with_packages(bitsandbytes="0.45.2"),
        capability="run models",
        check="package-versions",
        says="needs bitsandbytes<1,>=0.49, installed is 0.45.2",
        remedy="pip install 'bitsandbytes<1,>=0.49'",
    ),
    Broken(
        name="a bitsandbytes for servers on a Jetson",
        thread="bitsandbytes-foundation/bitsandbytes#1930",
        facts=replace(
            JETSON_ORIN,
            four_bit=TrialFacts(works=False, error="Error named symbol not found at line 233"),
        ),
        capability="4-bit",
        check="4-bit-product",
        says="named symbol not found",
        remedy="pip install --force-reinstall bitsandbytes "
        "--index-url https://pypi.jetson-ai-lab.io/jp6/cu126",
    ),
    Broken(
        name="a flash-attn built for another torch",
        thread="Dao-AILab/flash-attention#1832",
        facts=replace(
            with_packages(flash_attn="2.8.3"),
            flash_attention=TrialFacts(
                works=False,
                error="flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so: undefined symbol: "
                "_ZN3c105ErrorC2ENS_14SourceLocationE",
            ),
        ),
        capability="FlashAttention",
        check="flash-attn-import",
        says="it was built for another torch",
        remedy="pip uninstall -y flash-attn",
        status="limited",
        fails=False,
    ),
    Broken(
        name="a wheel of flash-attn with the other C++ ABI",
        thread="Dao-AILab/flash-attention#1644",
        facts=replace(
            with_packages(flash_attn="2.7.4.post1"),
            flash_attention_wheel="flash_attn-2.7.4.post1+cu12torch2.6cxx11abiFALSE-cp310-cp310-"
            "linux_x86_64.whl",
        ),
        capability="FlashAttention",
        check="flash-attn-wheel",
        says="torch 2.6 (here 2.11.0+cu130), CUDA 12 (here 13.0), the C++ ABI cxx11=FALSE",
        remedy="pip uninstall -y flash-attn",
        status="limited",
        fails=False,
    ),
    Broken(
        name="an image without a C compiler",
        thread="RosettaCommons/foundry#221",
        facts=in_system(c_compiler=None),
        capability="native engine",
        check="c-compiler",
        says="needs a C compiler, and there is none",
        remedy="apt-get install gcc (or set CC), or use --engine transformers",
    ),
    Broken(
        name="a Triton of another torch",
        thread="deepbeepmeep/Wan2GP#1263",
        facts=replace(
            with_packages(triton="3.3.0"),
            triton=TrialFacts(works=False, error="cannot import name 'AttrsDescriptor'"),
            requirements=(RequirementFacts(package="torch", needs="triton", specifier="==3.6.0"),),
        ),
        capability="native engine",
        check="triton",
        says="torch 2.11.0 needs triton==3.6.0, installed is 3.3.0",
        remedy="pip install triton==3.6.0",
    ),
    Broken(
        name="an NVRTC older than the GPU",
        thread="Fictionarry/ER-NeRF#178",
        facts=replace(
            with_gpus(gpu("NVIDIA GeForce RTX 4090")),
            nvrtc=NvrtcFacts(version="13.0", architectures=(90, 100)),
        ),
        capability="native engine",
        check="nvrtc",
        says="does not compile for NVIDIA GeForce RTX 4090",
        remedy="pip install --upgrade nvidia-cuda-nvrtc",
    ),
)
