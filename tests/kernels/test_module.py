"""Loading and launching, with a driver that writes down what it is asked for."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oomproof.errors import CudaError, MissingDependencyError
from oomproof.kernels import cache, module, source
from oomproof.kernels.module import Kernel, Launch, launch, load_modules
from oomproof.kernels.source import Source, Variant
from tests.kernels.programs import SCALE, Params, needs_nvrtc

pytestmark = needs_nvrtc

VARIANTS = tuple(Variant(defines={"FACTOR": factor}) for factor in (1, 2))
SCALES = Source(path="scale.cu", headers=("params.cuh",), variants=VARIANTS, parameters=(Params,))
ARGUMENTS = Params(2**40, 5, 0.5, 7, (ctypes.c_int64 * 2)(8, 9), 3)


class FakeDriver:
    """cuda.bindings.driver with NVIDIA's types, and calls that are noted and answer `result`."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._types = driver
        self.calls: list[tuple[Any, ...]] = []
        self.result = driver.CUresult.CUDA_SUCCESS
        self.device = 0
        self.parameter_bytes = ctypes.sizeof(Params)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._types, name)

    def _answer(self, *call: Any, values: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        self.calls.append(call)
        return (self.result, *values)

    def cuLibraryLoadData(self, image: bytes, *options: object) -> tuple[Any, ...]:  # noqa: N802
        assert options == (None, None, 0, None, None, 0)
        return self._answer("load", image, values=(object(),))

    def cuLibraryGetKernel(self, library: object, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        return self._answer("kernel", name, values=(self._types.CUkernel(0x1234),))

    def cuDriverGetVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return (self.result, 13000)

    def cuKernelGetParamInfo(self, kernel: object, index: int) -> tuple[Any, ...]:  # noqa: N802
        return (self.result, 0, self.parameter_bytes)

    def cuKernelGetFunction(self, kernel: int) -> tuple[Any, ...]:  # noqa: N802
        return self._answer("function", kernel, values=(object(),))

    def cuCtxGetDevice(self) -> tuple[Any, ...]:  # noqa: N802
        return (self.result, self._types.CUdevice(self.device))

    def cuKernelSetAttribute(  # noqa: N802
        self, attribute: Any, value: int, kernel: int, device: int
    ) -> tuple[Any, ...]:
        return self._answer(attribute.name, value, kernel, device)

    def cuLaunchKernelEx(  # noqa: N802
        self, config: Any, function: Any, parameters: int, extra: int
    ) -> tuple[Any, ...]:
        [address] = (ctypes.c_uint64 * 1).from_address(parameters)
        return self._answer(
            "launch",
            (config.gridDimX, config.gridDimY, config.gridDimZ),
            (config.blockDimX, config.blockDimY, config.blockDimZ),
            config.sharedMemBytes,
            int(config.hStream),
            [
                (attribute.id.name, attribute.value.programmaticStreamSerializationAllowed)
                for attribute in config.attrs[: config.numAttrs]
            ],
            int(function),
            ctypes.string_at(address, ctypes.sizeof(Params)),
        )


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    fake = FakeDriver()
    for name, text in ((SCALE.name, SCALE.text), *SCALE.headers.items()):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(source, "files", lambda package: tmp_path)
    monkeypatch.setattr(module, "_driver", lambda: fake)
    monkeypatch.setattr(module, "_LOADED", {})
    monkeypatch.setattr(cache, "cache_folder", lambda: None)
    source._read.cache_clear()
    yield fake
    source._read.cache_clear()


def scale(capability: tuple[int, int] = (9, 0)) -> Kernel:
    [loaded] = load_modules(SCALES, VARIANTS[:1], capability)
    return loaded.kernel("scale", Params)


def test_a_variant_is_loaded_once_a_process_and_capability(driver: FakeDriver) -> None:
    first, second = load_modules(SCALES, VARIANTS, (9, 0))
    assert load_modules(SCALES, VARIANTS[::-1], (9, 0)) == [second, first]
    assert first is not second
    assert [call[0] for call in driver.calls] == ["load", "load"]
    assert all(call[1].startswith(b"\x7fELF") for call in driver.calls)
    [other] = load_modules(SCALES, VARIANTS[:1], (8, 0))
    assert other is not first
    assert first.name == "scale.cu (FACTOR=1)"


def test_a_launch_says_what_it_was_told(driver: FakeDriver) -> None:
    kernel = scale()
    driver.calls.clear()
    launch(kernel, (5, 6, 7), (128, 2, 1), 0, ARGUMENTS, 0xABC)
    assert driver.calls == [
        ("launch", (5, 6, 7), (128, 2, 1), 0, 0xABC, [], 0x1234, bytes(ARGUMENTS))
    ]


def test_a_launch_that_is_described_once_goes_to_any_stream(driver: FakeDriver) -> None:
    again = Launch(scale(), (5, 1, 1), (32, 1, 1), 0, ARGUMENTS, dependent=True)
    driver.calls.clear()
    for stream in (0, 0xABC, 0xABC):
        again.put_on(stream)
    assert [call[4] for call in driver.calls] == [0, 0xABC, 0xABC]
    launch(scale(), (5, 1, 1), (32, 1, 1), 0, ARGUMENTS, 0xABC, dependent=True)
    assert driver.calls[-1] == driver.calls[-3]
    driver.result = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        again.put_on(0)


def test_a_dependent_launch_says_so_where_the_gpu_can(driver: FakeDriver) -> None:
    attribute = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
    for capability, expected in (((9, 0), [(attribute, 1)]), ((12, 0), [(attribute, 1)])):
        launch(scale(capability), (1, 1, 1), (32, 1, 1), 0, ARGUMENTS, 0, dependent=True)
        assert driver.calls[-1][5] == expected
    launch(scale((8, 9)), (1, 1, 1), (32, 1, 1), 0, ARGUMENTS, 0, dependent=True)
    assert driver.calls[-1][5] == []


def test_blocks_form_clusters_where_the_gpu_can(driver: FakeDriver) -> None:
    launch(scale(), (8, 1, 1), (32, 1, 1), 0, ARGUMENTS, 0, dependent=True, cluster=4)
    assert [name for name, _ in driver.calls[-1][5]] == [
        "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
        "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION",
    ]
    [attribute] = module._launch_attributes(False, 4)
    # The id and its padding, then the value: blocks in x, y and z.
    assert list((ctypes.c_uint32 * 5).from_address(attribute.getPtr())) == [4, 0, 4, 1, 1]
    launch(scale((8, 9)), (8, 1, 1), (32, 1, 1), 0, ARGUMENTS, 0, cluster=4)
    assert driver.calls[-1][5] == []


def test_shared_memory_is_allowed_once_a_device_and_never_lowered(driver: FakeDriver) -> None:
    kernel = scale()
    driver.calls.clear()
    for device, shared_bytes in ((0, 60000), (0, 60000), (0, 50000), (1, 50000), (0, 70000)):
        driver.device = device
        launch(kernel, (1, 1, 1), (32, 1, 1), shared_bytes, ARGUMENTS, 0)
    attribute = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    assert [call for call in driver.calls if call[0] == attribute] == [
        (attribute, 60000, 0x1234, 0),
        (attribute, 50000, 0x1234, 1),
        (attribute, 70000, 0x1234, 0),
    ]


def test_a_prepared_kernel_only_launches(driver: FakeDriver) -> None:
    kernel = scale()
    kernel.prepare(60000)
    assert ("function", 0x1234) in driver.calls
    driver.calls.clear()
    launch(kernel, (1, 1, 1), (32, 1, 1), 60000, ARGUMENTS, 0)
    assert [call[0] for call in driver.calls] == ["launch"]


def test_parameters_of_another_size_are_our_own_mistake(driver: FakeDriver) -> None:
    driver.parameter_bytes = 56
    with pytest.raises(AssertionError, match="scale takes 56 bytes, Params has 48"):
        scale()


def test_what_the_driver_refuses_has_cudas_name_and_a_remedy(driver: FakeDriver) -> None:
    kernel = scale()
    driver.result = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(CudaError) as caught:
        launch(kernel, (1, 1, 1), (32, 1, 1), 0, ARGUMENTS, 0)
    assert caught.value.name == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert str(caught.value) == "scale.cu (FACTOR=1): scale: CUDA_ERROR_ILLEGAL_ADDRESS"
    driver.result = driver.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    with pytest.raises(CudaError, match=r"^cuLibraryLoadData.*: update the NVIDIA driver$"):
        load_modules(SCALES, VARIANTS[1:], (9, 0))


def test_nothing_is_remembered_of_a_library_that_did_not_load(driver: FakeDriver) -> None:
    driver.result = driver.CUresult.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(CudaError):
        scale()
    driver.result = driver.CUresult.CUDA_SUCCESS
    assert scale().capability == (9, 0)


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setitem(
        sys.modules,
        "cuda.bindings",
        SimpleNamespace(driver=SimpleNamespace(cuInit=fail)),
    )
    with pytest.raises(CudaError, match=r"libcuda\.so\.1.*: install the NVIDIA driver"):
        module._driver.__wrapped__()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match="cuda-bindings"):
        module._driver.__wrapped__()
