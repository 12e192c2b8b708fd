"""CUDA's errors by number: held against the enumerations that CUDA's own bindings bring."""

from __future__ import annotations

import pytest

from oomproof.faults.codes import code_of_name, code_of_text, codes, cuda_code, xid
from oomproof.faults.fault import Cause, FaultClass


def test_numbers_and_names_are_the_drivers() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    names = {int(code): code.name for code in driver.CUresult}
    for code in codes():
        if code.driver_name is not None:
            assert names[code.number] == code.driver_name


def test_numbers_and_names_are_the_runtimes() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = {int(code): code.name for code in runtime.cudaError_t}
    for code in codes():
        assert names[code.number] == code.name


def test_the_words_are_what_cuda_prints() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    try:
        texts = {
            code.number: runtime.cudaGetErrorString(runtime.cudaError_t(code.number))[1].decode()
            for code in codes()
        }
    except RuntimeError as error:  # no driver to ask
        pytest.skip(str(error))
    assert {n: t for n, t in texts.items() if t != cuda_code(n).text} == {}


def test_each_number_name_and_text_is_there_once() -> None:
    for values in (
        [code.number for code in codes()],
        [code.name for code in codes()],
        [code.text for code in codes()],
    ):
        assert len(values) == len(set(values))


def test_a_text_is_known_by_its_beginning_and_not_within_a_word() -> None:
    found = code_of_text("out of memory\nCUDA kernel errors")
    assert found is not None
    assert found.number == 2
    assert code_of_text("out of memoryless") is None
    assert code_of_text("") is None


def test_names_of_hip_are_cudas() -> None:
    found = code_of_name("hipErrorOutOfMemory")
    assert found is not None
    assert found.cause is Cause.GPU_MEMORY
    assert code_of_name("CUDA_ERROR_NOTHING") is None


def test_a_number_that_nobody_knows_is_fatal_for_the_process() -> None:
    assert cuda_code(4711).fault_class is FaultClass.PROCESS
    assert xid(4711) is None
