"""Failures by type and code: exceptions of libraries that are here, or known by name alone."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomproof.errors import (
    CudaError,
    MissingDependencyError,
    PlanDoesNotFitError,
    RequestError,
)
from oomproof.faults.classify import classify, classify_exit
from oomproof.faults.fault import Cause, Fault, FaultClass

OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 23.65 GiB of "
    "which 1.32 GiB is free."
)


def named(module: str, name: str, *bases: type[BaseException]) -> type[BaseException]:
    """A type as a library has it that is not installed here."""
    made: type[BaseException] = type(name, bases or (RuntimeError,), {"__module__": module})
    return made


def known(error: BaseException) -> Fault:
    fault = classify(error)
    assert fault is not None
    return fault


@pytest.mark.parametrize("module", ["torch", "torch.cuda"])
def test_torchs_error_is_known_by_its_name_under_either_module(module: str) -> None:
    fault = known(named(module, "OutOfMemoryError")(OOM))
    assert (fault.fault_class, fault.cause) == (FaultClass.SHRINK, Cause.GPU_MEMORY)
    assert fault.evidence.rule == "type"
    assert fault.device == 1
    assert fault.figures.tried_bytes == 2 << 30


def test_a_subclass_counts_as_what_it_is_derived_from() -> None:
    base = named("torch", "OutOfMemoryError")
    assert known(named("myapp", "Wrapped", base)("anything")).cause is Cause.GPU_MEMORY


def test_another_packages_error_of_the_same_name_does_not_count() -> None:
    assert classify(named("myapp", "OutOfMemoryError")("the queue is full")) is None


def test_torchs_own_errors_are_known() -> None:
    torch = pytest.importorskip("torch")
    assert known(torch.OutOfMemoryError(OOM)).cause is Cause.GPU_MEMORY
    error = torch.AcceleratorError("CUDA error: out of memory")
    error.error_code = 2
    assert known(error).fault_class is FaultClass.SHRINK
    assert known(error).evidence.rule == "code"


@pytest.mark.parametrize(
    ("number", "fault_class"),
    [
        (2, FaultClass.SHRINK),
        (46, FaultClass.WAIT),
        (802, FaultClass.WAIT),
        (101, FaultClass.USER),
        (209, FaultClass.USER),
        (701, FaultClass.USER),
        (214, FaultClass.GPU),
        (220, FaultClass.GPU),
        *((n, FaultClass.PROCESS) for n in (226, 700, 702, 710, *range(714, 720), 721, 911, 999)),
        (12345, FaultClass.PROCESS),
    ],
)
def test_an_accelerator_error_is_what_its_number_says_whatever_its_words(
    number: int, fault_class: FaultClass
) -> None:
    error = named("torch", "AcceleratorError")("CUDA error: out of memory")
    error.error_code = number  # type: ignore[attr-defined]
    assert known(error).fault_class is fault_class
    assert known(error).evidence.code == number


def test_an_accelerator_error_without_a_number_goes_by_its_words() -> None:
    made = named("torch", "AcceleratorError")
    assert known(made("CUDA error: out of memory")).fault_class is FaultClass.SHRINK
    assert known(made("CUDA error: device-side assert triggered")).cause is Cause.DEVICE_ASSERT
    assert known(made("something new")).fault_class is FaultClass.PROCESS


@pytest.mark.parametrize(
    ("name", "fault_class"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", FaultClass.SHRINK),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", FaultClass.PROCESS),
        ("CUDA_ERROR_ECC_UNCORRECTABLE", FaultClass.GPU),
        ("CUDA_ERROR_NO_BINARY_FOR_GPU", FaultClass.USER),
        ("CUDA_ERROR_OF_TOMORROW", FaultClass.PROCESS),
    ],
)
def test_our_driver_errors_go_by_cudas_name(name: str, fault_class: FaultClass) -> None:
    assert known(CudaError("cuLaunchKernelEx", name)).fault_class is fault_class


def test_tritons_lack_of_shared_memory_is_no_lack_of_memory() -> None:
    made = named("triton.runtime.errors", "OutOfResources", Exception)
    fault = known(made("out of resource: shared memory, Required: 131072, Hardware limit: 101376."))
    assert (fault.fault_class, fault.cause) == (FaultClass.USER, Cause.ON_CHIP_MEMORY)


@pytest.mark.parametrize(
    ("error", "fault_class", "cause"),
    [
        (MemoryError(), FaultClass.SHRINK, Cause.HOST_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), FaultClass.SHRINK, Cause.HOST_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), FaultClass.USER, Cause.DISK_FULL),
        (RequestError("a prompt of 9 tokens"), FaultClass.USER, Cause.BAD_REQUEST),
        (
            PlanDoesNotFitError("1 GiB missing", shortfall_bytes=1),
            FaultClass.USER,
            Cause.DOES_NOT_FIT,
        ),
        (MissingDependencyError("torch", install="x"), FaultClass.USER, Cause.MISSING_PACKAGE),
        (subprocess.CalledProcessError(-9, "x"), FaultClass.PROCESS, Cause.KILLED),
        (subprocess.CalledProcessError(137, "x"), FaultClass.PROCESS, Cause.KILLED),
        (RuntimeError(OOM), FaultClass.SHRINK, Cause.GPU_MEMORY),
        (RuntimeError("CUDA error: out of memory\nCUDA"), FaultClass.SHRINK, Cause.GPU_MEMORY),
        (IndexError("index out of range in self"), FaultClass.USER, Cause.BAD_INDEX),
    ],
    ids=repr,
)
def test_other_errors_go_by_errno_exit_code_type_or_words(
    error: BaseException, fault_class: FaultClass, cause: Cause
) -> None:
    assert (known(error).fault_class, known(error).cause) == (fault_class, cause)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        KeyError("CUDA error: out of memory"),
        FileNotFoundError(errno.ENOENT, "no such file", "CUDA out of memory.txt"),
        RuntimeError("the prompt 'CUDA out of memory. Tried to allocate 2 GiB' is too long"),
        RuntimeError("the answer follows\nCUDA out of memory. Tried to allocate 2.00 GiB"),
        subprocess.CalledProcessError(1, "x"),
        KeyboardInterrupt(),
        RuntimeError(),
    ],
    ids=repr,
)
def test_what_a_user_wrote_is_no_failure(error: BaseException) -> None:
    assert classify(error) is None


def test_causes_and_contexts_are_followed() -> None:
    oom = named("torch", "OutOfMemoryError")(OOM)
    outer = LookupError("generation failed")
    outer.__cause__ = RuntimeError("step 7 failed")
    outer.__cause__.__context__ = oom
    assert known(outer).cause is Cause.GPU_MEMORY
    assert known(outer).evidence.depth == 2


def test_a_suppressed_context_is_not_followed() -> None:
    outer = LookupError("no such model")
    outer.__context__ = named("torch", "OutOfMemoryError")(OOM)
    outer.__suppress_context__ = True
    assert classify(outer) is None


def test_a_fatal_failure_behind_another_counts_before_it() -> None:
    assert_ = named("torch", "AcceleratorError")("CUDA error: device-side assert triggered")
    assert_.error_code = 710  # type: ignore[attr-defined]
    outer = named("torch", "OutOfMemoryError")(OOM)
    outer.__context__ = assert_
    assert known(outer).fault_class is FaultClass.PROCESS
    assert known(outer).evidence.depth == 1


def test_the_outermost_of_two_that_are_not_fatal_counts() -> None:
    outer = MemoryError()
    outer.__context__ = named("torch", "OutOfMemoryError")(OOM)
    assert known(outer).cause is Cause.HOST_MEMORY


def test_groups_and_what_wrappers_keep_are_followed() -> None:
    oom = named("torch", "OutOfMemoryError")(OOM)
    assert known(ExceptionGroup("two", [ValueError("x"), RuntimeError(OOM)])).cause
    wrapped = named("torch._dynamo.exc", "BackendCompilerFailed")("backend='inductor' raised:")
    wrapped.inner_exception = oom  # type: ignore[attr-defined]
    assert known(wrapped).cause is Cause.GPU_MEMORY


def test_a_workers_traceback_in_a_message_is_read() -> None:
    error = RuntimeError(
        "Caught OutOfMemoryError in replica 1 on device 1.\nOriginal Traceback (most recent call "
        f'last):\n  File "a.py", line 1, in f\n    g()\ntorch.OutOfMemoryError: {OOM}\n'
    )
    assert known(error).cause is Cause.GPU_MEMORY
    assert known(error).figures.total_bytes is not None


def test_a_circle_of_causes_ends() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert classify(first) is None
    deep: BaseException = named("torch", "OutOfMemoryError")(OOM)
    for _ in range(40):
        outer = RuntimeError("outer")
        outer.__cause__ = deep
        deep = outer
    assert known(deep).evidence.depth == 40


def test_an_error_that_cannot_be_printed_does_not_raise() -> None:
    class BrokenError(RuntimeError):
        def __str__(self) -> str:
            raise ValueError("no words")

    assert classify(BrokenError()) is None


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (-9, Cause.KILLED),
        (137, Cause.KILLED),
        (-11, Cause.CRASHED),
        (134, Cause.CRASHED),
        (135, Cause.CRASHED),
    ],
)
def test_an_exit_by_a_deadly_signal_is_fatal_for_the_process(code: int, cause: Cause) -> None:
    fault = classify_exit(code)
    assert fault is not None
    assert (fault.fault_class, fault.cause, fault.evidence.code) == (
        FaultClass.PROCESS,
        cause,
        code,
    )


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130, -2, -15, 143, 128, 10**9, -(10**9)])
def test_an_exit_of_its_own_or_on_request_is_none(code: int) -> None:
    assert classify_exit(code) is None


@given(st.text(), st.sampled_from([RuntimeError, ValueError, MemoryError, OSError, Exception]))
def test_no_exception_raises(message: str, kind: type[Exception]) -> None:
    classify(kind(message))


def test_a_fault_survives_the_way_from_a_worker_and_becomes_json() -> None:
    fault = known(RuntimeError(OOM))
    assert pickle.loads(pickle.dumps(fault)) == fault
    plain = fault.as_dict()
    assert plain["class"] == "shrink-and-retry"
    assert plain["figures"]["tried_bytes"] == 2 << 30
    assert fault.figures.known


def test_classifying_imports_nothing_heavy() -> None:
    script = (
        "import sys; from oomproof.faults.classify import classify; "
        "assert classify(RuntimeError('CUDA error: out of memory')); "
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers', 'rich', 'typer'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
