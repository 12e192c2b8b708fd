"""cuBLAS' memory is given back when no engine's graphs write to it."""

from __future__ import annotations

import gc

import pytest
import torch

from oomproof.engine.native import workspaces
from oomproof.engine.native.workspaces import (
    clear_workspaces,
    give_up_workspaces,
    keep_workspaces,
)


class Engine:
    """Has graphs."""


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU is asked for."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("idle"))
    clear = lambda: told.append("workspaces")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    workspaces._OPEN.clear()
    return told


def test_they_stay_while_any_engine_is_open(done: list[str]) -> None:
    first, second = Engine(), Engine()
    keep_workspaces(first)
    keep_workspaces(second)
    assert not clear_workspaces()
    give_up_workspaces(first)
    assert not clear_workspaces()
    assert done == ["idle", "idle"]
    give_up_workspaces(second)
    assert clear_workspaces()
    assert done[2:] == ["workspaces", "idle"]


def test_an_engine_that_is_gone_without_being_closed_keeps_nothing(done: list[str]) -> None:
    engine = Engine()
    keep_workspaces(engine)
    del engine
    gc.collect()
    assert clear_workspaces()
    assert done == ["workspaces", "idle"]


def test_without_cuda_there_is_nothing_to_clear(
    done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert clear_workspaces()
    assert done == []
