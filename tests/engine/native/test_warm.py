"""Warming up beside loading: a failure in the thread is told in one line where it is awaited."""

from __future__ import annotations

import pytest
import torch

from oomproof.engine.native import warm
from oomproof.engine.native.warm import Warming, start_warming
from oomproof.errors import LoadError, MissingDependencyError


def test_a_processor_has_nothing_to_warm() -> None:
    assert start_warming(torch.device("cpu")) is None


def test_what_was_done_is_done_when_it_is_joined() -> None:
    done: list[int] = []
    Warming(lambda: done.append(1)).join()
    assert done == [1]


def test_a_missing_compiler_is_one_line_with_its_remedy() -> None:
    def fail() -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore lines")

    with pytest.raises(LoadError) as caught:
        Warming(fail).join()
    assert str(caught.value).startswith(
        "the native engine's kernels cannot be compiled here: Failed to find C compiler."
    )
    assert "apt-get install gcc" in str(caught.value)
    assert "more lines" not in str(caught.value)


def test_running_out_of_memory_stays_what_it_is() -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Warming(fail).join()


def test_what_has_words_of_its_own_keeps_them() -> None:
    def fail() -> None:
        raise MissingDependencyError("NVRTC", install="pip install nvidia-cuda-nvrtc")

    with pytest.raises(MissingDependencyError, match="pip install nvidia-cuda-nvrtc"):
        Warming(fail).join()


def test_a_gpu_without_triton_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'oomproof\[run\]'"):
        start_warming(torch.device("cuda", 0))
