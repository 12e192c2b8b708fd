"""When the memory that cuBLAS works in may be given back.

torch keeps a workspace for every handle and stream, 32 MiB on Hopper, and gives all of them back or
none. Graphs write where theirs was when they were recorded: while an engine is open, all stay.
"""

from __future__ import annotations

from weakref import WeakSet

import torch

_OPEN: WeakSet[object] = WeakSet()


def keep_workspaces(engine: object) -> None:
    """From now on an engine's graphs use them, until it gives them up or is gone."""
    _OPEN.add(engine)


def give_up_workspaces(engine: object) -> None:
    """An engine is closed: its graphs are gone."""
    _OPEN.discard(engine)


def clear_workspaces() -> bool:
    """Gives the workspaces back, and torch's idle memory; whether no open engine was in the way."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return True
    if not _OPEN:
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - torch's notes on CUDA name it
    torch.cuda.empty_cache()
    return not _OPEN
