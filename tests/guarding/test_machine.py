"""What the ladder is told of a machine: other processes, not this one under another number."""

from __future__ import annotations

import os

from oomproof.guarding.machine import without_own
from oomproof.hardware.holders import Holder
from oomproof.units import GIB

STRANGE = 2**22 + 5
"""More than any pid of Linux: nobody's here, as a host's number is in a container."""


def holder(pid: int | None, gib: float | None) -> Holder:
    used = None if gib is None else int(gib * GIB)
    return Holder(device=0, pid=pid, name="?", used_bytes=used)


def test_this_process_is_known_by_its_number() -> None:
    other = holder(STRANGE, 5.5)
    found = without_own([holder(os.getpid(), 5.5), other], 5 * GIB, GIB // 2)
    assert found == [other]


def test_in_a_container_it_is_known_by_what_it_holds() -> None:
    own, other = holder(STRANGE, 5.6), holder(STRANGE + 1, 20)
    assert without_own([other, own], 5 * GIB, GIB // 2) == [other]
    # Without CUDA it holds nothing, and both are others.
    assert without_own([other, own], None, GIB // 2) == [other, own]
    assert without_own([holder(STRANGE, None)], 5 * GIB, GIB // 2) == [holder(STRANGE, None)]


def test_processes_that_the_driver_does_not_name_are_told_as_such() -> None:
    said = "processes that the driver does not name hold 20.0 GiB of GPU 0"
    assert str(holder(None, 20)) == said
