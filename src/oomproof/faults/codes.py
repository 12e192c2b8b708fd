"""CUDA's errors by number, and what each means for the process.

Numbers, names and meanings are those of CUDA's own enumeration (cudaError_t; CUresult has the same
numbers). It says of 700, 702, 714 to 719, 721, 226 and 911 that the process must be terminated and
launched again, and of 710 that all its allocations are invalid. What the table does not have counts
as fatal for the process: going on in an unknown state gives wrong answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from oomproof.faults.fault import Cause, FaultClass

_SHRINK, _WAIT = FaultClass.SHRINK, FaultClass.WAIT
_PROCESS, _GPU, _USER = FaultClass.PROCESS, FaultClass.GPU, FaultClass.USER


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaCode:
    """One error of CUDA's."""

    number: int
    name: str
    """The runtime's: "cudaErrorMemoryAllocation"."""
    driver_name: str | None
    """The driver's: "CUDA_ERROR_OUT_OF_MEMORY"; None where it has none of that number."""
    text: str
    """What cudaGetErrorString prints; "" where the name has to do."""
    fault_class: FaultClass
    cause: Cause


# fmt: off
_TABLE: tuple[tuple[int, str, str, str, FaultClass, Cause], ...] = (
    (1, "cudaErrorInvalidValue", "CUDA_ERROR_INVALID_VALUE",
     "invalid argument", _USER, Cause.BAD_CALL),
    (2, "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY",
     "out of memory", _SHRINK, Cause.GPU_MEMORY),
    (3, "cudaErrorInitializationError", "CUDA_ERROR_NOT_INITIALIZED",
     "initialization error", _PROCESS, Cause.CONTEXT_LOST),
    (4, "cudaErrorCudartUnloading", "CUDA_ERROR_DEINITIALIZED",
     "driver shutting down", _PROCESS, Cause.CONTEXT_LOST),
    (9, "cudaErrorInvalidConfiguration", "",
     "invalid configuration argument", _USER, Cause.BAD_CALL),
    (34, "cudaErrorStubLibrary", "CUDA_ERROR_STUB_LIBRARY",
     "CUDA driver is a stub library", _USER, Cause.DRIVER),
    (35, "cudaErrorInsufficientDriver", "",
     "CUDA driver version is insufficient for CUDA runtime version", _USER, Cause.DRIVER),
    (36, "cudaErrorCallRequiresNewerDriver", "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER",
     "API call is not supported in the installed CUDA driver", _USER, Cause.DRIVER),
    (46, "cudaErrorDevicesUnavailable", "CUDA_ERROR_DEVICE_UNAVAILABLE",
     "CUDA-capable device(s) is/are busy or unavailable", _WAIT, Cause.GPU_BUSY),
    (98, "cudaErrorInvalidDeviceFunction", "",
     "invalid device function", _USER, Cause.NO_KERNEL),
    (100, "cudaErrorNoDevice", "CUDA_ERROR_NO_DEVICE",
     "no CUDA-capable device is detected", _USER, Cause.NO_GPU),
    (101, "cudaErrorInvalidDevice", "CUDA_ERROR_INVALID_DEVICE",
     "invalid device ordinal", _USER, Cause.NO_GPU),
    (200, "cudaErrorInvalidKernelImage", "CUDA_ERROR_INVALID_IMAGE",
     "device kernel image is invalid", _USER, Cause.NO_KERNEL),
    (201, "cudaErrorDeviceUninitialized", "CUDA_ERROR_INVALID_CONTEXT",
     "invalid device context", _PROCESS, Cause.CONTEXT_LOST),
    (209, "cudaErrorNoKernelImageForDevice", "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device", _USER, Cause.NO_KERNEL),
    (214, "cudaErrorECCUncorrectable", "CUDA_ERROR_ECC_UNCORRECTABLE",
     "uncorrectable ECC error encountered", _GPU, Cause.ECC),
    (216, "cudaErrorDeviceAlreadyInUse", "CUDA_ERROR_CONTEXT_ALREADY_IN_USE",
     "exclusive-thread device already in use by a different thread", _WAIT, Cause.GPU_BUSY),
    (218, "cudaErrorInvalidPtx", "CUDA_ERROR_INVALID_PTX",
     "a PTX JIT compilation failed", _USER, Cause.NO_KERNEL),
    (220, "cudaErrorNvlinkUncorrectable", "CUDA_ERROR_NVLINK_UNCORRECTABLE",
     "uncorrectable NVLink error detected during the execution", _GPU, Cause.NVLINK),
    (222, "cudaErrorUnsupportedPtxVersion", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain.", _USER, Cause.DRIVER),
    (226, "cudaErrorContained", "CUDA_ERROR_CONTAINED",
     "Invalid access of peer GPU memory over nvlink or a hardware error",
     _PROCESS, Cause.ILLEGAL_ACCESS),
    (304, "cudaErrorOperatingSystem", "CUDA_ERROR_OPERATING_SYSTEM",
     "OS call failed or operation not supported on this OS", _PROCESS, Cause.UNKNOWN_CUDA),
    (400, "cudaErrorInvalidResourceHandle", "CUDA_ERROR_INVALID_HANDLE",
     "invalid resource handle", _USER, Cause.BAD_CALL),
    (500, "cudaErrorSymbolNotFound", "CUDA_ERROR_NOT_FOUND",
     "named symbol not found", _USER, Cause.BAD_CALL),
    (600, "cudaErrorNotReady", "CUDA_ERROR_NOT_READY",
     "device not ready", _WAIT, Cause.GPU_BUSY),
    (700, "cudaErrorIllegalAddress", "CUDA_ERROR_ILLEGAL_ADDRESS",
     "an illegal memory access was encountered", _PROCESS, Cause.ILLEGAL_ACCESS),
    (701, "cudaErrorLaunchOutOfResources", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch", _USER, Cause.ON_CHIP_MEMORY),
    (702, "cudaErrorLaunchTimeout", "CUDA_ERROR_LAUNCH_TIMEOUT",
     "the launch timed out and was terminated", _PROCESS, Cause.LAUNCH_TIMEOUT),
    (709, "cudaErrorContextIsDestroyed", "CUDA_ERROR_CONTEXT_IS_DESTROYED",
     "context is destroyed", _PROCESS, Cause.CONTEXT_LOST),
    (710, "cudaErrorAssert", "CUDA_ERROR_ASSERT",
     "device-side assert triggered", _PROCESS, Cause.DEVICE_ASSERT),
    (714, "cudaErrorHardwareStackError", "CUDA_ERROR_HARDWARE_STACK_ERROR",
     "hardware stack error", _PROCESS, Cause.LAUNCH_FAILURE),
    (715, "cudaErrorIllegalInstruction", "CUDA_ERROR_ILLEGAL_INSTRUCTION",
     "an illegal instruction was encountered", _PROCESS, Cause.LAUNCH_FAILURE),
    (716, "cudaErrorMisalignedAddress", "CUDA_ERROR_MISALIGNED_ADDRESS",
     "misaligned address", _PROCESS, Cause.ILLEGAL_ACCESS),
    (717, "cudaErrorInvalidAddressSpace", "CUDA_ERROR_INVALID_ADDRESS_SPACE",
     "operation not supported on global/shared address space", _PROCESS, Cause.ILLEGAL_ACCESS),
    (718, "cudaErrorInvalidPc", "CUDA_ERROR_INVALID_PC",
     "invalid program counter", _PROCESS, Cause.LAUNCH_FAILURE),
    (719, "cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED",
     "unspecified launch failure", _PROCESS, Cause.LAUNCH_FAILURE),
    (720, "cudaErrorCooperativeLaunchTooLarge", "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE",
     "too many blocks in cooperative launch", _USER, Cause.BAD_CALL),
    (721, "cudaErrorTensorMemoryLeak", "CUDA_ERROR_TENSOR_MEMORY_LEAK",
     "tensor memory not completely freed", _PROCESS, Cause.LAUNCH_FAILURE),
    (800, "cudaErrorNotPermitted", "CUDA_ERROR_NOT_PERMITTED",
     "operation not permitted", _USER, Cause.BAD_CALL),
    (801, "cudaErrorNotSupported", "CUDA_ERROR_NOT_SUPPORTED",
     "operation not supported", _USER, Cause.BAD_CALL),
    (802, "cudaErrorSystemNotReady", "CUDA_ERROR_SYSTEM_NOT_READY",
     "system not yet initialized", _WAIT, Cause.SYSTEM_NOT_READY),
    (803, "cudaErrorSystemDriverMismatch", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
     "system has unsupported display driver / cuda driver combination", _USER, Cause.DRIVER),
    (804, "cudaErrorCompatNotSupportedOnDevice", "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
     "forward compatibility was attempted on non supported HW", _USER, Cause.DRIVER),
    (805, "cudaErrorMpsConnectionFailed", "CUDA_ERROR_MPS_CONNECTION_FAILED",
     "MPS client failed to connect to the MPS control daemon or the MPS server",
     _WAIT, Cause.GPU_BUSY),
    (806, "cudaErrorMpsRpcFailure", "CUDA_ERROR_MPS_RPC_FAILURE",
     "the remote procedural call between the MPS server and the MPS client failed",
     _PROCESS, Cause.CONTEXT_LOST),
    (807, "cudaErrorMpsServerNotReady", "CUDA_ERROR_MPS_SERVER_NOT_READY",
     "MPS server is not ready to accept new MPS client requests", _WAIT, Cause.GPU_BUSY),
    (808, "cudaErrorMpsMaxClientsReached", "CUDA_ERROR_MPS_MAX_CLIENTS_REACHED",
     "the hardware resources required to create MPS client have been exhausted",
     _WAIT, Cause.GPU_BUSY),
    (809, "cudaErrorMpsMaxConnectionsReached", "CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED",
     "the hardware resources required to support device connections have been exhausted",
     _WAIT, Cause.GPU_BUSY),
    (810, "cudaErrorMpsClientTerminated", "CUDA_ERROR_MPS_CLIENT_TERMINATED",
     "the MPS client has been terminated by the server", _PROCESS, Cause.CONTEXT_LOST),
    (900, "cudaErrorStreamCaptureUnsupported", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing", _USER, Cause.CAPTURE),
    (901, "cudaErrorStreamCaptureInvalidated", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture", _USER, Cause.CAPTURE),
    (906, "cudaErrorStreamCaptureImplicit", "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream",
     _USER, Cause.CAPTURE),
    (909, "cudaErrorTimeout", "CUDA_ERROR_TIMEOUT",
     "wait operation timed out", _PROCESS, Cause.LAUNCH_TIMEOUT),
    (911, "cudaErrorExternalDevice", "CUDA_ERROR_EXTERNAL_DEVICE",
     "an async error has occured in external entity outside of CUDA",
     _PROCESS, Cause.LAUNCH_FAILURE),
    (999, "cudaErrorUnknown", "CUDA_ERROR_UNKNOWN",
     "unknown error", _PROCESS, Cause.UNKNOWN_CUDA),
)

_XIDS: dict[int, tuple[FaultClass, Cause]] = {
    13: (_PROCESS, Cause.LAUNCH_FAILURE),    # graphics engine exception
    31: (_PROCESS, Cause.ILLEGAL_ACCESS),    # memory page fault
    43: (_PROCESS, Cause.LAUNCH_FAILURE),    # GPU stopped processing
    45: (_PROCESS, Cause.CONTEXT_LOST),      # preemptive cleanup, after another error
    48: (_GPU, Cause.ECC),                   # double-bit ECC error
    62: (_GPU, Cause.GPU_LOST),              # internal micro-controller halt
    64: (_GPU, Cause.ECC),                   # row remapping failed
    74: (_GPU, Cause.NVLINK),                # NVLink error
    79: (_GPU, Cause.GPU_LOST),              # fallen off the bus
    92: (_GPU, Cause.ECC),                   # high rate of single-bit ECC errors
    94: (_PROCESS, Cause.ECC),               # contained ECC error: only its process is lost
    95: (_GPU, Cause.ECC),                   # uncontained ECC error
    119: (_GPU, Cause.GPU_LOST),             # GSP does not answer
    120: (_GPU, Cause.GPU_LOST),             # GSP error
    140: (_GPU, Cause.ECC),                  # unrecovered ECC error
}
# fmt: on


def cuda_code(number: int) -> CudaCode:
    """CUDA's error of that number; one that we do not know is fatal for the process."""
    return _by_number().get(number) or CudaCode(
        number=number,
        name="",
        driver_name=None,
        text="",
        fault_class=_PROCESS,
        cause=Cause.UNKNOWN_CUDA,
    )


def code_of_name(name: str) -> CudaCode | None:
    """The error of a name of the runtime's or the driver's, HIP's too: "hipErrorOutOfMemory"."""
    return _by_name().get(name) or _by_name().get(name.replace("hipError", "cudaError", 1))


def code_of_text(text: str) -> CudaCode | None:
    """The error whose cudaGetErrorString a text begins with, None where none is."""
    return next((code for code in _longest_first() if _begins(text, code.text)), None)


def codes() -> tuple[CudaCode, ...]:
    """Every error of the table."""
    return tuple(_by_number().values())


def xid(number: int) -> tuple[FaultClass, Cause] | None:
    """What NVIDIA's driver means by an Xid, None for one that tells nothing by itself."""
    return _XIDS.get(number)


def _begins(text: str, words: str) -> bool:
    if not text.startswith(words):
        return False
    rest = text[len(words) :]
    # "invalid argument" and not "invalid arguments of the user's prompt". From torch 2.9 on the
    # next sentence follows without a blank in some front ends: "out of memorySearch for".
    return not rest or not rest[0].isalnum() or rest.startswith("Search for")


@cache
def _by_number() -> dict[int, CudaCode]:
    return {code.number: code for code in _read()}


@cache
def _by_name() -> dict[str, CudaCode]:
    names = {code.name: code for code in _by_number().values()}
    drivers = {code.driver_name: code for code in _by_number().values() if code.driver_name}
    return {**names, **drivers, "cudaErrorOutOfMemory": cuda_code(2)}


@cache
def _longest_first() -> tuple[CudaCode, ...]:
    return tuple(sorted(_by_number().values(), key=lambda code: -len(code.text)))


def _read() -> Iterator[CudaCode]:
    for number, name, driver_name, text, fault_class, cause in _TABLE:
        yield CudaCode(
            number=number,
            name=name,
            driver_name=driver_name or None,
            text=text,
            fault_class=fault_class,
            cause=cause,
        )
