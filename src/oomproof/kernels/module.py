"""Compiled sources on the GPU: loading, and launching with one struct of parameters.

    [module] = load_modules(PRODUCT, [variant], torch.cuda.get_device_capability(device))
    product = module.kernel("product", Params)
    with torch.cuda.device(device):
        product.prepare(shared_bytes)
        launch(product, grid, block, shared_bytes, Params(...), stream, dependent=True)

A library belongs to no device: it is loaded once a process and launched on any GPU of its compute
capability, on the current one, so the caller guards it. Launches may be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from oomproof.errors import CudaError, MissingDependencyError
from oomproof.kernels.cache import images
from oomproof.kernels.source import Program, Source, Variant

HOPPER = (9, 0)
"""From here on a kernel may start before the one in front of it ended, and blocks form clusters."""

_CHANGING = threading.Lock()
_OneParameter = ctypes.c_void_p * 1
_PARAMETER_INFO_DRIVER = 12040
_UPDATE_DRIVER = "update the NVIDIA driver"
_REMEDIES = {
    "CUDA_ERROR_NO_BINARY_FOR_GPU": _UPDATE_DRIVER,
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": _UPDATE_DRIVER,
    "CUDA_ERROR_INVALID_IMAGE": _UPDATE_DRIVER,
    "CUDA_ERROR_INVALID_HANDLE": "launch on a GPU of the compute capability that it was loaded for",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kernel:
    """A kernel of a loaded module, for any GPU of its compute capability."""

    name: str
    """As errors call it: "attend.cu (HEAD_DIM=128): attend"."""
    function: Any
    """The driver's handle."""
    capability: tuple[int, int]
    parameters: type[ctypes.Structure]
    """The one struct that it takes."""
    _shared_bytes: dict[int, int] = field(default_factory=dict)
    """Device → dynamic shared memory that launches on it may ask for by now."""

    def prepare(self, shared_bytes: int = 0) -> None:
        """Loads the kernel onto the current device now, and not at its first launch.

        Args:
            shared_bytes: The most dynamic shared memory that its launches will ask for, a block.

        Raises:
            CudaError: The kernel does not fit the device.
        """
        driver = _driver()
        _check(f"cuKernelGetFunction({self.name})", driver.cuKernelGetFunction(int(self.function)))
        if shared_bytes:
            self._allow(driver, shared_bytes)

    def _allow(self, driver: Any, shared_bytes: int) -> None:
        """Raises what launches on the current device may ask for; above 48 KiB it must be.

        And asks for the largest share of the first cache as shared memory: a multiprocessor takes a
        kernel early only where the one that runs has left room, and with kernels of different
        shares it would drain between them.
        """
        device = int(_check("cuCtxGetDevice", driver.cuCtxGetDevice()))
        if shared_bytes <= self._shared_bytes.get(device, 0):
            return
        attributes = driver.CUfunction_attribute
        share = int(driver.CUshared_carveout.CU_SHAREDMEM_CARVEOUT_MAX_SHARED)
        with _CHANGING:
            allowed = max(shared_bytes, self._shared_bytes.get(device, 0))
            for attribute, value in (
                (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, allowed),
                (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, share),
            ):
                _check(
                    f"cuKernelSetAttribute({self.name}, {allowed} bytes of shared memory)",
                    driver.cuKernelSetAttribute(attribute, value, int(self.function), device),
                )
            self._shared_bytes[device] = allowed


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Module:
    """One variant of a source, loaded."""

    name: str
    capability: tuple[int, int]
    """Compute capability that it was compiled for."""
    library: Any
    """The driver's handle."""

    def kernel(self, name: str, parameters: type[ctypes.Structure]) -> Kernel:
        """An `extern "C"` kernel that takes one struct, `const __grid_constant__`.

        Raises:
            CudaError: There is no such kernel.
        """
        driver = _driver()
        full_name = f"{self.name}: {name}"
        handle = _check(
            f"cuLibraryGetKernel({full_name})",
            driver.cuLibraryGetKernel(self.library, name.encode()),
        )
        if _check("cuDriverGetVersion", driver.cuDriverGetVersion()) >= _PARAMETER_INFO_DRIVER:
            call = f"cuKernelGetParamInfo({full_name})"
            _, size = _check(call, driver.cuKernelGetParamInfo(handle, 0))
            assert size == ctypes.sizeof(parameters), (
                f"{full_name} takes {size} bytes, {parameters.__name__} has "
                f"{ctypes.sizeof(parameters)}"
            )
        return Kernel(
            name=full_name,
            # Every launch takes a kernel where it takes a function; the binding wants it cast.
            function=driver.CUfunction(int(handle)),
            capability=self.capability,
            parameters=parameters,
        )


_LOADED: dict[tuple[str, str, tuple[int, int]], Module] = {}
_LOADING = threading.Lock()


def load_modules(
    source: Source, variants: Sequence[Variant], capability: tuple[int, int]
) -> list[Module]:
    """The variants of a source, each compiled (or read) and loaded once a process.

    Raises:
        CudaError: The driver refuses the machine code.
        KernelCompileError: NVRTC refuses the source.
        MissingDependencyError: NVRTC, or Python's way to it, is not installed.
        NotRunnableError: NVRTC knows no architecture that such a GPU runs.
    """
    programs = [source.program(variant) for variant in variants]
    keys = [(source.path, str(program), capability) for program in programs]
    with _LOADING:
        missing = {
            key: program for key, program in zip(keys, programs, strict=True) if key not in _LOADED
        }
        made = images(list(missing.values()), capability) if missing else []
        for (key, program), image in zip(missing.items(), made, strict=True):
            _LOADED[key] = _load(program, image, capability)
        return [_LOADED[key] for key in keys]


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    arguments: ctypes.Structure,
    stream: int,
    *,
    dependent: bool = False,
    cluster: int = 1,
) -> None:
    """Puts a kernel on a stream of the current device.

    Args:
        kernel: What to launch.
        grid: Blocks in x, y, z.
        block: Threads in x, y, z.
        shared_bytes: Dynamic shared memory, a block's.
        arguments: Its parameters; they are copied before this returns.
        stream: `torch.cuda.current_stream().cuda_stream`.
        dependent: It may start before the kernel in front of it has ended (programmatic dependent
            launch), and waits for it by itself; without effect below compute capability 9.0.
        cluster: Neighbouring blocks in x that see each other's shared memory, of which the grid has
            whole ones; at most 8 run everywhere. Below 9.0 each block is alone.

    Raises:
        CudaError: The driver refuses the launch, or an earlier kernel has failed.
    """
    Launch(
        kernel, grid, block, shared_bytes, arguments, dependent=dependent, cluster=cluster
    ).put_on(stream)


class Launch:
    """What `launch` puts on a stream, made once for many times with the same parameters.

    Most of what a launch takes on the CPU is to describe it. Arguments are as `launch` takes them.
    """

    __slots__ = ("_arguments", "_config", "_kernel", "_pointer", "_stream")

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: ctypes.Structure,
        *,
        dependent: bool = False,
        cluster: int = 1,
    ) -> None:
        assert type(arguments) is kernel.parameters, f"{kernel.name} takes {kernel.parameters}"
        driver = _driver()
        if shared_bytes:
            kernel._allow(driver, shared_bytes)  # noqa: SLF001 - a kernel's own launch
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared_bytes
        if (dependent or cluster > 1) and kernel.capability >= HOPPER:
            attributes = _launch_attributes(dependent, cluster)
            config.attrs = attributes
            config.numAttrs = len(attributes)
        self._kernel, self._config, self._arguments = kernel, config, arguments
        self._pointer = _OneParameter(ctypes.addressof(arguments))
        self._stream: int | None = None

    def put_on(self, stream: int) -> None:
        """Launches it.

        Raises:
            CudaError: The driver refuses the launch, or an earlier kernel has failed.
        """
        if stream != self._stream:
            self._config.hStream = self._stream = stream
        pointer = ctypes.addressof(self._pointer)
        answer = _driver().cuLaunchKernelEx(self._config, self._kernel.function, pointer, 0)
        _check(self._kernel.name, answer)


def _load(program: Program, image: bytes, capability: tuple[int, int]) -> Module:
    driver = _driver()
    answer = driver.cuLibraryLoadData(image, None, None, 0, None, None, 0)
    name = str(program)
    library = _check(f"cuLibraryLoadData({name})", answer)
    return Module(name=name, capability=capability, library=library)


@cache
def _driver() -> Any:
    """cuda.bindings.driver, with the driver started."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise MissingDependencyError(
            "cuda-bindings", install="pip install 'oomproof[run]'"
        ) from None
    try:
        answer = driver.cuInit(0)
    except RuntimeError as error:
        raise CudaError(
            f"cuInit ({error})", "CUDA_ERROR_NO_DEVICE", remedy="install the NVIDIA driver"
        ) from None
    _check("cuInit", answer)
    return driver


@cache
def _launch_attributes(dependent: bool, cluster: int) -> tuple[Any, ...]:
    driver = _driver()
    attributes = []
    if dependent:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        attributes.append(early)
    if cluster > 1:
        size = driver.CUlaunchAttribute()
        size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        blocks = size.value.clusterDim
        blocks.x, blocks.y, blocks.z = cluster, 1, 1
        size.value.clusterDim = blocks
        attributes.append(size)
    return tuple(attributes)


def _check(call: str, answer: tuple[Any, ...]) -> Any:
    """The values of a call of the driver's that went well."""
    result, *values = answer
    if result.value != 0:
        raise CudaError(call, result.name, remedy=_REMEDIES.get(result.name))
    return values[0] if len(values) == 1 else tuple(values)
