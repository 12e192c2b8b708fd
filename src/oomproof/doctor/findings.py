"""The form of a check, of what it finds, and of the verdicts that the findings add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from oomproof.doctor.facts import Facts

Status = Literal["ok", "limited", "missing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is wrong, and the line that mends it."""

    status: Literal["limited", "missing"]
    """"limited": works, but not at its best."""
    detail: str
    remedy: str
    """One line: a command, or one thing to do."""
    required: bool = True
    """Whether `run` fails over it, where the capability is one that it needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing to look at: a pure function of the facts."""

    name: str
    run: Callable[[Facts], Finding | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a capability amounts to where no check found anything."""

    detail: str
    status: Status = "ok"
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Capability:
    """Something that a machine can do or not, with what may be in its way, first things first."""

    name: str
    summary: Callable[[Facts], Summary]
    checks: tuple[Check, ...] = ()
    required: Callable[[Facts], bool] = lambda _facts: False
    """Whether `run` needs it on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One capability of this machine."""

    capability: str
    status: Status
    """"ok", "limited" (works, but not at its best) or "missing"."""
    detail: str
    remedy: str | None = None
    """The line that mends it, where something can be installed or changed."""
    required: bool = True
    """Whether `run` needs it."""
    check: str | None = None
    """The check that decided; None where none found anything."""
    also: tuple[str, ...] = ()
    """What further checks found; they come up again once the first is mended."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `doctor --json`."""
        return {**asdict(self), "also": list(self.also)}


def judge(capability: Capability, facts: Facts) -> Verdict:
    """A capability's verdict: the worst of what its checks find, the first of several as bad."""
    found = [
        (check, finding) for check in capability.checks if (finding := check.run(facts)) is not None
    ]
    found.sort(key=lambda pair: pair[1].status != "missing")
    required = capability.required(facts)
    if not found:
        summary = capability.summary(facts)
        return Verdict(
            capability=capability.name,
            status=summary.status,
            detail=summary.detail,
            remedy=summary.remedy,
            required=required,
        )
    check, finding = found[0]
    return Verdict(
        capability=capability.name,
        status=finding.status,
        detail=finding.detail,
        remedy=finding.remedy,
        required=required and finding.required,
        check=check.name,
        also=tuple(other.detail for _, other in found[1:]),
    )


def is_well(verdicts: Sequence[Verdict]) -> bool:
    """Whether nothing that `run` needs is missing."""
    return not any(verdict.required and verdict.status == "missing" for verdict in verdicts)
