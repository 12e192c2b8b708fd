"""What GPUs, CUDA and its libraries say, by their words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from oomproof.faults.codes import (
    CudaCode,
    code_of_name,
    code_of_text,
    codes,
    cuda_code,
    xid,
)
from oomproof.faults.fault import Cause, FaultClass
from oomproof.faults.rule import Rule, Verdict, always, rule, verdict_of

_SHRINK = FaultClass.SHRINK
_PROCESS, _GPU, _USER = FaultClass.PROCESS, FaultClass.GPU, FaultClass.USER


def gpu_rules() -> Iterator[Rule]:
    """Every rule of this file, the most particular words first."""
    yield from _gpu_memory()
    yield from _libraries()
    yield from _on_chip()
    yield from _cuda()
    yield from _nccl_rules()
    yield from _gpu_faults()


def _cuda_words(found: re.Match[str], _whole: str) -> Verdict | None:
    """`CUDA error: <words, a name or a number>`."""
    rest = found["rest"]
    if number := found["number"]:
        return verdict_of(cuda_code(int(number)))
    if code := code_of_text(rest) or _name_in(rest):
        return verdict_of(code)
    return Verdict(fault_class=_PROCESS, cause=Cause.UNKNOWN_CUDA) if rest else None


def _name_in(text: str) -> CudaCode | None:
    found = _CODE_NAME.match(text)
    return code_of_name(found[1]) if found else None


def _cuda_name(found: re.Match[str], _whole: str) -> Verdict:
    code = code_of_name(found["code"])
    return verdict_of(code) if code else Verdict(fault_class=_PROCESS, cause=Cause.UNKNOWN_CUDA)


_NO_ROOM = re.compile(r"_STATUS_\w*ALLOC|ALLOC_FAILED|INSUFFICIENT_RESOURCES|ALLOCATION_FAILED")
_CREATION = re.compile(r"when calling `\s?\w*Create\w{0,20}\(")


def _library(found: re.Match[str], whole: str) -> Verdict | None:
    """cuBLAS and its like: a handle that cannot be created has found no memory for itself."""
    status = found["status"]
    if "HOST_ALLOC" in status:
        return Verdict(fault_class=_SHRINK, cause=Cause.HOST_MEMORY, code_name=status)
    is_created = _CREATION.search(whole) is not None
    # cuDNN's handle is made at its first call, which the message does not name.
    is_new = is_created or status.startswith(("CUDNN", "MIOPEN"))
    if (
        _NO_ROOM.search(status)
        or (is_new and status.endswith("NOT_INITIALIZED"))
        or (is_created and status.endswith("INTERNAL_ERROR"))
    ):
        return Verdict(fault_class=_SHRINK, cause=Cause.LIBRARY_MEMORY, code_name=status)
    if status.endswith(("NOT_SUPPORTED", "INVALID_VALUE", "ARCH_MISMATCH", "BAD_PARAM")):
        return Verdict(fault_class=_USER, cause=Cause.BAD_CALL, code_name=status)
    return Verdict(fault_class=_PROCESS, cause=Cause.LIBRARY, code_name=status)


_NCCL_CUDA = re.compile(r"Cuda failure (?:([0-9]{1,4}) )?'([^'\n]{1,120})'")


def _nccl(_found: re.Match[str], whole: str) -> Verdict:
    if cuda := _NCCL_CUDA.search(whole):
        code = cuda_code(int(cuda[1])) if cuda[1] else code_of_text(cuda[2])
        if code is not None and code.cause is Cause.GPU_MEMORY:
            return Verdict(
                fault_class=_SHRINK, cause=Cause.NCCL_MEMORY, code=2, code_name=code.name
            )
        if code is not None and code.fault_class is _GPU:
            return verdict_of(code)
    if re.search(r"(?:failed|calloc|malloc)[^\n]{0,80}\bout of memory\b", whole):
        return Verdict(fault_class=_SHRINK, cause=Cause.NCCL_MEMORY, code=2)
    return Verdict(fault_class=_PROCESS, cause=Cause.NCCL)


def _xid(found: re.Match[str], _whole: str) -> Verdict | None:
    number = int(found["number"])
    known = xid(number)
    if known is None:
        return None
    return Verdict(fault_class=known[0], cause=known[1], code=number, code_name=f"Xid {number}")


_CODE_NAME = re.compile(r"(CUDA_ERROR_[A-Z_]{3,60}|(?:cuda|hip)Error[A-Z]\w{2,60})\b")
_NAMED = (
    r"(?:[\w.:]{1,80}(?: \([^()\n]{0,80}\))?(?: failed)?(?: with| returned)?(?: error)?[:(]? ?)?\(?"
    r"(?P<code>CUDA_ERROR_[A-Z_]{3,60}|(?:cuda|hip)Error[A-Z]\w{2,60})\b"
)


def _gpu_memory() -> Iterator[Rule]:
    oom = always(_SHRINK, Cause.GPU_MEMORY)
    yield rule(
        "torch allocator",
        " out of memory",
        r"(?:CUDA|HIP|XPU|MTIA|NPU) out of memory(?=[.!;,:(]|\s*$)",
        oom,
        bare=r"(?:CUDA|HIP|XPU|MTIA|NPU) out of memory\. (?:Tried|Trying) to allocate [0-9]",
    )
    yield rule("torch async allocator", "Allocation on device", r"Allocation on device\b", oom)
    yield rule(
        "mps allocator",
        "MPS backend out of memory",
        r"MPS backend out of memory",
        oom,
        bare=r"MPS backend out of memory \(MPS allocated: [0-9]",
    )
    yield rule("mps buffer", "Invalid buffer size", r"Invalid buffer size: [0-9.]+ ?[KMGT]", oom)
    yield rule(
        "ggml buffer",
        "cudaMalloc failed: out of memory",
        r"ggml_\w{1,60}: allocating [0-9.]{1,12} MiB on device [0-9]{1,3}: cudaMalloc failed: out",
        oom,
        bare=True,
    )
    yield rule("xla", "RESOURCE_EXHAUSTED", r"RESOURCE_EXHAUSTED: Out of memory", oom, bare=True)


_LIBRARIES = r"CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|ROCBLAS|HIPSOLVER|HIPSPARSE|MIOPEN"


def _libraries() -> Iterator[Rule]:
    yield rule(
        "library",
        "_STATUS_",
        r"(?:(?:CUDA|HIP|cuDNN|cusolver|cusparse|cublas|MIOpen|cuBLAS) [Ee]rror:? |"
        rf"(?:[\w ]{{1,40}}: )?)(?P<status>(?:{_LIBRARIES})_STATUS_[A-Z_]{{2,60}})",
        _library,
        bare=r"(?:CUDA|HIP|cuDNN|cusolver|cusparse|cuBLAS) error: "
        rf"(?P<status>(?:{_LIBRARIES})_STATUS_[A-Z_]{{2,60}})",
    )
    yield rule(
        "cuSPARSE handle",
        "cusparseCreate",
        r"CUDA error: (?:insufficient resources|initialization error|resource allocation failed) "
        r"when calling `cusparseCreate",
        always(_SHRINK, Cause.LIBRARY_MEMORY),
        bare=True,
    )
    yield rule(
        "cuFFT", "CUFFT_", r"cuFFT error: (?P<status>CUFFT_[A-Z_]{3,40})", _library, bare=True
    )
    yield rule(
        "cuDNN search",
        "valid cuDNN algorithm",
        r"Unable to find a valid cuDNN algorithm to run convolution",
        always(_SHRINK, Cause.LIBRARY_MEMORY),
    )


def _cuda() -> Iterator[Rule]:
    yield rule(
        "CUDA error",
        "rror",
        r"(?:CUDA(?: driver| runtime| Runtime)? [Ee]rror|HIP (?:runtime )?error|"
        r"Triton Error \[(?:CUDA|HIP)\])"
        r"(?: (?P<number>[0-9]{1,4})(?![0-9]))?(?:: ?|, )(?P<rest>.{0,300})",
        _cuda_words,
        bare=r"(?:CUDA(?: driver| runtime)? error|HIP error|Triton Error \[(?:CUDA|HIP)\])"
        r"(?: (?P<number>[0-9]{1,4})(?![0-9]))?: (?P<rest>" + _known_words() + r")",
    )
    yield rule("CUDA name", "Error", _NAMED, _cuda_name)
    yield rule(
        "CUDA name",
        "CUDA_ERROR_",
        _NAMED,
        _cuda_name,
        bare=r"(?:cu[A-Z]\w{2,60}(?: failed)?(?: with)?:? )?"
        r"(?P<code>CUDA_ERROR_[A-Z_]{3,60})(?=[:,(]|\s*$)",
    )
    yield rule(
        "device assert",
        "Assertion",
        r"(?!)",
        always(_PROCESS, Cause.DEVICE_ASSERT),
        bare=r"\S{0,300}\.cuh?:[0-9]{1,6}: .{0,300}?block: \[[0-9, ]{1,32}\], "
        r"thread: \[[0-9, ]{1,32}\] Assertion",
    )
    yield rule(
        "fork",
        "Cannot re-initialize CUDA",
        r"Cannot re-initialize CUDA in forked subprocess",
        always(_PROCESS, Cause.FORKED),
        bare=True,
    )


def _known_words() -> str:
    words = sorted((code.text for code in codes() if code.text), key=len, reverse=True)
    return "(?:" + "|".join(re.escape(one) for one in words) + r")(?![\w ]*[?'\"]).{0,200}"


def _nccl_rules() -> Iterator[Rule]:
    yield rule(
        "NCCL",
        "NCCL",
        r"(?:\w{1,40}: )?NCCL (?:[Ee]rror|failure)\b",
        _nccl,
        bare=r"NCCL (?:error in: |Error [0-9]+: )",
    )
    yield rule(
        "NCCL warning",
        "Cuda failure",
        r"(?!)",
        _nccl,
        bare=r"Cuda failure (?:[0-9]{1,4} )?'[^'\n]{1,120}'",
    )
    yield rule(
        "NCCL watchdog",
        "Watchdog caught collective operation timeout",
        r"Watchdog caught collective operation timeout",
        always(_PROCESS, Cause.NCCL),
        bare=True,
    )


def _gpu_faults() -> Iterator[Rule]:
    yield rule(
        "Xid",
        "NVRM: Xid",
        r"(?!)",
        _xid,
        bare=r"NVRM: Xid \([^()\n]{1,40}\): (?P<number>[0-9]{1,4})\b",
    )
    lost = always(_GPU, Cause.GPU_LOST)
    yield rule(
        "fallen off the bus",
        "fallen off the bus",
        r"(?:NVRM: )?(?:GPU [^\n]{0,80})?(?:has )?fallen off the bus",
        lost,
        bare=r"NVRM: (?:GPU [^\n]{0,80})?(?:has )?fallen off the bus",
    )
    yield rule(
        "device handle",
        "Unable to determine the device handle",
        r"Unable to determine the device handle for (?:GPU|gpu)",
        lost,
        bare=True,
    )
    yield rule("NVML", "GPU is lost", r"GPU is lost", lost)


def _on_chip() -> Iterator[Rule]:
    yield rule(
        "triton resources",
        "out of resource",
        r"out of resources?: [\w ]{1,40}, Required: [0-9]",
        always(_USER, Cause.ON_CHIP_MEMORY),
        bare=True,
    )
