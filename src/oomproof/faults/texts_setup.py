"""What libraries say of installations, of models that do not fit, and of wrong calls."""

from __future__ import annotations

import re
from collections.abc import Iterator

from oomproof.faults.codes import cuda_code
from oomproof.faults.fault import Cause, FaultClass
from oomproof.faults.rule import Rule, Verdict, always, rule, verdict_of

_SHRINK, _WAIT, _USER = FaultClass.SHRINK, FaultClass.WAIT, FaultClass.USER


def setup_rules() -> Iterator[Rule]:
    """Every rule of this file, the most particular words first."""
    yield from _does_not_fit()
    yield from _bitsandbytes()
    yield from _packages()
    yield from _gpus()
    yield from _calls()


def _does_not_fit() -> Iterator[Rule]:
    on_cpu = always(_USER, Cause.MODULES_ON_CPU)
    yield rule(
        "modules on the CPU",
        "dispatched on the CPU or the disk",
        r"\s*Some modules are dispatched on the CPU or the disk",
        on_cpu,
        bare=True,
        about_values=True,
    )
    yield rule(
        "modules on the disk",
        "had weights offloaded to the disk",
        r"The current `device_map` had weights offloaded to the disk",
        on_cpu,
        about_values=True,
    )
    yield rule(
        "modules on the disk",
        "We need an `offload_dir`",
        r"We need an `offload_dir` to dispatch this model according to this `device_map`",
        on_cpu,
        about_values=True,
    )
    cache = always(_SHRINK, Cause.KV_CACHE)
    yield rule(
        "vLLM's cache",
        "for the cache blocks",
        r"No available memory for the cache blocks",
        cache,
        about_values=True,
    )
    yield rule(
        "vLLM's cache",
        "To serve at least one request",
        r"To serve at least one request with the models?'?s? max(?:imum)? seq(?:uence)? len",
        cache,
        about_values=True,
    )
    yield rule(
        "vLLM's cache",
        "The model's max seq len",
        r"The model's max seq len \([0-9,]{1,12}\) is larger than the maximum number of tokens",
        cache,
        about_values=True,
    )
    yield rule(
        "vLLM's share",
        "Free memory on device",
        r"Free memory on device(?: cuda:[0-9]{1,3})? \([0-9.]{1,12}/[0-9.]{1,12} GiB\) on startup",
        always(_WAIT, Cause.GPU_TAKEN),
        about_values=True,
    )
    yield rule(
        "plan",
        " does not fit: ",
        r"\S{1,200} does not fit: [0-9.,]{1,12} (?:[KMGT]i)?B missing",
        always(_USER, Cause.DOES_NOT_FIT),
        bare=True,
        about_values=True,
    )


def _bitsandbytes() -> Iterator[Rule]:
    broken = always(_USER, Cause.BITSANDBYTES)
    yield rule(
        "bitsandbytes' setup",
        "CUDA Setup failed despite",
        r"\s*CUDA Setup failed despite (?:GPU|CUDA) being available",
        broken,
        bare=True,
    )
    yield rule(
        "bitsandbytes' setup",
        "CUDA SETUP",
        r"(?!)",
        broken,
        bare=r"(?:🚨 )?CUDA SETUP(?: ERROR)?: (?:Required library version not found"
        r"|CUDA detection failed|Missing dependency|Setup Failed)",
    )
    yield rule(
        "bitsandbytes' library",
        "bitsandbytes",
        r"(?:[^\s:]{0,400}libbitsandbytes_\w{1,40}\.(?:so|dll|dylib): (?:cannot open|undefined)"
        r"|Could not (?:find|load) (?:the )?bitsandbytes (?:\w{1,10} binary at|native library)"
        r"|Configured \w{1,10} binary not found at"
        r"|Attempted to use bitsandbytes native library functionality but it's not available"
        r"|Method '\w{1,80}' not available in CPU-only version of bitsandbytes"
        r"|The installed version of bitsandbytes was compiled without GPU support)",
        broken,
        bare=True,
        about_values=True,
    )
    yield rule(
        "bitsandbytes' library",
        "VERSION MISMATCH",
        r"\s*(?:🚨 )?(?:CUDA|ROCm) VERSION MISMATCH 🚨",
        broken,
        bare=True,
    )
    yield rule(
        "bitsandbytes' library",
        "object has no attribute 'c",
        r"'NoneType' object has no attribute 'c(?:get_man|adam|quantize|dequantize|gemm)\w*'",
        broken,
        about_values=True,
    )


_OF_OURS = "bitsandbytes|accelerate|triton|flash_attn|torch|transformers|torchao|vllm|peft"


def _packages() -> Iterator[Rule]:
    missing = always(_USER, Cause.MISSING_PACKAGE)
    yield rule(
        "bitsandbytes' needs",
        "Using ",
        r"Using `?(?:bitsandbytes|low_cpu_mem_usage=True|a `device_map`)`?[^\n]{0,200}? "
        r"requires? (?:[Aa]ccelerate|`?bitsandbytes|the latest version of bitsandbytes)",
        missing,
        bare=True,
        about_values=True,
    )
    yield rule(
        "import",
        "No module named '",
        rf"No module named '(?:{_OF_OURS})(?:\.[\w.]{{1,80}})?'",
        missing,
        about_values=True,
    )
    yield rule(
        "import",
        "No package metadata was found for ",
        rf"No package metadata was found for (?:The ')?(?:{_OF_OURS})\b",
        missing,
        about_values=True,
    )
    yield rule(
        "FlashAttention",
        "has been toggled on, but it cannot be used",
        r"FlashAttention[23]? has been toggled on, but it cannot be used",
        missing,
        about_values=True,
    )
    yield rule(
        "triton",
        "Cannot find a working triton installation",
        r"Cannot find a working triton installation",
        missing,
    )


_NUMBER = re.compile(r"Error ([0-9]{1,4}): ")


def _device_count(_found: re.Match[str], whole: str) -> Verdict:
    number = _NUMBER.search(whole)
    if number:
        return verdict_of(cuda_code(int(number[1])))
    return Verdict(fault_class=_USER, cause=Cause.NO_GPU)


def _gpus() -> Iterator[Rule]:
    none = always(_USER, Cause.NO_GPU)
    yield rule(
        "device count",
        "cudaGetDeviceCount()",
        r"(?:[^\n]{0,300} )?Unexpected error from cudaGetDeviceCount\(\)",
        _device_count,
        bare=r"Unexpected error from cudaGetDeviceCount\(\)",
    )
    yield rule(
        "no GPU",
        "No CUDA GPUs are available",
        r"No CUDA GPUs are available",
        none,
        bare=True,
    )
    yield rule(
        "no GPU",
        "No GPU found",
        r"No GPU found\. A GPU is needed for quantization",
        none,
        bare=True,
    )
    yield rule(
        "no driver",
        "Found no NVIDIA driver on your system",
        r"Found no NVIDIA driver on your system",
        none,
        bare=True,
    )
    yield rule(
        "deserialize",
        "Attempting to deserialize object on",
        r"Attempting to deserialize object on (?:a CUDA device|CUDA device [0-9]{1,3}) but",
        none,
        bare=True,
    )
    yield rule(
        "CPU build",
        "Torch not compiled with CUDA enabled",
        r"Torch not compiled with CUDA enabled",
        always(_USER, Cause.CPU_BUILD),
        about_values=True,
    )
    yield rule(
        "driver",
        "The NVIDIA driver on your system is too old",
        r"The NVIDIA driver on your system is too old",
        always(_USER, Cause.DRIVER),
        bare=True,
    )
    yield rule(
        "architecture",
        "is not compatible with the current PyTorch installation",
        r"(?!)",
        always(_USER, Cause.NO_KERNEL),
        bare=r"[\w .()/-]{1,120} with CUDA capability sm_[0-9]{2,3}[af]? is not compatible with "
        r"the current PyTorch",
    )


def _calls() -> Iterator[Rule]:
    yield rule(
        "devices",
        "Expected object of device type",
        r"Expected object of device type cuda but got device type cpu",
        always(_USER, Cause.WRONG_DEVICE),
    )
    yield rule(
        "devices",
        "Expected all tensors to be on the same device",
        r"Expected all tensors to be on the same device",
        always(_USER, Cause.WRONG_DEVICE),
        bare=r"Expected all tensors to be on the same device, but (?:found at least|got )",
    )
    yield rule(
        "types",
        "should be the same",
        r"Input type \([\w.]{1,60}\) and (?:weight|bias) type \([\w.]{1,60}\) "
        r"should be the same",
        always(_USER, Cause.WRONG_DEVICE),
    )
    yield rule(
        "meta",
        "Cannot copy out of meta tensor",
        r"Cannot copy out of meta tensor; no data!",
        always(_USER, Cause.WRONG_DEVICE),
    )
    yield rule(
        "index",
        "index out of range in self",
        r"index out of range in self",
        always(_USER, Cause.BAD_INDEX),
        about_values=True,
    )
