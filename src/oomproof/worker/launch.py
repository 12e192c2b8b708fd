"""What a supervisor starts, and how long it waits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from oomproof.models.spec import ModelSpec
from oomproof.planning.plan import Plan
from oomproof.worker.messages import Canary

REAL_START = "oomproof.worker.loading:start"
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_ALONE = {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
_CANARY_PROMPT = 8
_CANARY_ANSWER = 4


Find = Callable[[str], tuple[ModelSpec, Path]]
"""From a model's name to what it is and the folder with its files; raises an OomproofError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What to load."""

    plan: Plan
    folder: Path
    """Where the model's files are."""
    vocab_size: int
    trust_remote_code: bool = False
    allowed: tuple[str, ...] = ()
    """Rungs that the user allows where memory runs out, in order."""
    find: Find | None = None
    """Where a smaller model's files are, downloaded where they are not here yet; None where no
    rung names one."""
    start: str = REAL_START
    """"module:function" that the child calls to get its engine."""

    @property
    def proof(self) -> tuple[object, ...]:
        """What decides the canary's answer: equal plans by this give equal tokens."""
        plan = self.plan
        placed = tuple((one.index, one.kind, one.layers) for one in plan.devices_in_use)
        return (
            *(plan.fingerprint, plan.format, plan.search, plan.kv_format, plan.compute_dtype),
            *plan.tensor_formats.items(),
            plan.adapter,
            *(plan.engine, plan.attention, plan.context, plan.concurrency, placed),
        )

    @property
    def canary(self) -> Canary | None:
        """A request that every worker answers alike; None where the context has no room for one."""
        room = self.plan.context
        if room < 2:
            return None
        prompt = min(_CANARY_PROMPT, room // 2)
        return Canary(
            prompt_tokens=tuple((7919 * i + 11) % self.vocab_size for i in range(prompt)),
            max_new_tokens=min(_CANARY_ANSWER, room - prompt),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long a supervisor waits, in seconds, and how often it starts again."""

    step_s: float = 120.0
    """For a sign of life of a worker that has something to answer."""
    load_s: float = 900.0
    """For the next sign of life of one that loads; kernels may be compiled meanwhile."""
    close_s: float = 5.0
    """For a worker that was told to close."""
    restarts: int = 3
    """Most replacements within the window."""
    window_s: float = 600.0


def limits_of(plan: Plan) -> Limits:
    """Limits that are generous for the speeds which the plan predicts."""
    speed = plan.tokens_per_second
    if not speed.decode or not speed.prefill:
        return Limits(step_s=900.0)
    step_s = plan.concurrency * (1 / speed.decode + plan.prefill_chunk_tokens / speed.prefill)
    return Limits(step_s=60 + 20 * step_s)


def command(launch: Launch, commands: int, reports: int) -> list[str]:
    """The command line of a child, whose ends of the pipes have these numbers.

    -P keeps the working folder out of sys.path.
    """
    own = [str(commands), str(reports), str(os.getpid()), launch.start]
    return [sys.executable, "-P", "-X", "faulthandler", "-m", "oomproof.worker", *own]


def environment(launch: Launch, environ: Mapping[str, str]) -> dict[str, str]:
    """The child's: this process's import path, no tokens, and no network where no code needs it."""
    kept = {name: value for name, value in environ.items() if name not in _SECRETS} | _ALONE
    if not launch.trust_remote_code:
        kept |= _OFFLINE
    # In this order, standard library included: nothing is imported from elsewhere than here.
    kept["PYTHONPATH"] = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return kept
