"""Failures by their words: every form in data/, near misses, and text of any kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.faults.classify import RULES, classify_text
from oomproof.faults.fault import Cause, Fault
from oomproof.faults.figures import read_device, read_figures
from oomproof.faults.line import strip_prefix, take_apart
from oomproof.units import parse_bytes
from tests.faults.forms import Form, near_misses, read_forms

MEMORY = read_forms("memory.toml")
FAILURES = read_forms("failures.toml")


@pytest.mark.parametrize("form", MEMORY, ids=lambda form: form.name)
def test_a_message_of_memory_gets_its_class_its_cause_and_its_numbers(form: Form) -> None:
    fault = classify_text(form.text.splitlines()[-1] if form.last else form.text)
    assert fault is not None
    assert (fault.fault_class.value, fault.cause.value) == (form.fault_class, form.cause)
    assert fault.device == form.device
    assert fault.evidence.code == form.code
    expected = {
        name: 0 if size == "0" else parse_bytes(size) for name, size in form.figures.items()
    }
    figures = fault.figures
    found = {
        name: size
        for name in ("tried", "total", "free", "allocated", "pools", "process", "other", "allowed")
        if (size := getattr(figures, f"{name}_bytes")) is not None
    }
    if "idle" in expected:
        found["idle"] = figures.idle_bytes or 0
    elif figures.reserved_bytes is not None:
        found["reserved"] = figures.reserved_bytes
    assert found.keys() == expected.keys()
    # A sum of two rounded sizes may be a byte off.
    assert all(abs(found[name] - expected[name]) <= 1 for name in expected), (found, expected)


def test_there_are_as_many_forms_as_promised() -> None:
    assert len(MEMORY) >= 24
    assert len(FAILURES) >= 20
    assert len(near_misses()) >= 15


@pytest.mark.parametrize("form", [f for f in FAILURES if "\n" not in f.text], ids=lambda f: f.name)
def test_a_last_line_gets_its_class_and_its_cause(form: Form) -> None:
    fault = classify_text(form.text)
    assert fault is not None
    assert (fault.fault_class.value, fault.cause.value) == (form.fault_class, form.cause)
    assert fault.evidence.code == form.code
    assert fault.device == form.device


@pytest.mark.parametrize("text", near_misses())
def test_words_of_users_paths_and_source_lines_are_no_failure(text: str) -> None:
    assert classify_text(text) is None


@pytest.mark.parametrize(
    "prefix",
    [
        "[rank3]: ",
        "2026-05-11 14:10:52,224 - ERROR - ",
        "2026-05-11T14:10:52.224Z ",
        "ERROR 01-28 03:21:01 engine.py:387] ",
        "(EngineCore_DP0 pid=223840) ERROR 10-25 13:08:43 [core.py:708] ",
        "\x1b[36m(VllmWorkerProcess pid=189)\x1b[0;0m ERROR 04-17 06:55:15 runner.py:120] ",
        "ERROR:root:",
        "app-1  | ",
        "Jun 10 16:45:05 node-9 bash[107468]: ",
        "│ ERROR 09-27 06:46:46 engine.py:157] ",
        "[16:10:33] ",
        "│ ",
        "> ",
        "1.06.520.077 E ",
    ],
)
def test_what_a_logger_puts_in_front_is_taken_off(prefix: str) -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 8.00 GiB"
    for words in (f"torch.OutOfMemoryError: {text}", text):
        fault = classify_text(prefix + words)
        assert fault is not None
        assert fault.cause is Cause.GPU_MEMORY
        assert fault.device == 1


def test_numbers_are_read_over_the_wraps_of_a_terminal() -> None:
    fault = classify_text(
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB (GPU\n"
        "0; 23.65 GiB total capacity; 21.01 GiB already\nallocated; 1.32 GiB free; 21.57 GiB\n"
        "reserved in total by PyTorch)"
    )
    assert fault is not None
    assert fault.device == 0
    assert fault.figures.total_bytes == parse_bytes("23.65GiB")
    assert fault.figures.reserved_bytes == parse_bytes("21.57GiB")


def test_the_async_allocator_is_known_by_its_type() -> None:
    fault = classify_text(
        "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory."
    )
    assert fault is not None
    assert fault.cause is Cause.GPU_MEMORY
    assert classify_text("myapp.errors.OutOfMemoryError: the queue is full") is None


def test_every_rule_is_matched_by_some_form() -> None:
    rules = {fault.evidence.rule for form in (*MEMORY, *FAILURES) for fault in _faults(form.text)}
    untested = {rule.name for rule in RULES} - rules
    assert untested <= {
        *("torch async allocator", "xla", "CUDA name", "NCCL watchdog", "NVML", "plan", "fork"),
        *("paging file", "bad_alloc", "errno 122", "safetensors disk", "worker", "signal"),
        *("fallen off the bus", "FlashAttention", "triton", "no driver", "types", "meta"),
        *("cuDNN search",),
    }


def _faults(text: str) -> list[Fault]:
    return [fault for line in text.splitlines() if (fault := classify_text(line)) is not None]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate",
            "gpu-memory",
        ),
        ("cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY", "gpu-memory"),
        ("CudaError: cuLaunchKernelEx: CUDA_ERROR_ILLEGAL_ADDRESS", "illegal-access"),
        ("RuntimeError: cudaErrorLaunchFailure: unspecified launch failure", "launch-failure"),
        ("RuntimeError: HIP error: hipErrorOutOfMemory", "gpu-memory"),
        (
            "RuntimeError: CUDA error 700: an illegal memory access was encountered",
            "illegal-access",
        ),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", "nccl"),
        ("ray.exceptions.RayTaskError(OutOfMemoryError): ray::Worker.step() (pid=7)", "gpu-memory"),
        ("pynvml.NVMLError_GpuIsLost: GPU is lost", "gpu-lost"),
        ("error: llama-3.1-70b does not fit: 20.1 GiB missing: use nf4", "does-not-fit"),
        ("OSError: [WinError 1455] The paging file is too small", "host-memory"),
        ("  what():  std::bad_alloc", "host-memory"),
        ("OSError: [Errno 122] Disk quota exceeded", "disk-full"),
        ("RuntimeError: Found no NVIDIA driver on your system. Please check", "no-gpu"),
        ("NotImplementedError: Cannot copy out of meta tensor; no data!", "wrong-device"),
        (
            "RuntimeError: Unable to find a valid cuDNN algorithm to run convolution",
            "library-memory",
        ),
        ("RuntimeError: Cannot find a working triton installation.", "missing-package"),
        ("NVRM: GPU 0000:01:00.0 has fallen off the bus.", "gpu-lost"),
        ("Error: llama runner process has terminated: signal: killed", "killed"),
        (
            "subprocess.CalledProcessError: Command '['x']' died with <Signals.SIGKILL: 9>.",
            "killed",
        ),
        ("RuntimeError: CUDA error: words that no version of CUDA had before", "unknown-cuda"),
        (
            "ImportError: FlashAttention2 has been toggled on, but it cannot be used",
            "missing-package",
        ),
        (
            (
                "RuntimeError: Input type (torch.cuda.HalfTensor) and weight type "
                "(torch.HalfTensor) should be the same"
            ),
            "wrong-device",
        ),
        (
            "SafetensorError: Error while serializing: I/O error: Os { code: 28, kind: StorageFull",
            "disk-full",
        ),
    ],
)
def test_rarer_words_are_known_too(text: str, cause: str) -> None:
    fault = classify_text(text)
    assert fault is not None
    assert fault.cause.value == cause


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from(
                [
                    *[w for form in MEMORY for w in form.text.split()][:600],
                    "\n",
                    "9" * 40,
                ]
            ),
            max_size=60,
        ).map(" ".join),
        st.sampled_from(MEMORY + FAILURES).flatmap(
            lambda form: st.integers(0, len(form.text)).map(lambda end: form.text[:end] * 2)
        ),
    )
)
def test_no_text_raises(text: str) -> None:
    fault = classify_text(text)
    assert fault is None or fault.as_dict()["class"]
    read_figures(text)
    read_device(text)
    take_apart(text)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a." * 50_000 + "Error",
        "(GPU 0; " * 20_000,
        "2026-01-01 " * 10_000,
        "ERROR:" * 20_000,
        "x" * 100_000 + " Error: CUDA out of memory.",
        " | " * 30_000,
        "Process 1 has 1.00 GiB memory in use. " * 5_000,
        "NVRM: Xid (" * 10_000,
    ],
    ids=range(9),
)
def test_no_text_takes_long(text: str) -> None:
    classify_text(text)
    classify_text(f"RuntimeError: {text}")
    strip_prefix(text)
