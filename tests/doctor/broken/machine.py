"""The form of a broken machine."""

from __future__ import annotations

from dataclasses import dataclass

from oomproof.doctor.facts import Facts
from oomproof.doctor.findings import Status

INDEX = "https://download.pytorch.org/whl"
TORCH = "pip install --force-reinstall 'torch>=2.10' --index-url"


@dataclass(frozen=True, kw_only=True, slots=True)
class Broken:
    """A machine, and what is to be said of one of its capabilities."""

    name: str
    thread: str
    facts: Facts
    capability: str
    check: str
    remedy: str
    says: str
    """Part of the finding."""
    status: Status = "missing"
    fails: bool = True
    """Whether `run` fails there, and the command with it."""
