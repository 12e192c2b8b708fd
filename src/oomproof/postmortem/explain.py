"""`explain`: a log → what happened, what was to blame, what would have worked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from oomproof.errors import InputError
from oomproof.faults.fault import Cause, Fault
from oomproof.postmortem.blame import Blame, blame
from oomproof.postmortem.scan import Stage, scan
from oomproof.postmortem.words import CLASSES, WORDS, Words
from oomproof.units import format_bytes

if TYPE_CHECKING:
    from oomproof.planning.plan import Plan
    from oomproof.postmortem.advice import Advice


_BYTES_IN_16_BITS = 2
_OF_TRAINING = (
    "the plan is one for answering prompts; training also holds gradients, optimizer states and "
    "activations: use QLoRA, gradient checkpointing, shorter sequences"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The first failure of a log, explained."""

    fault: Fault
    what: str
    """What happened, in plain words."""
    then: str
    """What its class means."""
    stage: Stage
    blame: Blame | None
    advice: Advice | None
    """None where no plan would help."""
    remedies: tuple[str, ...]
    more: Mapping[Cause, int]
    """Failures behind the first, by cause."""
    lines: int
    """Lines that were read."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `explain --json` prints them (docs/2-running.md)."""
        advice = self.advice
        return {
            "fault": self.fault.as_dict(),
            "what": self.what,
            "then": self.then,
            "stage": self.stage.value,
            "blame": None if self.blame is None else asdict(self.blame),
            "remedies": list(self.remedies),
            "model": None if advice is None else advice.model,
            "gpus": None if advice is None else advice.gpus,
            "plan": None if advice is None else _plan_as_dict(advice.plan),
            "others_bytes": None if advice is None else advice.others_bytes,
            "plan_alone": None if advice is None else _plan_as_dict(advice.alone),
            "commands": [] if advice is None else list(advice.commands),
            "more": {cause.value: count for cause, count in self.more.items()},
            "lines": self.lines,
        }


def explain(lines: Iterable[str], *, name: str = "the text") -> Explanation:
    """Explains the first failure of a log.

    Args:
        lines: Without their ends (`source.read_lines`).
        name: What the log is called in errors.

    Raises:
        InputError: There is nothing in it, or no failure that is known.
    """
    reading = scan(lines)
    fault = reading.first
    if fault is None:
        raise InputError(
            f"{name}: no failure of memory, of a GPU or of an installation is known in its "
            f"{_counted(reading.lines, 'line')}"
            + ("" if reading.last_error is None else f"; its last error is {reading.last_error!r}"),
            remedy="give the whole traceback, down to the line that names the error",
        )
    words = WORDS[fault.cause]
    advice = None
    if words.plans:
        from oomproof.postmortem.advice import advise

        advice = advise(reading)
    blamed = None
    if words.blames:
        plan = None if advice is None else advice.plan
        weights_bytes = None if plan is None else _BYTES_IN_16_BITS * plan.num_parameters
        blamed = blame(fault.figures, reading.stage, reading.spot, weights_bytes)
    return Explanation(
        fault=fault,
        what=words.what,
        then=CLASSES[fault.fault_class],
        stage=reading.stage,
        blame=blamed,
        advice=advice,
        remedies=(*words.remedies, *_against(blamed), *_beside(reading.stage, words)),
        more=reading.more,
        lines=reading.lines,
    )


def _against(blamed: Blame | None) -> tuple[str, ...]:
    """What helps against a term beside a smaller format."""
    return () if blamed is None else _REMEDIES.get(blamed.term.value, ())


def _beside(stage: Stage, words: Words) -> tuple[str, ...]:
    """What a plan does not cover."""
    if stage is not Stage.TRAINING or not words.plans:
        return ()
    return (_OF_TRAINING,)


_REMEDIES: dict[str, tuple[str, ...]] = {
    "other-processes": ("end the other processes first; `nvidia-smi` lists them",),
    "fragmentation": (
        (
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, set before torch is imported, keeps "
            "PyTorch's memory in one piece"
        ),
    ),
    "limit": ("raise or remove the limit: set_per_process_memory_fraction, or --cap",),
    "kv-cache": ("a shorter context, or --kv-format fp8, halves what the cache takes",),
}


def _plan_as_dict(plan: Plan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {
        "format": plan.format,
        "fits": plan.fits,
        "runnable": plan.runnable,
        "engine": plan.engine,
        "context": plan.context,
        "max_context": plan.max_context,
        "shortfall_bytes": plan.shortfall_bytes,
        "peak_bytes": [device.peak_bytes for device in plan.devices],
        "usable_bytes": [device.usable_bytes for device in plan.devices],
    }


def sentence_of(plan: Plan) -> str:
    """What a plan promises, in a line."""
    weights = format_bytes(_BYTES_IN_16_BITS * plan.num_parameters)
    if not plan.fits:
        return (
            f"no format fits: {plan.format}, the smallest, lacks "
            f"{format_bytes(plan.shortfall_bytes)} (in 16 bits its weights take {weights})"
        )
    fullest = max(plan.devices, key=lambda device: device.peak_bytes / max(1, device.usable_bytes))
    return (
        f"{plan.format} fits: at most {format_bytes(fullest.peak_bytes)} of "
        f"{format_bytes(fullest.usable_bytes)} on the fullest GPU at {plan.context:,} tokens of "
        f"context, up to {plan.max_context:,} fit (in 16 bits its weights take {weights})"
    )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
