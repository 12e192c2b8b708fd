"""The value that a failure is classified into."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any


class FaultClass(StrEnum):
    """What can be done about a failure (docs/2-running.md)."""

    SHRINK = "shrink-and-retry"
    """The context is sound; less memory, then once more."""
    WAIT = "wait-and-retry"
    """Something else holds what is needed; later, in a fresh process."""
    PROCESS = "fatal-for-the-process"
    """Every later CUDA call of the process fails too; a fresh one works."""
    GPU = "fatal-for-the-gpu"
    """No process works there until somebody has looked at the GPU."""
    USER = "the-users"
    """The call, the installation or the machine has to change; no retry helps."""


class Cause(StrEnum):
    """What failed."""

    GPU_MEMORY = "gpu-memory"
    LIBRARY_MEMORY = "library-memory"
    """cuBLAS, cuDNN, cuSOLVER, cuSPARSE or cuFFT found no memory for itself."""
    NCCL_MEMORY = "nccl-memory"
    KV_CACHE = "kv-cache"
    """An engine has no room for the KV cache it was asked for."""
    MODULES_ON_CPU = "modules-on-cpu"
    """A device map left modules of a quantized model to the CPU or the disk."""
    DOES_NOT_FIT = "does-not-fit"
    """A plan needs more than there is."""
    HOST_MEMORY = "host-memory"
    SHARED_MEMORY_FILES = "shared-memory-files"
    """The files that processes share memory through, under /dev/shm, have no room."""
    KILLED = "killed"
    """SIGKILL: nearly always the kernel's out-of-memory killer."""
    KILLED_FOR_MEMORY = "killed-for-memory"
    """The kernel, or the container's runtime, says so itself."""
    CRASHED = "crashed"
    """Another deadly signal: SIGABRT, SIGBUS, SIGSEGV."""
    DISK_FULL = "disk-full"
    GPU_BUSY = "gpu-busy"
    GPU_TAKEN = "gpu-taken"
    """Other processes hold the memory that an engine was promised."""
    SYSTEM_NOT_READY = "system-not-ready"
    ILLEGAL_ACCESS = "illegal-access"
    DEVICE_ASSERT = "device-assert"
    LAUNCH_FAILURE = "launch-failure"
    LAUNCH_TIMEOUT = "launch-timeout"
    CONTEXT_LOST = "context-lost"
    FORKED = "forked"
    """CUDA was started before a fork."""
    LIBRARY = "library"
    """cuBLAS and its like failed, and not for memory."""
    NCCL = "nccl"
    UNKNOWN_CUDA = "unknown-cuda"
    ECC = "ecc"
    NVLINK = "nvlink"
    GPU_LOST = "gpu-lost"
    ON_CHIP_MEMORY = "on-chip-memory"
    """A kernel asks for more shared memory or registers than the GPU has: no matter of its RAM."""
    NO_KERNEL = "no-kernel"
    """The build has no machine code for the GPU."""
    DRIVER = "driver"
    """The driver is too old for the CUDA of the build, or does not belong to it."""
    NO_GPU = "no-gpu"
    CPU_BUILD = "cpu-build"
    BITSANDBYTES = "bitsandbytes"
    MISSING_PACKAGE = "missing-package"
    WRONG_DEVICE = "wrong-device"
    BAD_INDEX = "bad-index"
    CAPTURE = "capture"
    BAD_CALL = "bad-call"
    BAD_REQUEST = "bad-request"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """Why a failure is what it is said to be."""

    rule: str
    """Which rule matched: "type", "code", "exit", or the name of a rule of texts.py."""
    text: str = ""
    """The words that matched, one line, at most 300 characters."""
    code: int | None = None
    """CUDA's number of the error, an Xid, an errno, or an exit code; the rule says which."""
    code_name: str | None = None
    """CUDA's name of the error: "cudaErrorIllegalAddress"."""
    depth: int = 0
    """Steps along the chain of causes, 0 for the exception itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFigures:
    """Bytes that a message names; None where it does not."""

    tried_bytes: int | None = None
    """What could not be allocated."""
    total_bytes: int | None = None
    """The device's memory, as CUDA sees it."""
    free_bytes: int | None = None
    allocated_bytes: int | None = None
    """In tensors of torch, private pools of CUDA graphs with them."""
    reserved_bytes: int | None = None
    """Held by torch's allocator: tensors and what it keeps for later ones."""
    pools_bytes: int | None = None
    """In private pools of CUDA graphs, part of allocated_bytes."""
    process_bytes: int | None = None
    """Held by this process: torch's, the CUDA context, libraries."""
    other_bytes: int | None = None
    """Held by other processes that the message lists."""
    allowed_bytes: int | None = None
    """The limit of set_per_process_memory_fraction, or MPS's high watermark."""

    @property
    def idle_bytes(self) -> int | None:
        """What torch holds without a tensor in it."""
        if self.reserved_bytes is None or self.allocated_bytes is None:
            return None
        return max(0, self.reserved_bytes - self.allocated_bytes)

    @property
    def known(self) -> bool:
        """Whether any figure was read."""
        return any(getattr(self, one.name) is not None for one in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One failure, classified."""

    fault_class: FaultClass
    cause: Cause
    evidence: Evidence
    figures: MemoryFigures = field(default_factory=MemoryFigures)
    device: int | None = None
    """Index of the GPU, where the message names it."""

    def at_depth(self, depth: int) -> Fault:
        """The same, found that many steps along a chain of causes."""
        return replace(self, evidence=replace(self.evidence, depth=depth))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "class": self.fault_class.value,
            "cause": self.cause.value,
            "evidence": asdict(self.evidence),
            "figures": asdict(self.figures),
            "device": self.device,
        }
