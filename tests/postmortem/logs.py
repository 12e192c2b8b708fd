"""Logs for tests, and what is found in them."""

from __future__ import annotations

from oomproof.postmortem.explain import Explanation, explain
from oomproof.postmortem.scan import Reading, scan


def read(text: str) -> Reading:
    """The reading of a log."""
    return scan(text.splitlines())


def explained(text: str) -> Explanation:
    """The explanation of a log."""
    return explain(text.splitlines())


def oom(figures: str, *, before: str = "", tried: str = "130.00 MiB") -> str:
    """A traceback that ends in torch's error, with these words behind "Tried to allocate"."""
    return (
        f"{before}\nTraceback (most recent call last):\n"
        '  File "/srv/app.py", line 41, in <module>\n'
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {tried}. {figures}"
    )


def card(
    total: str, free: str, process: str, allocated: str, idle: str, *, before: str = ""
) -> str:
    """What torch from 2.1 on says of a GPU, in GiB."""
    return (
        f"GPU 0 has a total capacity of {total} GiB of which {free} GiB is free. {before}"
        f"Including non-PyTorch memory, this process has {process} GiB memory in use. Of the "
        f"allocated memory {allocated} GiB is allocated by PyTorch, and {idle} GiB is reserved by "
        "PyTorch but unallocated."
    )
