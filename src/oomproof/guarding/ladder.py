"""Which rung comes next: the free ones, then those that the user allowed, each at most once."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oomproof.errors import LadderExhaustedError
from oomproof.guarding.rungs import RUNGS, Proposal, Rung, rung_of
from oomproof.guarding.situation import Situation
from oomproof.planning.plan import Plan
from oomproof.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class LadderEvent:
    """A rung that is taken, or a wait on one."""

    rung: str
    message: str
    """What failed, which rung, what it frees and costs, and the new plan, in a line."""
    plan: Plan
    """What is started next."""
    kept: Path | None = None
    """A file with what is known of the failure, where memory ran out."""


class Ladder:
    """Chooses rungs for one engine.

    Args:
        allowed: Names that the user allowed, in their order (`fallback.read_fallback`).
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._allowed = tuple(allowed)
        self._rungs = [rung for rung in RUNGS.values() if rung.is_free]
        self._rungs += [rung_of(name) for name in allowed]
        self._spent: set[str] = set()
        self._tried: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    @property
    def counts(self) -> Mapping[str, int]:
        """Rung → how often it was taken."""
        return dict(self._counts)

    def rest(self) -> None:
        """What was interrupted has ended well: rungs that change nothing may be taken again."""
        self._spent -= {rung.name for rung in self._rungs if rung.is_free}
        self._tried.clear()

    def next(self, situation: Situation) -> tuple[Rung, Proposal]:
        """The next rung that helps, taken by this call.

        Raises:
            LadderExhaustedError: There is none.
        """
        for rung in self._rungs:
            if rung.name in self._spent:
                continue
            proposed = rung.propose(situation)
            if isinstance(proposed, str):
                self._tried[rung.name] = f"{rung.name}: {proposed}"
                continue
            self._spent.add(rung.name)
            self._tried[rung.name] = f"{rung.name}: taken, and it failed again"
            self._counts[rung.name] = self._counts.get(rung.name, 0) + 1
            return rung, proposed
        raise self._exhausted(situation)

    def _exhausted(self, situation: Situation) -> LadderExhaustedError:
        failure = situation.failure
        return LadderExhaustedError(
            failure.text,
            fault=failure.fault,
            tried=tuple(self._tried.values()),
            shortfall_bytes=failure.missing_bytes,
            remedy=self._what_would_fit(situation),
        )

    def _what_would_fit(self, situation: Situation) -> str:
        for rung in RUNGS.values():
            if rung.is_free or rung.name in self._allowed:
                continue
            proposed = rung.propose(situation)
            if isinstance(proposed, str):
                continue
            allowed = ",".join((*self._allowed, rung.name))
            return (
                f"--fallback {allowed} would go on, or start it as "
                f"`{command_of(proposed.target.plan)}`"
            )
        if situation.holders:
            return "; ".join(str(holder) for holder in situation.holders[:3])
        return "use a smaller model, or free memory"


def event_of(rung: Rung, proposal: Proposal, situation: Situation) -> LadderEvent:
    """What is told of a rung that is taken."""
    plan = proposal.target.plan
    frees = proposal.frees_bytes
    freed = f"frees {format_bytes(frees)} of the plan" if frees > 0 else "frees caches"
    if frees < 0:
        freed = "moves the model"
    if proposal.one_by_one:
        freed = "frees nothing of the plan; running requests go back to the queue with their tokens"
    if proposal.waits:
        held = "; ".join(str(holder) for holder in situation.holders[:3])
        freed = f"waits for {held or 'the device'}"
    return LadderEvent(
        rung=rung.name,
        plan=plan,
        kept=situation.failure.kept,
        message=f"{_in_short(situation)}; going on with {rung.name}: {freed}; costs {rung.costs}; "
        f"plan: {words_of(plan)}",
    )


def _in_short(situation: Situation) -> str:
    failure = situation.failure
    first = failure.text.partition(". ")[0]
    if not failure.missing_bytes or failure.is_world:
        return first
    return f"{first}, {format_bytes(failure.missing_bytes)} missing"


def words_of(plan: Plan) -> str:
    """A plan in a few words."""
    where = ", ".join(
        f"{format_bytes(device.peak_bytes)} of {device.name} {device.index}"
        for device in plan.devices_in_use
    )
    return (
        f"{plan.model} in {plan.format}, KV {plan.kv_format}, context {plan.context:,}, "
        f"{plan.concurrency} at once, {where}"
    )


def command_of(plan: Plan) -> str:
    """The command that runs a plan."""
    words = [
        *("oomproof", "run", plan.model, "--format", plan.format),
        *("--kv-format", plan.kv_format, "--context", str(plan.context)),
    ]
    if plan.cap_bytes is not None:
        words += ("--cap", str(plan.cap_bytes))
    if plan.reserve_bytes:
        words += ("--reserve", str(plan.reserve_bytes))
    if plan.search:
        words.append("--search")
    if plan.adapter is not None:
        words += ("--adapter", plan.adapter.path)
    for device in plan.devices:
        if device.limit_bytes is not None and device.limit_bytes != plan.cap_bytes:
            words += ("--max-memory", f"{device.index}={device.limit_bytes}")
    return shlex.join(words)
